"""Figures of a table: that they show its numbers, all of them, and nothing else."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from example_figures import (
    ACC,
    BPB,
    STEP,
    WIDE_COLUMNS,
    drawn,
    line,
    logs,
    row,
    stored_table,
    table_of,
    words,
    write_log,
    xy,
)
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from ctdbench import results
from ctdbench.errors import UserError
from ctdbench.report import figures
from ctdbench.report.figures import style
from ctdbench.report.figures.cost import pareto_front
from ctdbench.report.figures.curves import running_mean
from ctdbench.report.figures.labels import place
from ctdbench.report.figures.ranks import _apart, average_ranks, cliques, critical_difference
from ctdbench.report.significance import Standing
from ctdbench.report.tables import Score, Table

Stored = tuple[Table, dict[str, Path]]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return stored_table(tmp_path_factory.mktemp("store"))


# What the figures of a table show


def test_scores_are_the_tables_points_and_intervals(
    stored: Stored,
) -> None:
    table, folders = stored
    figure = drawn(figures.FIGURES["scores"](table, folders))
    assert len(figure.axes) == len(table.columns) == 3
    for axes, column in zip(figure.axes, table.columns, strict=True):
        unit = 100 if column.metric.startswith(("acc", "exact")) else 1
        assert axes.get_title() == column.task
        better = "lower is better" if column.lower_is_better else "higher is better"
        assert column.metric in axes.get_xlabel()
        assert better in axes.get_xlabel()
        for height, table_row in enumerate(table.rows):
            score = table_row.scores[column]
            assert xy(line(axes, table_row.label)) == [(pytest.approx(unit * score.value), height)]
            ends = line(axes, f"_{table_row.label}").get_xdata()
            assert score.low is not None
            assert score.high is not None
            assert ends == pytest.approx([unit * score.low, unit * score.high])
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == [table_row.label for table_row in table.rows]
    low, high = figure.axes[0].get_ylim()
    assert low > high  # the first row is on top


def test_scores_mark_what_is_ranked_and_what_is_best(
    stored: Stored,
) -> None:
    table, folders = stored
    axes = drawn(figures.FIGURES["scores"](table, folders)).axes[0]
    for table_row in table.rows:
        face = to_hex(line(axes, table_row.label).get_markerfacecolor())
        assert (face == style.PAPER) == (table_row.method == "alm")
    stars = [found.get_ydata()[0] for found in axes.get_lines() if found.get_label() == "_best"]
    best = [i for i, r in enumerate(table.rows) if r.scores[table.columns[0]].best]
    assert stars == best
    assert best


def test_scores_of_teacher_and_start_run_through_the_rows_below_them() -> None:
    rows = [row("teacher", {BPB: 0.9}), row("start", {BPB: 1.4}), row("sft", {BPB: 1.0})]
    (axes,) = drawn(figures.FIGURES["scores"](table_of(rows, [BPB]), {})).axes
    upright = {
        (x[0], y[0])
        for x, y in (found.get_data() for found in axes.get_lines())
        if len(x) == 2 and x[0] == x[1] and y[1] > 2
    }
    assert upright == {(0.9, 0), (1.4, 1)}


def test_a_missing_score_is_not_drawn() -> None:
    rows = [row("sft", {BPB: 1.0, ACC: 0.5}), row("bld", {ACC: 0.5})]
    first, second = drawn(figures.FIGURES["scores"](table_of(rows), {})).axes
    assert "bld" not in [found.get_label() for found in first.get_lines()]
    assert "bld" in [found.get_label() for found in second.get_lines()]
    assert isinstance(figures.FIGURES["scores"](table_of(rows, []), {}), str)


def test_curves_are_bits_per_byte(tmp_path: Path) -> None:
    table = table_of([row("sft", {BPB: 1.0}), row("bld", {BPB: 1.0}, seeds=1)])
    figure = drawn(figures.FIGURES["curves"](table, logs(tmp_path, table)))
    (axes,) = figure.axes
    nat = 250 / (math.log(2) * STEP)
    assert line(axes, "bld").get_ydata() == pytest.approx(nat)
    assert line(axes, "sft").get_ydata() == pytest.approx(1.1 * nat)  # of seeds 1, 1.1 and 1.2
    assert line(axes, "sft").get_xdata()[[0, -1]] == pytest.approx([STEP, 100 * STEP])
    (band,) = axes.collections
    bounds = band.get_paths()[0].vertices[:, 1]
    assert [bounds.min(), bounds.max()] == pytest.approx([nat, 1.2 * nat])
    assert "running mean over 5%" in axes.get_ylabel()


def test_names_of_two_lines_cover_nothing(tmp_path: Path) -> None:
    long = [f"{name} learning_rate=0.0001" for name in ("gold (off-policy)", "bld[mixed]")]
    names = ["sft", "alm", "uld", *long]
    table = table_of([row(name, {BPB: 1.0}) for name in names])
    figure = drawn(figures.FIGURES["curves"](table, logs(tmp_path, table)))
    (axes,), (legend,) = figure.axes, figure.legends
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    axes, *_ = drawn(figures.FIGURES["scores"](table, {})).axes
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_points_lead_from_the_start_to_the_score(tmp_path: Path) -> None:
    rows = [row("start", {BPB: 3.0}, seeds=1), row("sft", {BPB: 1.0}), row("bld", {BPB: 0.5})]
    table = table_of(rows, [BPB, ACC])
    folders = logs(tmp_path, table)
    bare = results.read_result(folders["bld 1"] / results.RESULT)
    del bare["points"]
    results.write_json_atomic(folders["bld 1"] / results.RESULT, bare)
    figure = drawn(figures.FIGURES["points"](table, folders))
    (axes,) = figure.axes  # no row has an accuracy on the way
    assert [found.get_label() for found in axes.get_lines()] == ["sft"]
    expected = [(0, 3.0), (50 * STEP, pytest.approx(2.1)), (100 * STEP, 1.0)]
    assert xy(line(axes, "sft")) == expected
    (band,) = axes.collections
    bounds = band.get_paths()[0].vertices[:, 1]
    assert [bounds.min(), bounds.max()] == [1.0, 3.0]
    assert "on its way" in str(figures.FIGURES["points"](table, {}))


def test_curves_say_which_rows_they_leave_out(tmp_path: Path) -> None:
    table = table_of([row(name, {BPB: 1.0}, seeds=2) for name in ("sft", "bld", "uld", "alm")])
    folders = logs(tmp_path, table)
    write_log(folders["bld 1"], [None] * 10)
    (folders["uld 0"] / "metrics.jsonl").unlink()
    figure = drawn(figures.FIGURES["curves"](table, folders))
    shown = [found.get_label() for found in figure.axes[0].get_lines()]
    assert sorted(shown) == ["alm", "sft"]
    assert "No cross-entropy is logged of bld and uld." in words(figure)
    assert "metrics.jsonl" in str(figures.FIGURES["curves"](table, {}))


def test_curves_show_all_but_the_first_tenth_in_full(tmp_path: Path) -> None:
    table = table_of([row("sft", {BPB: 1.0}, seeds=1)])
    folders = {"sft 0": tmp_path}
    write_log(tmp_path, [50.0, *np.linspace(3, 1, 99)])
    figure = drawn(figures.FIGURES["curves"](table, folders))
    bits, (low, high) = line(figure.axes[0], "sft").get_ydata(), figure.axes[0].get_ylim()
    assert low < bits.min()
    assert bits[20:].max() < high < bits.max()
    assert "The first tenth of the text can lie above" in words(figure)


def test_a_broken_log_is_named(tmp_path: Path) -> None:
    table = table_of([row("sft", {BPB: 1.0}, seeds=1)])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1')
    with pytest.raises(UserError, match=r"metrics\.jsonl is no log"):
        figures.FIGURES["curves"](table, {"sft 0": tmp_path})


def test_the_running_mean_is_over_bytes_not_steps() -> None:
    draw = np.random.default_rng(0)
    sizes, bits = draw.integers(1, 50, 60), draw.uniform(0, 9, 60)
    ends = np.cumsum(sizes)
    found = running_mean(np.r_[0.0, ends], np.r_[0.0, np.cumsum(bits)], 100.0)
    for step, end in enumerate(ends):
        inside = [i for i in range(step + 1) if ends[i] - sizes[i] >= end - 100] or [step]
        assert found[step] == pytest.approx(bits[inside].sum() / sizes[inside].sum())


@pytest.mark.parametrize("lower", [True, False])
def test_the_front_is_what_nothing_dominates(lower: bool) -> None:
    draw, sign = random.Random(3), 1 if lower else -1
    for size in range(1, 30):
        points = {
            f"m{i}": (1.0 * draw.randint(1, 9), 1.0 * draw.randint(1, 9)) for i in range(size)
        }
        dominated = {
            label
            for (label, one), other in itertools.product(points.items(), points.values())
            if other != one and other[0] <= one[0] and sign * other[1] <= sign * one[1]
        }
        front = pareto_front(points, lower)
        assert set(front) == points.keys() - dominated
        assert front == sorted(front, key=lambda label: points[label][0])


def test_cost_steps_through_the_front() -> None:
    values = {"sft": (60, 1.2), "bld": (300, 1.0), "uld": (240, 1.3), "gold": (540, 0.9)}
    rows = [
        row(label, {BPB: score, ACC: 1 / score}, seconds=seconds)
        for label, (seconds, score) in values.items()
    ]
    figure = drawn(figures.FIGURES["cost"](table_of([row("start", {BPB: 2.0}), *rows]), {}))
    for axes, unit in zip(figure.axes, (1, 100), strict=True):
        assert axes.get_xlabel() == "CPU-minutes"
        assert axes.get_xscale() == "linear"
        own = {n: (t / 60, s if unit == 1 else 100 / s) for n, (t, s) in values.items()}
        for label, point in own.items():
            assert xy(line(axes, label)) == [pytest.approx(point)]
            ends = [0.95 * point[1], 1.1 * point[1]]
            assert line(axes, f"_{label}").get_ydata() == pytest.approx(ends)
        front = xy(line(axes, "_front"))
        assert front[:-1] == [pytest.approx(own[label]) for label in ("sft", "bld", "gold")]
        assert front[-1] == pytest.approx((axes.get_xlim()[1], own["gold"][1]))
        assert line(axes, "_front").get_drawstyle() == "steps-post"
        assert {text.get_text() for text in axes.texts} == {"sft", "bld", "gold"}


def test_cost_names_the_front_by_one_word_where_that_tells_rows_apart() -> None:
    values = {"sft": (60, 1.2), "uld learning_rate=1e-4": (120, 1.1)}
    values |= {"bld k=1": (300, 1.0), "bld k=2": (540, 0.9)}
    rows = [row(label, {BPB: score}, seconds=seconds) for label, (seconds, score) in values.items()]
    figure = drawn(figures.FIGURES["cost"](table_of(rows, [BPB]), {}))
    named = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(named) == ["bld k=1", "bld k=2", "sft", "uld"]


def test_cost_takes_a_log_axis_for_a_wide_span_and_one_kind_of_device() -> None:
    rows = [
        row("sft", {BPB: 1.0}, seconds=3600, device="GPU"),
        row("bld", {BPB: 0.9}, seconds=90_000, device="GPU"),
        row("uld", {BPB: 0.8}, device="CPU"),
        row("alm", {BPB: 0.8}, seconds=None),
    ]
    figure = drawn(figures.FIGURES["cost"](table_of(rows, [BPB]), {}))
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_xlabel()) == ("log", "GPU-hours")
    assert xy(line(axes, "bld"))[0][0] == pytest.approx(25)
    assert "No training time on this kind of device: uld and alm." in words(figure)
    assert isinstance(figures.FIGURES["cost"](table_of(rows[3:]), {}), str)


def test_labels_cover_neither_each_other_nor_points_nor_bars() -> None:
    draw = random.Random(1)
    axes = Figure((3, 2), dpi=100).subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    points = {f"method-{n}": (draw.random(), draw.random()) for n in range(40)}
    bars = [(x, y - 0.05, y + 0.05) for x, y in list(points.values())[:5]]
    left_out = place(axes, points, points, bars)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) + len(left_out) == len(points)
    assert left_out
    assert len(boxes) > 10
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    middles = axes.transData.transform(list(points.values()))
    assert not any(box.contains(*middle) for box in boxes for middle in middles)
    for x, low, high in bars:
        upright = Bbox(axes.transData.transform([(x, low), (x, high)]))
        assert not any(box.overlaps(upright) for box in boxes)


# The critical-difference diagram


def test_critical_differences_are_demsars() -> None:
    """Table 5a of Demšar (2006), q at 5 %, and his example: 4 methods on 14 data sets."""
    table = [1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164]
    for rows, quantile in enumerate(table, start=2):
        expected = quantile * math.sqrt(rows * (rows + 1) / (6 * 10))
        assert critical_difference(rows, 10) == pytest.approx(expected, abs=0.001)
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=0.005)


def test_cliques_are_the_longest_runs_within_the_distance() -> None:
    """Demšar's example: at 10 % the difference is 1.12, at 5 % it is 1.25."""
    averages = dict(zip("abcd", [1.964, 2.0, 2.893, 3.143], strict=True))
    every = [standing(0.0, averages)]
    assert cliques(_apart(averages, 1.12, every)) == [(0, 2), (2, 3)]
    assert cliques(_apart(averages, 1.25, every)) == [(0, 3)]
    assert cliques(_apart(averages, 0.01, every)) == []
    two = {"a": 1.0, "b": 2.0}  # as far apart as the critical difference: not tied
    assert cliques(_apart(two, 1.0, every)) == []


