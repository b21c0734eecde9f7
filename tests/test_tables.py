"""Tables: what is averaged, what is kept apart, and what is not claimed."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

import pytest
from example_results import example
from hypothesis import given, settings
from hypothesis import strategies as st

from ctdbench import report
from ctdbench.errors import UserError
from ctdbench.report import Column, Score, Table
from ctdbench.results import Result

BPB = Column("bpb_heldout", "bpb")


def bpb(value: float | None) -> dict[str, dict[str, float | None]]:
    return {"bpb_heldout": {"bpb": value}}


def baselines(start: float = 1.4, teacher: float = 1.0, **settings: Any) -> list[Result]:
    return [
        example("start", bpb(start), **settings),
        example("teacher", bpb(teacher), **settings),
    ]


def only(results: list[Result], headline: dict[str, str] | None = None) -> Table:
    (table,) = report.comparison(results, headline)
    return table


def scores(table: Table, column: Column = BPB) -> dict[str, Score]:
    return {row.label: row.scores[column] for row in table.rows}


def test_rows_come_as_teacher_start_sft_then_the_others() -> None:
    table = only([*(example(m, bpb(1.2)) for m in ("uld", "bld", "sft")), *baselines()])
    assert [row.method for row in table.rows] == ["teacher", "start", "sft", "bld", "uld"]


def test_delta_and_share_beside_the_baselines() -> None:
    score = scores(only([example("bld", bpb(1.1)), *baselines()]))["bld"]
    assert score.delta == pytest.approx(-0.3)
    assert score.share == pytest.approx(0.75)


@settings(max_examples=50, deadline=None)
@given(
    start=st.floats(0.1, 3), teacher=st.floats(0.1, 3), own=st.floats(0.1, 3), se=st.floats(0, 0.5)
)
def test_no_share_of_a_gap_within_three_standard_errors(
    start: float, teacher: float, own: float, se: float
) -> None:
    cells = [example("bld", bpb(own)), *baselines(start, teacher, stderr=se)]
    score = scores(only(cells))["bld"]
    if start - teacher > 3 * math.sqrt(2) * se:
        assert score.share == pytest.approx((own - start) / (teacher - start))
    else:  # also where the teacher is no better than the start
        assert score.share is None
    assert score.delta == pytest.approx(own - start)


def test_a_teacher_that_is_ahead_counts_upwards_for_accuracy() -> None:
    values = {"start": 0.5, "teacher": 0.9, "bld": 0.6}
    cells = [example(name, {"piqa": {"acc": value}}) for name, value in values.items()]
    share = scores(only(cells), Column("piqa", "acc"))["bld"].share
    assert share == pytest.approx(0.25)


def test_seeds_are_averaged_and_counted_and_do_not_shrink_the_items_error() -> None:
    cells = [example("bld", bpb(value), seed=seed) for seed, value in enumerate((1.1, 1.2, 1.3))]
    (row,) = only(cells).rows
    assert row.seeds == (0, 1, 2)
    assert row.scores[BPB].value == pytest.approx(1.2)
    assert row.scores[BPB].stderr == pytest.approx(math.sqrt(0.01**2 + 0.1**2 / 3))
    assert "bld (3 seeds)" in report.render([only(cells)], "terminal")


def test_cells_that_do_not_compare_have_tables_of_their_own() -> None:
    cells = [
        example("bld", bpb(1.0)),
        example("bld", bpb(1.1), budget=60_000),
        example("bld", bpb(1.2), corpus="gsm8k"),
        example("bld", bpb(1.3), limit=None),
        example("bld", bpb(1.4), pair="smol-gemma"),
        example("bld", bpb(1.5), batch_documents=8),
        example("bld", bpb(1.6), content={"corpus": "another text"}),
    ]
    tables = report.comparison(cells)
    assert sorted(len(table.rows) for table in tables) == [1] * len(cells)
    assert len({scores(table)["bld"].value for table in tables}) == len(cells)


def test_runtime_settings_do_not_keep_cells_apart() -> None:
    cells = [example("bld", bpb(1.0), block_rows=8), example("sft", bpb(1.1), block_rows=64)]
    assert len(only(cells).rows) == 2


def test_rows_of_one_method_are_told_apart_by_what_differs() -> None:
    common = {"ce_weight": 1.0}
    cells = [
        example("uld", bpb(1.0), options={**common, "alignment": "positions"}),
        example("uld", bpb(1.1), options={**common, "alignment": "chunks"}),
        example("bld", bpb(1.2), options=common, learning_rate=3e-4),
    ]
    labels = {row.label for row in only(cells).rows}
    assert labels == {"uld alignment=positions", "uld alignment=chunks", "bld learning_rate=0.0003"}


def test_the_newest_cell_of_a_seed_counts() -> None:
    """The same request has two cells when the method's code has changed in between."""
    old = example("bld", bpb(1.0), created="2026-01-01", content={"method": "a"})
    new = example("bld", bpb(2.0), created="2026-01-02", content={"method": "b"})
    (row,) = only([new, old]).rows
    assert (row.seeds, row.scores[BPB].value) == ((0,), 2.0)


