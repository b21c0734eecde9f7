"""A cell's id, as a command makes it: what may change a result changes it, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import test_spec
from pydantic.fields import FieldInfo
from typer.testing import CliRunner

from ctdbench import registry, request
from ctdbench.cli import app
from ctdbench.distill import models, references
from ctdbench.errors import UserError
from ctdbench.launch import cell
from ctdbench.spec import Frozen, RunSpec, is_identity

pytestmark = pytest.mark.usefixtures("own_cache")
ITEM = {"query": "Question: to sit\n", "choices": ["a chair", "a cloud"], "gold": 0}
PLUGIN = "from ctdbench.method import Method\nMETHOD = type('Mine', (Method,), {})\n"


# --- what files hold ---


def test_a_file_is_read_again_only_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    fingerprint, path = references.fingerprint, tmp_path / "model.gguf"
    monkeypatch.setattr(references, "fingerprint", lambda p: read.append(p) or fingerprint(p))
    found = []
    for data, time in ((b"ab", 1), (b"ab", 1), (b"ba", 2), (b"abc", 2), (b"abc", 2)):
        path.write_bytes(data)
        os.utime(path, ns=(time, time))
        found.append(references.known_fingerprint(path))
    assert len(read) == 3
    assert found == [
        hashlib.sha256(data).hexdigest() for data in (b"ab", b"ab", b"ba", b"abc", b"abc")
    ]


# --- every field is classified ---


def specs_in(annotation: Any) -> Iterator[type[Frozen]]:
    """The spec classes in a field's type, and those in their fields."""
    for part in get_args(annotation):
        yield from specs_in(part)
    if isinstance(annotation, type) and issubclass(annotation, Frozen):
        yield annotation
        for field in annotation.model_fields.values():
            yield from specs_in(field.annotation)


def test_every_spec_that_a_run_holds_is_classified_field_by_field() -> None:
    """test_spec checks the table against the fields, and the table against the id."""
    assert set(specs_in(RunSpec)) == {model for model, _ in test_spec.CHANGES_THE_RESULT}


@pytest.mark.parametrize("name", sorted(registry.methods()))
def test_every_option_of_a_method_is_part_of_the_id(name: str) -> None:
    """An option that cannot change a result has no place among a method's options."""
    fields: dict[str, FieldInfo] = registry.load_method(name).Options.model_fields
    assert all(is_identity(field) for field in fields.values())
    spec = request.resolve_options(request.build_spec({"method": name, "pair": "tiny"}))
    assert set(spec.options) == set(fields)
    ids = {spec.cell_id({})}
    for field in fields:
        changed = spec.model_copy(update={"options": {**spec.options, field: "another"}})
        ids.add(changed.cell_id({}))
    assert len(ids) == 1 + len(fields)


# --- the id that a command computes ---


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data, a corpus, a plugin and models, with nothing of it computed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_plugins", {})
    texts = [f"The hen lays egg number {number} on a Monday." for number in range(60)]
    Path("corpus.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    Path("data/piqa").mkdir(parents=True)
    Path("data/piqa/validation.jsonl").write_text(json.dumps(ITEM) + "\n")
    Path("mine.py").write_text(PLUGIN)
    models.load_tokenizer("tiny:student")
    shutil.copytree(models._tiny_folder(references.parse("tiny:student")), "model")
    write_pair("model")
    return tmp_path


def write_pair(student: str) -> None:
    stated = {"student": {"model": f"dir:{student}"}, "teachers": [{"model": "tiny:teacher"}]}
    Path("p.yaml").write_text(json.dumps(stated))


GROUPS = (
    ("--method", "mine"),
    ("--plugin", "mine.py"),
    ("--pair", "p.yaml"),
    ("--budget", "1kB"),
    ("--tasks", "piqa,bpb_pydoc"),
    ("--data-dir", "data"),
    ("--set", "train.corpus=jsonl:corpus.jsonl"),
    ("--set", "train.clip=2"),
)


def cell_id(*more: str, groups: tuple[tuple[str, ...], ...] = GROUPS) -> str:
    """The id of the cell that a command is about to compute."""
    found = []

    def stop(one: cell.Cell, *_: Any, **__: Any) -> None:
        found.append(one.id)
        raise UserError("stop here")

    arguments = [word for group in groups for word in group]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cell, "_compute", stop)
        outcome = CliRunner().invoke(app, ["run", *arguments, *more])
    assert outcome.stderr.endswith("error: stop here\n"), outcome.stderr
    return found[0]


def replaced(old: str, new: str) -> tuple[tuple[str, ...], ...]:
    groups = tuple(tuple(word.replace(old, new) for word in group) for group in GROUPS)
    assert groups != GROUPS
    return groups


def test_the_order_of_arguments_does_not_change_the_id(folder: Path) -> None:
    draws, ids = random.Random(0), {cell_id()}
    for _ in range(3):
        ids.add(cell_id(groups=tuple(draws.sample(GROUPS, len(GROUPS)))))
    settings = {"method": "mine", "pair": "p.yaml", "train": {"clip": 2.0, "budget": 1000}}
    Path("run.yaml").write_text(json.dumps(settings))
    rest = tuple(group for group in GROUPS if "clip" not in group[1] and group[0] != "--budget")
    ids.add(cell_id("--config", "run.yaml", groups=rest))
    assert len(ids) == 1


