"""Scores with their intervals: a panel a task, rows as in the table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ctdbench.report.figures import style
from ctdbench.report.figures.style import INK, Look, Mark
from ctdbench.report.significance import SEEDS_TO_RANK
from ctdbench.report.tables import Column, Row, Score, Table

ACROSS = 5  # panels beside each other
LINE = 0.11  # inches a line of a row's label


@style.styled
def scores(table: Table, folders: Mapping[str, Path]) -> Figure | str:
    """Points with 95 % intervals; the teachers' and the start's scores run through all rows."""
    if not table.columns:
        return "no task has a score"
    labels = [style.wrap(row.label, style.LABEL) for row in table.rows]
    height = LINE * len(labels) * (max(label.count("\n") for label in labels) + 1.4)
    figure, panels = style.panels(len(table.columns), ACROSS, height + 0.6, extra=0.25, sharey=True)
    figure.set_label(f"Scores with 95 % intervals, {table.title}")
    marks = style.marks(table)
    for axes, column in zip(panels, table.columns, strict=True):
        _panel(axes, table, column, marks)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].set_ylim(len(labels) - 0.4, -0.6)
    style.note(figure, _legend(table))
    return style.settle(figure)


def _panel(axes: Axes, table: Table, column: Column, marks: Mapping[str, Mark]) -> None:
    for line, row in enumerate(table.rows):
        if score := row.scores.get(column):
            if row.is_baseline:
                _reference_line(axes, style.shown(column, score.value), line, len(table.rows))
            _point(axes, line, row, column, score, marks[row.label])
    axes.set_title(style.wrap(column.task, 1.2, style.BASE))
    axes.set_xlabel(style.metric_name(column), fontsize=style.SMALL)
    axes.grid(axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.margins(x=0.08)
    left, right = axes.get_xlim()
    axes.set_xlim(left, right + 0.12 * (right - left))  # room for the stars


def _reference_line(axes: Axes, value: float, line: int, lines: int) -> None:
    """From the baseline's own row, whose label names it, down through all others."""
    axes.plot([value] * 2, [line, lines - 0.4], lw=0.8, color=style.GREY, ls=style.DASHES[2])


def _point(axes: Axes, line: int, row: Row, column: Column, score: Score, mark: Mark) -> None:
    if score.low is not None and score.high is not None:
        ends = [style.shown(column, end) for end in (score.low, score.high)]
        axes.plot(ends, [line] * 2, color=mark.colour, label=f"_{row.label}")
    hollow = style.too_few_seeds(row)
    axes.plot(style.shown(column, score.value), line, label=row.label, **style.point(mark, hollow))
    if score.best:
        star: Look = {"marker": "*", "markersize": 4.5, "color": INK, "markeredgewidth": 0}
        axes.plot(0.97, line, label="_best", transform=axes.get_yaxis_transform(), **star)


def _legend(table: Table) -> Iterator[str]:
    """Only of what the figure has."""
    scores = [score for row in table.rows for score in row.scores.values()]
    if any(score.low is not None for score in scores):
        yield "Bars: 95 % intervals."
    if any(row.is_baseline for row in table.rows):
        yield "Grey: teacher and start; dotted, their scores."
    if any(map(style.too_few_seeds, table.rows)):
        yield f"Open: fewer than {SEEDS_TO_RANK} seeds, not ranked."
    if any(score.best for score in scores):
        yield "Star: best, or not different from the best at 5 % in its task."