def standing(p: float, labels: Iterable[str]) -> Standing:
    """One in which every two rows have that p."""
    return Standing((), dict.fromkeys(itertools.permutations(labels, 2), p), p, 3)


def test_rows_that_no_task_tells_apart_are_joined_whatever_their_ranks() -> None:
    averages = dict(zip("abc", (1.0, 2.0, 3.0), strict=True))
    for p, bars in ((0.02, []), (0.03, [(0, 2)])):  # over two columns, 5 % are 2.5 % of each
        found = [standing(p, "abc"), standing(1.0, "abc"), None]
        assert cliques(_apart(averages, 0.5, found)) == bars
    some = replace(standing(1.0, "abc"), p={("a", "c"): 0.0, ("c", "a"): 0.0})
    assert cliques(_apart(averages, 0.5, [some])) == [(0, 1), (1, 2)]
    assert cliques(_apart(averages, 0.5, [None])) == [(0, 2)]
    close = replace(standing(1.0, "abc"), p={("a", "b"): 0.0, ("b", "a"): 0.0})
    assert cliques(_apart(averages, 0.5, [close])) == [(0, 2)]  # a and c are not told apart


def test_ranks_are_averaged_over_columns_in_the_direction_of_each() -> None:
    rows = [
        row("sft", {BPB: 1.0, ACC: 0.5}),
        row("bld", {BPB: 0.9, ACC: 0.7}),
        row("uld", {BPB: 1.1, ACC: 0.5}),
    ]
    assert average_ranks([BPB, ACC], rows) == {"bld": 1.0, "sft": 2.25, "uld": 2.75}