def test_baselines_serve_every_budget_but_not_another_text_or_limit() -> None:
    cells = [example("bld", bpb(1.0), budget=size) for size in (60_000, 90_000)]
    for table in report.comparison([*cells, *baselines()]):
        assert [row.method for row in table.rows] == ["teacher", "start", "bld"]
    others = [*baselines(limit=3), *baselines(corpus="gsm8k"), *baselines(pair="smol-short")]
    table = only([cells[0], *others, *baselines(content={"corpus": "b"})[:0]])
    assert [row.method for row in table.rows] == ["bld"]
    assert "No teacher and no start was evaluated with these settings." in table.notes
    stale = baselines(content={"tasks": "old"})
    assert len(only([example("bld", bpb(1.0), content={"tasks": "new"}), *stale]).rows) == 1


def test_comparable_keeps_the_cells_of_one_table() -> None:
    cell = example("bld", bpb(1.0))
    cells = [cell, example("sft", bpb(1.0)), example("sft", bpb(1.0), budget=60_000), *baselines()]
    kept = [result["spec"]["method"] for result in report.comparable(cell, cells)]
    assert kept == ["bld", "sft", "start", "teacher"]


def test_sft_on_the_teachers_own_text_says_what_it_is() -> None:
    note = "sft is sequence-level KD here"
    table = only([example("sft", bpb(1.0))])
    assert table.rows[0].label == "sft (seqkd)"
    assert any(note in line for line in table.notes)
    for other in ({"corpus": "gsm8k"}, {"pair": "smol-gemma"}):
        table = only([example("sft", bpb(1.0), **other)])
        assert table.rows[0].label == "sft"
        assert not any(note in line for line in table.notes)


def test_failed_cells_are_told_and_have_no_row() -> None:
    table = only([example("bld", bpb(1.0), status="failed"), example("sft", bpb(1.0))])
    assert [row.method for row in table.rows] == ["sft"]
    assert "failed: bld seed 0: loss is not finite at step 3" in table.notes


def test_a_score_that_is_missing_is_not_invented() -> None:
    cells = [example("bld", bpb(None)), example("sft", bpb(1.1)), *baselines()]
    table = only(cells)
    assert BPB not in next(row for row in table.rows if row.method == "bld").scores
    line = next(li for li in report.render([table], "terminal").splitlines() if li[:3] == "bld")
    assert line.split() == ["bld", "–"]


def test_the_headline_metric_is_the_one_asked_for() -> None:
    cells = [example("bld", {"piqa": {"acc": 0.5, "acc_bytes": 0.6}})]
    assert only(cells).columns == (Column("piqa", "acc"),)
    assert only(cells, {"piqa": "acc_bytes"}).columns == (Column("piqa", "acc_bytes"),)
    assert only(cells, {"piqa": "f1"}).columns == (Column("piqa", "acc"),)


def test_one_seed_has_no_rank() -> None:
    assert "Rows of one seed: too few to rank." in only([example("bld", bpb(1.0))]).notes


@pytest.fixture
def wide() -> list[Table]:
    tasks = [f"task_number_{i}" for i in range(9)]
    values = {"start": 0.2, "teacher": 0.9, "sft": 0.5, "bld": 0.55}
    return report.comparison(
        example(name, {task: {"acc": value} for task in tasks}) for name, value in values.items()
    )


def test_terminal_tables_fit_and_show_every_task(wide: list[Table]) -> None:
    text = report.render(wide, "terminal")
    assert max(map(len, text.splitlines())) <= 118
    assert all(f"task_number_{i}" in text for i in range(9))
    assert text.count("\nbld ") >= 2
    assert "acc % ↑" in text
    assert "55.0 +35.0 50%" in text


def test_a_share_just_below_nothing_has_no_sign() -> None:
    text = report.render([only([example("bld", bpb(1.4008)), *baselines()])], "terminal")
    line = next(li for li in text.splitlines() if li.startswith("bld"))
    assert line.split() == ["bld", "1.401", "+0.001", "0%"]


def test_markdown_has_errors_and_a_cell_a_column(wide: list[Table]) -> None:
    lines = [li for li in report.render(wide, "markdown").splitlines() if li.startswith("|")]
    assert {line.count("|") for line in lines} == {11}
    assert "55.0 ± 1.0 (+35.0, 50%)" in lines[-1]


def test_csv_and_json_hold_the_same_numbers(wide: list[Table]) -> None:
    rows = list(csv.DictReader(io.StringIO(report.render(wide, "csv"))))
    (table,) = json.loads(report.render(wide, "json"))
    assert len(rows) == len(table["scores"]) == 4 * 9
    assert [float(row["value"]) for row in rows] == [row["value"] for row in table["scores"]]
    assert table["setting"]["limit"] == 24


def test_an_unknown_format_is_a_bad_request() -> None:
    with pytest.raises(UserError, match="did you mean markdown"):
        report.render([], "markdwon")
