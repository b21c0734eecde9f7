"""Runs that fail after their start: one line with the culprit, recorded as failed, tried again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from ctdbench import registry, results
from ctdbench.cli import app
from ctdbench.distill import train
from ctdbench.results import CHECKPOINTS, METRICS, RESULT

pytestmark = pytest.mark.usefixtures("own_cache")
TEXT = [f"The fox counts {number} stones and writes the sum down." for number in range(40)]
PLUGIN = """
import torch
from ctdbench.method import Method, Needs, Term

class Mine(Method):
    @property
    def needs(self):
        return Needs(teacher_logits=False, hidden=True)

    def terms(self, block, modules):
        hidden, count = block.student.hidden, block.student.supervised.sum()
        {body}

METHOD = Mine
"""
TOTAL = "return {'own': Term(%s, count)}"


@pytest.fixture(scope="module")
def store(own_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, and a store with the baselines."""
    folder = tmp_path_factory.mktemp("failing")
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXT))
    assert run(folder, "sft").exit_code == 0
    return folder


@pytest.fixture(autouse=True)
def _no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_plugins", {})


def run(folder: Path, method: str, *more: str) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cell = ("run", "--method", method, "--pair", "tiny", "--budget", "1kB", "--store", "runs")
        settings = ("train.corpus=jsonl:corpus.jsonl", "train.checkpoint_every=2")
        sets = [word for setting in settings for word in ("--set", setting)]
        evaluated = ("--tasks", "bpb_pydoc", "--limit", "1")
        return CliRunner().invoke(app, [*cell, *sets, *evaluated, *more])


def error_of(outcome: Result) -> str:
    (line,) = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert outcome.stderr.endswith(line + "\n")
    return line


def cell(folder: Path, method: str) -> Path:
    (found,) = (folder / "runs" / "tiny" / method).iterdir()
    return found