def test_ranks_leave_out_what_cannot_be_ranked() -> None:
    columns = WIDE_COLUMNS
    rows = [row(f"m{i}", dict.fromkeys(columns, 0.5 + 0.1 * i)) for i in range(4)]
    few = row("alm", dict.fromkeys(columns, 0.9), seeds=2)
    partial = row("kd", {BPB: 0.5})
    figure = drawn(figures.FIGURES["ranks"](table_of([*rows, few, partial], columns), {}))
    told = words(figure)
    assert "N = 5 tasks" in told
    assert "Not scored on every task: kd." in told
    assert "alm" not in told
    # bpb falls and the others rise with the score: ranks 1 + 4 * 4 over 5, and so on
    assert [f"m{i} ({rank:.2f})" in told for i, rank in enumerate((3.4, 2.8, 2.2, 1.6))] == [
        True
    ] * 4
    assert f"critical difference {critical_difference(4, 5):.2f}" in told
    bars = [found for found in figure.axes[0].get_lines() if found.get_label() == "_clique"]
    assert len(bars) == 1


def test_ranks_leave_out_tasks_where_every_row_guesses() -> None:
    columns = WIDE_COLUMNS[:4]
    rows = [row(f"m{i}", dict.fromkeys(columns, 0.5 + 0.1 * i)) for i in range(3)]

    def guessing(number: int) -> Table:
        scores = [dict(found.scores) for found in rows]
        for own in scores[:number]:
            own[columns[3]] = replace(own[columns[3]], floor=True)
        made = [replace(found, scores=own) for found, own in zip(rows, scores, strict=True)]
        return table_of(made, columns)

    told = words(drawn(figures.FIGURES["ranks"](guessing(3), {})))
    assert "N = 3 tasks" in told
    assert f"all rows guess there: {columns[3].task}." in " ".join(told.split())
    assert "N = 4 tasks" in words(drawn(figures.FIGURES["ranks"](guessing(2), {})))


@pytest.mark.parametrize(("rows", "seeds", "columns"), [(2, 3, 3), (3, 2, 3), (3, 3, 2)])
def test_too_little_gives_a_reason_and_no_diagram(rows: int, seeds: int, columns: int) -> None:
    some = WIDE_COLUMNS[:columns]
    made = [row(f"m{i}", dict.fromkeys(some, 0.5), seeds=seeds) for i in range(rows)]
    reason = figures.FIGURES["ranks"](table_of(made, some), {})
    assert "take 3 rows of 3 seeds and 3 tasks" in str(reason)


def test_rows_without_intervals_have_points_alone() -> None:
    bare = row("sft", {BPB: 1.0, ACC: 0.5})
    bare = replace(bare, scores={column: Score(s.value) for column, s in bare.scores.items()})
    figure = drawn(figures.FIGURES["scores"](table_of([bare]), {}))
    assert [found.get_label() for found in figure.axes[0].get_lines()] == ["sft"]
    assert "intervals" not in words(figure)