@pytest.mark.parametrize(
    "more",
    [
        ("--store", "elsewhere"),
        ("--block-rows", "64"),
        ("--set", "train.micro_batch=1"),
        ("--set", "train.checkpoint_every=7"),
        ("--set", "train.teacher_cache=null"),
        ("--keep-model",),
        ("--debug",),
    ],
    ids=lambda more: more[-1],
)
def test_how_a_result_is_made_does_not_change_the_id(more: tuple[str, ...], folder: Path) -> None:
    assert cell_id(*more) == cell_id()


@pytest.mark.parametrize(
    ("scope", "ids"), [("batch", 1), ("microbatch", 2)], ids=["batch", "microbatch"]
)
def test_the_micro_batch_counts_where_a_loss_sees_it_whole(
    scope: str, ids: int, folder: Path
) -> None:
    """The default is the whole batch of 4, and more than that there is not."""
    asked = ("--set", f"method.topk_scope={scope}")
    groups = replaced("mine", "p-kl")
    groups = tuple(group for group in groups if group[0] != "--plugin")
    sizes = ("null", "4", "9", "2")
    found = [cell_id(*asked, "--set", f"train.micro_batch={n}", groups=groups) for n in sizes]
    assert len(set(found[:3])) == 1
    assert len(set(found)) == ids


def test_several_processes_leave_a_loss_that_sees_micro_batches_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They cut the batch otherwise, and the id does not tell how many there were."""
    own = cell.Accelerator

    def of_two(**options: Any) -> Any:
        made = own(**options)
        made.state.num_processes = 2
        return made

    monkeypatch.setattr(cell, "Accelerator", of_two)
    monkeypatch.setattr(cell.processes, "check", lambda accelerator: None)
    arguments = ("run", "--method", "p-kl", "--pair", "p.yaml", "--budget", "1kB", "--tasks")
    asked = ("bpb_pydoc", "--set", "train.corpus=jsonl:corpus.jsonl", "--set")
    done = CliRunner().invoke(app, [*arguments, *asked, "method.topk_scope=microbatch"])
    assert done.exit_code == 2
    assert "train it in one process" in done.stderr.splitlines()[-1]


def test_where_things_lie_does_not_change_the_id(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = cell_id()
    for name in ("data", "corpus.jsonl", "model"):
        Path("else").mkdir(exist_ok=True)
        shutil.move(name, f"else/{name}")
    write_pair(str(folder / "else" / "model"))
    moved = replaced("jsonl:corpus", f"jsonl:{folder}/else/corpus")
    moved = tuple(("--data-dir", "else/data") if g[0] == "--data-dir" else g for g in moved)
    assert cell_id(groups=moved) == before
    monkeypatch.setenv("HOME", str(folder))
    write_pair("~/else/model")
    homely = replaced("jsonl:corpus", "jsonl:~/else/corpus")
    homely = tuple(("--data-dir", "~/else/data") if g[0] == "--data-dir" else g for g in homely)
    assert cell_id(groups=homely) == before


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("corpus.jsonl", "number 59 ", "number 60 "),
        ("data/piqa/validation.jsonl", "a chair", "a stool"),
        ("mine.py", "METHOD =", "# other code\nMETHOD ="),
    ],
)
def test_what_the_names_stand_for_changes_the_id(
    path: str, old: str, new: str, folder: Path
) -> None:
    before = cell_id()
    Path(path).write_text(Path(path).read_text().replace(old, new))
    assert cell_id() != before


def test_the_weights_change_the_id(folder: Path) -> None:
    before = cell_id()
    weights = Path("model/model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert cell_id() != before


@pytest.mark.parametrize(
    "more",
    [
        ("--set", "eval.batch_size=3"),
        ("--set", "eval.precision=bfloat16"),
        ("--set", "train.batch_documents=8"),
        ("--limit", "2"),
        ("--seed", "1"),
        ("--trust-remote-code",),
    ],
    ids=lambda more: more[-1],
)
def test_what_can_change_a_result_changes_the_id(more: tuple[str, ...], folder: Path) -> None:
    assert cell_id(*more) != cell_id()


def test_versions_of_engine_and_identity_change_the_id(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [cell_id()]
    for name in ("ctdbench.launch.content.ENGINE_VERSION", "ctdbench.spec.IDENTITY_VERSION"):
        with monkeypatch.context() as patch:
            patch.setattr(name, 99)
            ids.append(cell_id())
    assert len(set(ids)) == 3


def test_another_commit_behind_a_name_on_the_hub_changes_the_id(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "require", lambda reference: None)
    stated = {"student": {"model": "hub:a/b"}, "teachers": [{"model": "tiny:teacher"}]}
    Path("p.yaml").write_text(json.dumps(stated))
    ids = set()
    for commit in ("1" * 40, "2" * 40):
        monkeypatch.setattr(references, "_hub_commit", lambda reference, known=commit: known)
        ids.add(cell_id())
    assert len(ids) == 2
