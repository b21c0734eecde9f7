"""Publishing: what is copied, what is refused, and that a refusal writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from example_results import example, store_example
from typer.testing import CliRunner

from ctdbench import registry, report, results
from ctdbench.cli import app
from ctdbench.distill import references
from ctdbench.errors import UserError
from ctdbench.launch import sweep
from ctdbench.launch.publish import publish, publish_all
from ctdbench.results import Result
from ctdbench.spec import RunSpec

VALUES = {"start": [1.5, 1.3, 1.4], "teacher": [0.9, 1.0, 1.1], "bld": [1.1, 1.0, 1.3]}


def put(store: Path, method: str, values: list[float], **settings: Any) -> Result:
    info = registry.methods().get(method)
    code = {"method": references.fingerprint(info.file)} if info and info.file else {}
    scores: Any = {"bpb_heldout": {"bpb": sum(values) / len(values)}}
    tasks = ("bpb_heldout",)
    cell = example(method, scores, tasks=tasks, **{"content": code, **settings})
    cell["provenance"]["git"] = {"commit": "abc", "changed": False}
    folder = store_example(store, cell)
    rows = [{"id": str(i), "weight": 1.0, "bpb": value} for i, value in enumerate(values)]
    results.write_jsonl_atomic(folder / "samples" / "bpb_heldout.jsonl", rows)
    results.write_jsonl_atomic(folder / "metrics.jsonl", [{"step": 1, "loss": 2.0}])
    return cell


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CTDBENCH_CACHE", str(tmp_path / "cache"))
    for method, values in VALUES.items():
        put(tmp_path / "runs", method, values)
    return tmp_path / "runs"


def cell(store: Path, method: str = "bld") -> tuple[Path, Result]:
    (entry,) = results.find(store, method=method).items()
    return entry


def test_a_published_cell_makes_the_table_of_its_store(store: Path, tmp_path: Path) -> None:
    folder, result = cell(store)
    target = tmp_path / "results"
    copies = publish(store, result["id"][:6], target)
    assert {path.parent.name for path in copies} == {"start", "teacher", "bld"}
    published = results.find(target)
    assert report.comparison(published) == report.comparison(results.find(store))
    copy = target / folder.relative_to(store)
    assert sorted(p.name for p in copy.rglob("*")) == [
        "bpb_heldout.jsonl.gz", "metrics.jsonl", "result.json", "samples",
    ]  # fmt: skip


def test_all_that_is_new_is_published_with_its_trials(store: Path, tmp_path: Path) -> None:
    for method, values in VALUES.items():
        put(store / results.TRIALS, method, values, seed=1000 if method == "bld" else 0)
    target = tmp_path / "results"
    names = {"start", "teacher", "bld"}
    assert {path.parent.name for path in publish_all(store, target)} == names
    assert len(results.find(target)) == len(results.find(target / results.TRIALS)) == 3
    assert publish_all(store, target) == []
    put(store, "sft", [1.0, 1.1, 1.2])
    assert {path.parent.name for path in publish_all(store, target)} == {"start", "teacher", "sft"}
    assert len(results.find(target)) == 4
    done = CliRunner().invoke(app, ["publish", "--store", str(store), "--to", str(target)])
    assert (done.exit_code, done.output) == (0, "")


def test_publishing_again_changes_no_byte(store: Path, tmp_path: Path) -> None:
    _, result = cell(store)
    target = tmp_path / "results"
    content = [
        {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
        for _ in range(2)
        if publish(store, result["id"], target)
    ]
    assert content[0] == content[1]
    publish(target, result["id"], tmp_path / "copy of the copy")
    folder = next(iter(results.find(tmp_path / "copy of the copy", method="bld")))
    assert (folder / "samples" / "bpb_heldout.jsonl.gz").read_bytes() in content[0].values()


def test_the_folder_of_the_data_is_not_told(store: Path, tmp_path: Path) -> None:
    folder, result = cell(store)
    result["spec"]["eval"]["data_dir"] = "/somewhere/of/mine"
    results.write_json_atomic(folder / "result.json", result)
    for name in (results.REQUEST, sweep.LOG):  # what a sweep leaves beside a result
        (folder / name).write_text("/somewhere/of/mine")
    publish(store, result["id"], tmp_path / "results")
    files = [path for path in (tmp_path / "results").rglob("*") if path.is_file()]
    assert not any(b"/somewhere" in path.read_bytes() for path in files)
    assert {path.name for path in files} == {
        "result.json", "metrics.jsonl", "bpb_heldout.jsonl.gz",
    }  # fmt: skip


def another_code(result: Result) -> None:
    result["content"]["method"] = "0" * 64
    result["id"] = RunSpec.model_validate(result["spec"]).cell_id(result["content"])


def no_scores(result: Result) -> None:
    result["scores"] = {}


def uncommitted(result: Result) -> None:
    result["provenance"]["git"]["changed"] = True


def from_a_wheel(result: Result) -> None:
    result["provenance"]["git"] = None


def other_scores(result: Result) -> None:
    result["scores"]["bpb_heldout"]["bpb"] = 0.5


def no_number(result: Result) -> None:
    result["scores"]["bpb_heldout"]["bpb"] = None


def other_settings(result: Result) -> None:
    result["spec"]["train"]["clip"] = 2.0


def home(result: Result) -> None:
    result["notes"] = [f"read {Path.home()}/data"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (uncommitted, "not committed"),
        (from_a_wheel, "not committed"),
        (other_scores, "does not give its scores"),
        (no_number, "does not give its scores"),
        (other_settings, "not the hash"),
        (home, "a folder of this machine"),
        (no_scores, "does not give its scores"),
    ],
)
@pytest.mark.parametrize("method", ["bld", "start"])
def test_what_cannot_be_checked_is_refused(
    store: Path, tmp_path: Path, change: Callable[[Result], None], told: str, method: str
) -> None:
    folder, result = cell(store, method)
    change(result)
    results.write_json_atomic(folder / "result.json", result)
    with pytest.raises(UserError, match=told):
        publish(store, cell(store)[1]["id"], tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_local_model_and_a_missing_baseline_are_refused(store: Path, tmp_path: Path) -> None:
    local = put(store, "sft", [1.0], corpus="jsonl:mine.jsonl")
    with pytest.raises(UserError, match="its start and teacher was not evaluated"):
        publish(store, local["id"], tmp_path / "results")
    for method in ("start", "teacher"):
        put(store, method, [1.0], corpus="jsonl:mine.jsonl")
    with pytest.raises(UserError, match="a jsonl: reference"):
        publish(store, local["id"], tmp_path / "results")


def test_the_cell_must_be_named(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished cell"):
        publish(store, "zzz", tmp_path / "results")
    with pytest.raises(UserError, match="3 finished cells"):
        publish(store, "", tmp_path / "results")


def test_a_method_that_is_not_the_shipped_one_is_refused(store: Path, tmp_path: Path) -> None:
    folder, result = cell(store)
    another_code(result)
    results.write_json_atomic(folder / "result.json", result)
    with pytest.raises(UserError, match="its method is not the one"):
        publish(store, result["id"], tmp_path / "results")


def test_a_document_that_counts_twice_is_refused(store: Path, tmp_path: Path) -> None:
    folder, result = cell(store)
    row = {"id": "0", "weight": 1.0, "bpb": result["scores"]["bpb_heldout"]["bpb"]}
    results.write_jsonl_atomic(folder / "samples" / "bpb_heldout.jsonl", [row, row])
    with pytest.raises(UserError, match="does not give its scores"):
        publish(store, result["id"], tmp_path / "results")
