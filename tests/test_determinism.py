"""The same request gives the same bits on a processor, whatever ran before or lies beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ctdbench import registry, results
from ctdbench.cli import app
from ctdbench.distill.setting import derived_seed
from ctdbench.results import METRICS

pytestmark = pytest.mark.usefixtures("own_cache")
TEXT = [f"The fox counts {number} stones, {number + 1} hens and an ox." for number in range(60)]
NOISY = """
import torch
from ctdbench.method import Method, Needs, Term
torch.rand(3)
class Noisy(Method):
    @property
    def needs(self):
        return Needs(teacher_logits=False, hidden=True)
    def modules(self, pair):
        from ctdbench.method import Trainable
        return {"head": Trainable(torch.nn.Linear(pair.student_width, 1))}
    def terms(self, block, modules):
        hidden = block.student.hidden
        drawn = (modules["head"](hidden) * torch.rand(len(hidden), 1)).square().sum()
        return {"own": Term(drawn, block.student.supervised.sum())}
METHOD = Noisy
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_plugins", {})
    Path("corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT))
    Path("noisy.py").write_text(NOISY)
    return tmp_path


def run(store: str, method: str, *more: str) -> dict[str, Any]:
    """A cell's numbers: scores, samples and metrics, without the clock's."""
    cell = ("run", "--method", method, "--pair", "tiny", "--budget", "1kB", "--store", store)
    corpus = ("--set", "train.corpus=jsonl:corpus.jsonl", "--tasks", "bpb_pydoc,teacher_jsd_pydoc")
    outcome = CliRunner().invoke(app, [*cell, *corpus, "--limit", "1", *more])
    assert outcome.exit_code == 0, outcome.stderr
    (path,) = Path(store).glob(f"tiny/{method}/*")
    result = results.read_result(path / results.RESULT)
    steps = [json.loads(line) for line in (path / METRICS).read_text().splitlines()]
    return {
        "id": result["id"],
        "scores": result["scores"],
        "samples": {file.name: file.read_bytes() for file in (path / "samples").iterdir()},
        "metrics": [{k: v for k, v in step.items() if k != "seconds"} for step in steps],
    }


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("sft", ()),
        ("bld", ()),
        ("alm", ()),
        ("strict", ("--set", "train.on_policy=1", "--set", "train.generated_tokens=12")),
        ("noisy", ("--plugin", "noisy.py")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_two_fresh_runs_are_equal_bit_by_bit(
    method: str, more: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CTDBENCH_CACHE", str(folder / "first"))
    first = run("first-store", method, *more)
    torch.rand(17)
    torch.manual_seed(5)
    monkeypatch.setenv("CTDBENCH_CACHE", str(folder / "second"))
    assert run("second-store", method, *more) == first


def test_another_method_beside_it_changes_no_number(folder: Path) -> None:
    alone = run("alone", "bld")
    for method, more in (("noisy", ("--plugin", "noisy.py")), ("uld", ())):
        run("together", method, *more)
    assert run("together", "bld", "--plugin", "noisy.py") == alone


def test_seeds_follow_from_names() -> None:
    """A number here that changes would change published results."""
    assert derived_seed("modules", "bld", 0) == derived_seed("modules", "bld", "0")
    seeds = {derived_seed(part, name, s) for part in "ab" for name in "cd" for s in range(3)}
    assert len(seeds) == 12
    assert derived_seed("step", 0, 0) == 5088465690130126710