FAULTS = {
    "nan": (TOTAL % "hidden.sum() * float('nan')", "the loss is not finite"),
    "endless-slope": (
        TOTAL % "(hidden - hidden.detach()).abs().sqrt().sum()",
        "the gradient is not finite",
    ),
    "wrong-shape": (TOTAL % "hidden", "the total of term own is a Tensor ["),
    "wrong-sizes": (TOTAL % "(hidden @ hidden).sum()", "RuntimeError: mat1 and mat2 shapes"),
    "no-term": ("return {'own': hidden.sum()}", "term own is of type Tensor"),
    "no-mapping": ("return [hidden.sum()]", "terms() gives a list"),
    "raises": ("raise KeyError('lost\\nkey')", "KeyError: "),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_method_at_fault_is_named_with_the_step_and_the_documents(name: str, store: Path) -> None:
    body, told = FAULTS[name]
    (store / f"{name}.py").write_text(PLUGIN.format(body=body))
    outcome = run(store, name, "--plugin", f"{name}.py")
    assert outcome.exit_code == 1
    line = error_of(outcome)
    assert line.startswith(f"error: method {name}: {told}")
    assert "at step 1 on documents 1 to 4 in their order ('The fox counts" in line
    folder = cell(store, name)
    assert results.state(folder) == "failed"
    (note,) = results.read_result(folder / RESULT)["notes"]
    assert note.startswith(f"RunError: method {name}: {told}")
    assert "documents 1 to 4" in note


def test_debug_shows_the_traceback(store: Path) -> None:
    (store / "traced.py").write_text(PLUGIN.format(body="raise KeyError('lost')"))
    outcome = run(store, "traced", "--plugin", "traced.py", "--debug")
    assert outcome.exit_code == 1
    assert "Traceback (most recent call last)" in outcome.stderr
    assert 'raise KeyError("lost")' in outcome.stderr.replace("'", '"')
    assert "error: method traced: KeyError" in error_of(outcome)


def test_a_failed_cell_is_tried_again_and_a_killed_one_is_no_longer_failed(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = store / "again.py"
    plugin.write_text(PLUGIN.format(body=TOTAL % "hidden.square().sum()"))
    for failure, state in ((ValueError, "failed"), (KeyboardInterrupt, "resumable")):
        with monkeypatch.context() as patch:
            patch.setattr("ctdbench.launch.cell.evaluate", _raise(failure))
            assert run(store, "again", "--plugin", "again.py").exit_code != 0
        assert results.state(cell(store, "again")) == state
    assert run(store, "again", "--plugin", "again.py").exit_code == 0
    assert results.state(cell(store, "again")) == "done"


def test_a_result_stays_until_another_takes_its_place(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cell that is trained again for its weights fails, is killed, and is done in the end."""
    asked = ("--seed", "40")
    before = set((store / "runs/tiny/sft").iterdir())
    assert run(store, "sft", *asked).exit_code == 0
    (folder,) = set((store / "runs/tiny/sft").iterdir()) - before
    written = (folder / RESULT).read_bytes()
    for failure in (ValueError, KeyboardInterrupt):
        with monkeypatch.context() as patch:
            patch.setattr("ctdbench.launch.cell.evaluate", _raise(failure))
            assert run(store, "sft", *asked, "--keep-model").exit_code != 0
        assert (folder / RESULT).read_bytes() == written
        assert results.state(folder) == "done"
        assert results.state(folder, keeps_model=True) == "resumable"
    taken, schedule = list[int](), train.schedule
    monkeypatch.setattr(train, "schedule", lambda *of: taken.append(of[0]) or schedule(*of))
    assert run(store, "sft", *asked, "--keep-model").exit_code == 0
    assert not taken, "it went on from the last checkpoint"
    assert results.state(folder, keeps_model=True) == "done"
    assert (folder / RESULT).read_bytes() != written
    assert not (folder / CHECKPOINTS).exists()


def test_weights_that_cannot_be_written_leave_the_scores(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("--seed", "41", "--keep-model")
    before = set((store / "runs/tiny/sft").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("ctdbench.launch.kept.saving.save", _raise(ValueError))
        assert run(store, "sft", *asked).exit_code == 1
    (folder,) = set((store / "runs/tiny/sft").iterdir()) - before
    assert results.state(folder) == "done"
    assert results.state(folder, keeps_model=True) == "resumable"
    assert run(store, "sft", *asked).exit_code == 0
    assert results.state(folder, keeps_model=True) == "done"


def _raise(kind: type[BaseException]) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise kind("on the way")

    return fail


@pytest.mark.parametrize("file", ["state.json", "tensors.safetensors", METRICS])
def test_damaged_checkpoints_are_named(
    file: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = str(1 + ["state.json", "tensors.safetensors", METRICS].index(file))
    before = set((store / "runs/tiny/sft").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("ctdbench.launch.cell.evaluate", _raise(KeyboardInterrupt))
        run(store, "sft", "--seed", seed)
    (folder,) = set((store / "runs/tiny/sft").iterdir()) - before
    damaged = [folder / METRICS] if file == METRICS else folder.glob(f"{CHECKPOINTS}/*/{file}")
    for path in damaged:
        path.write_bytes(b"\0" + path.read_bytes()[9:])
    outcome = run(store, "sft", "--seed", seed)
    assert outcome.exit_code == 1
    line = error_of(outcome)
    assert str(folder.relative_to(store)) in line
    assert "delete " in line
    # What the line says to try helps.
    culprit = folder / CHECKPOINTS if file != METRICS else folder
    assert f"delete {culprit.relative_to(store)}" in line


@pytest.mark.parametrize("place", [0, 40, -9])
def test_a_flipped_bit_in_the_newest_checkpoint_falls_back(
    place: int, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the right size whose numbers are wrong would train on unseen."""
    seed = str(10 + abs(place))
    before = set((store / "runs/tiny/sft").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("ctdbench.launch.cell.evaluate", _raise(KeyboardInterrupt))
        run(store, "sft", "--seed", seed)
    (folder,) = set((store / "runs/tiny/sft").iterdir()) - before
    newest = max((folder / CHECKPOINTS).iterdir()) / "tensors.safetensors"
    data = bytearray(newest.read_bytes())
    data[place] ^= 1
    newest.write_bytes(bytes(data))
    taken, schedule = list[int](), train.schedule
    monkeypatch.setattr(train, "schedule", lambda *of: taken.append(of[0]) or schedule(*of))
    assert run(store, "sft", "--seed", seed).exit_code == 0
    assert taken, "it went on from the damaged one, which is of the last step"
