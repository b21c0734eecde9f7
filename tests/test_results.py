"""The store: complete or absent, never mistaken, never outside its root."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from example_results import example, store_example
from hypothesis import given, settings
from hypothesis import strategies as st

from ctdbench import registry, results
from ctdbench.errors import RunError, UserError
from ctdbench.report import comparison

SCORES: dict[str, dict[str, float | None]] = {"piqa": {"acc": 0.5, "bpb": 1.25}}
NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=25, deadline=None)
@given(data=JSON)
def test_json_comes_back_as_it_was_written(data: Any, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "round" / "trip.json"
    results.write_json_atomic(path, data)
    assert json.loads(path.read_text(encoding="utf-8")) == data
    assert [entry.name for entry in path.parent.iterdir()] == ["trip.json"]


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    results.write_json_atomic(tmp_path / "a.json", {"loss": math.nan, "rates": (1.0, math.inf)})
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": None, "rates": [1.0, None]}


def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    results.write_json_atomic(path, "before")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(RunError, match=re.escape(f"cannot write {path}: No space left")):
        results.write_json_atomic(path, "after")
    assert json.loads(path.read_text()) == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_jsonl_has_a_line_a_row(tmp_path: Path) -> None:
    results.write_jsonl_atomic(tmp_path / "s.jsonl", ({"i": i, "text": "a\nü"} for i in range(3)))
    lines = (tmp_path / "s.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["i"] for line in lines] == [0, 1, 2]


@pytest.mark.parametrize("name", ["../x", "", "A", "a/b", ".hidden", "a b", "a\n"])
def test_names_that_are_no_slug_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no valid name"):
        results.cell_dir(tmp_path, "pair", name, "abc")


def test_a_link_out_of_the_store_is_refused(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "pair").symlink_to(tmp_path)
    with pytest.raises(UserError, match="outside the store"):
        results.cell_dir(store, "pair", "sft", "abc")


def test_a_result_is_read_as_written(tmp_path: Path) -> None:
    result = example("sft", SCORES)
    folder = store_example(tmp_path, result)
    assert results.read_result(folder / "result.json") == result
    assert folder == tmp_path / "smol-mistral" / "sft" / result["id"]
    assert results.finished(folder) == result


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda text: text[: len(text) // 2], "EOF while parsing"),
        (lambda text: "", "EOF while parsing"),
        (lambda text: "[]", "an object"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "version"),
        (lambda text: text.replace('"status": "done"', '"status": "fine"'), "status"),
        (lambda text: text.replace("1.25", '"1.25"'), "scores.piqa.bpb"),
        (lambda text: text.replace('"cost"', '"costs"'), "cost: "),
    ],
)
def test_a_damaged_result_is_named(damage: Any, complaint: str, tmp_path: Path) -> None:
    path = store_example(tmp_path, example("sft", SCORES)) / "result.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=complaint) as caught:
        results.find(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_failed_cell_is_never_done(tmp_path: Path) -> None:
    folder = store_example(tmp_path, example("sft", SCORES, status="failed"))
    assert results.finished(folder) is None
    assert results.find(tmp_path) == {}
    assert list(results.find(tmp_path, status="failed")) == [folder]
    assert results.load(tmp_path).empty


def test_an_absent_cell_and_an_absent_store(tmp_path: Path) -> None:
    assert results.finished(tmp_path / "nowhere") is None
    assert results.find(tmp_path / "nowhere") == {}
    with pytest.raises(UserError, match=r"there is no store .*nowhere"):
        results.load(tmp_path / "nowhere")


def test_find_by_pair_and_method(tmp_path: Path) -> None:
    for pair in ("smol-mistral", "smol-short"):
        for method in ("sft", "bld"):
            store_example(tmp_path, example(method, SCORES, pair=pair))
    found = results.find(tmp_path, pair="smol-short").values()
    assert [result["spec"]["method"] for result in found] == ["bld", "sft"]
    assert len(results.find(tmp_path, method="bld")) == 2
    with pytest.raises(UserError, match="no valid name"):
        results.find(tmp_path, pair="../..")


def test_load_has_one_row_per_cell_task_and_metric(tmp_path: Path) -> None:
    store_example(tmp_path, example("sft", SCORES, budget=60_000))
    store_example(tmp_path, example("bld", {"piqa": {"acc": None}}, seed=3))
    frame = results.load(tmp_path)
    assert len(frame) == 3
    row = frame[(frame.method == "sft") & (frame.metric == "bpb")].iloc[0]
    assert (row["value"], row["stderr"], row.budget, row.limit) == (1.25, 0.01, 60_000, 24)
    assert (row.pair, row.corpus, row.train_seconds) == ("smol-mistral", "embedded", 100.0)
    assert math.isnan(frame[frame.seed == 3].iloc[0]["value"])


def test_load_names_rows_as_tables_do(tmp_path: Path) -> None:
    """Two learning rates are two rows, and a cell that states none has its pair's."""
    cells = {
        "bld[mixed]": example("bld", SCORES, options={"bytes": "mixed", "ce_weight": 1.0}),
        "bld[path]": example("bld", SCORES, options={"bytes": "path", "ce_weight": 1.0}),
        "gold (off-policy)": example("gold", SCORES, options={"ce_weight": 0.0}),
        "gold+ce (off-policy)": example("gold", SCORES, options={"ce_weight": 1.0}),
        "uld learning_rate=0.003": example("uld", SCORES, learning_rate=3e-3),
        "start": example("start", SCORES, learning_rate=3e-3),
    }
    for cell in cells.values():
        store_example(tmp_path, cell)
    frame = results.load(tmp_path)
    assert set(frame.row) == cells.keys()
    assert {row: result["id"] for row, result in cells.items()} == dict(
        zip(frame.row, frame.cell, strict=True)
    )
    tables = comparison(results.find(tmp_path), {})
    assert set(frame.row) - {"start"} <= {row.label for table in tables for row in table.rows}
    rates = dict(zip(frame.row, frame.learning_rate, strict=True))
    own = registry.load_pair("smol-mistral").learning_rate
    assert (rates["bld[path]"], rates["uld learning_rate=0.003"]) == (own, 3e-3)


def test_load_reads_runs_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_example(tmp_path / "runs", example("sft", SCORES))
    monkeypatch.chdir(tmp_path)
    assert results.load().equals(results.load(tmp_path / "runs"))
    assert len(results.load()) == sum(map(len, SCORES.values()))
