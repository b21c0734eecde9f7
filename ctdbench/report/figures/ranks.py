"""The critical-difference diagram of Demšar (2006): average ranks over tasks, and what ties."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ctdbench.report.figures import style
from ctdbench.report.figures.style import INK
from ctdbench.report.significance import SEEDS_TO_RANK, Standing, told_apart
from ctdbench.report.statistics import ALPHA
from ctdbench.report.tables import Column, Row, Table

FEWEST = 3  # rows, and columns
# Inches: where the critical difference and the axis are; a label, a bar, a gap; the axis at least.
CRITICAL, AXIS = 0.22, 0.5
LINE, BAR, GAP, SHORTEST = 0.13, 0.07, 0.08, 1.2


@style.styled
def ranks(table: Table, folders: Mapping[str, Path]) -> Figure | str:
    """Ranks of the rows with seeds enough, averaged over tasks; 1 is the best.

    Not over tasks where every one of them is guessing: their order there is chance.
    """
    eligible = [row for row in table.rows if not row.is_baseline and not style.too_few_seeds(row)]
    guessed = [column for column in table.columns if _all_guess(eligible, column)]
    columns = [column for column in table.columns if column not in guessed]
    rows = [row for row in eligible if row.scores.keys() >= set(columns)]
    if len(rows) < FEWEST or len(columns) < FEWEST:
        return (
            f"average ranks take {FEWEST} rows of {SEEDS_TO_RANK} seeds and {FEWEST} tasks that "
            f"are not guessed; here are {len(rows)} such rows with all of {len(columns)} tasks"
        )
    averages = average_ranks(columns, rows)
    distance = critical_difference(len(rows), len(columns))
    bars = cliques(_apart(averages, distance, [table.standings.get(c) for c in columns]))
    absent = [row.label for row in eligible if row not in rows]
    remarks = _remarks(len(columns), absent, [column.task for column in guessed])
    figure = _Diagram(averages, distance, bars, remarks).draw()
    figure.set_label(f"Average ranks with Nemenyi's critical difference, {table.title}")
    return figure


def _all_guess(rows: Sequence[Row], column: Column) -> bool:
    scores = [row.scores[column] for row in rows if column in row.scores]
    return bool(scores) and all(score.floor for score in scores)


def average_ranks(columns: Sequence[Column], rows: Sequence[Row]) -> dict[str, float]:
    """By label, best first: 1 for a row that is the best in every column; ties share ranks."""
    from scipy.stats import rankdata

    signs = [1 if column.lower_is_better else -1 for column in columns]
    values = np.array([[row.scores[column].value for column in columns] for row in rows])
    average = rankdata(values * signs, axis=0).mean(1).tolist()
    found = dict(zip((row.label for row in rows), average, strict=True))
    return dict(sorted(found.items(), key=lambda item: item[1]))


def critical_difference(rows: int, columns: int) -> float:
    """Average ranks that differ by less are not told apart by Nemenyi's test at 5 %."""
    from scipy.stats import studentized_range

    quantile = studentized_range.ppf(1 - ALPHA, rows, math.inf) / math.sqrt(2)
    return float(quantile * math.sqrt(rows * (rows + 1) / (6 * columns)))


def _apart(
    averages: Mapping[str, float], distance: float, standings: Sequence[Standing | None]
) -> NDArray[np.bool_]:
    """Which rows are told apart, [k, k]: by their ranks' distance and by a task.

    Nemenyi's test takes tasks for independent. They share texts and seeds, so that it alone would
    tell equal rows apart in two fifths of some tables; the tasks' own tests do not assume it. A
    task may tell close rows apart and not distant ones (of noisier seeds); bars join neighbours, so
    two rows are apart only if all pairs of rows beyond them are, too.
    """
    ranks, known = list(averages.values()), [found for found in standings if found]
    by_task = [[told_apart(known, a, b) for b in averages] for a in averages]
    told = (np.abs(np.subtract.outer(ranks, ranks)) >= distance) & np.array(by_task)
    apart = np.zeros_like(told)
    for first, last in combinations(range(len(ranks)), 2):
        apart[first, last] = apart[last, first] = told[: first + 1, last:].all()
    return apart


def cliques(apart: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """First and last index of every longest run of sorted rows of which no two are told apart.

    apart: [k, k], whether two rows are.
    """
    runs: list[tuple[int, int]] = []
    for first in range(len(apart)):
        last = first
        while last + 1 < len(apart) and not apart[first : last + 1, last + 1].any():
            last += 1
        if last > first and (not runs or last > runs[-1][1]):
            runs.append((first, last))
    return runs


def _remarks(columns: int, absent: Sequence[str], guessed: Sequence[str]) -> str:
    told = (
        f"Average rank over N = {columns} tasks; 1 is the best. Bars join rows that are not told "
        f"apart. That takes Nemenyi's critical difference, for which tasks are independent, and "
        f"one of the tasks' own tests, both at 5 %."
    )
    told += f" Not in it, for all rows guess there: {style.listed(guessed)}." if guessed else ""
    return told + (f" Not scored on every task: {style.listed(absent)}." if absent else "")


class _Diagram:
    """The axis on top, the bars below it, then the labels, the better half on the left.

    All is placed in inches from the top left corner.
    """

    def __init__(
        self,
        averages: Mapping[str, float],
        distance: float,
        bars: Sequence[tuple[int, int]],
        remarks: str,
    ) -> None:
        self.ranks, self.distance, self.bars = list(averages.values()), distance, bars
        self.texts = [f"{label} ({rank:.2f})" for label, rank in averages.items()]
        self.half = math.ceil(len(self.texts) / 2)
        sides = (self.texts[: self.half], self.texts[self.half :])
        left, right = (max(map(style.text_width, side)) + 2 * GAP for side in sides)
        width = style.COLUMN if left + SHORTEST + right <= style.COLUMN else style.PAGE
        self.left, self.right = left, width - right
        self.labels_from = AXIS + GAP + BAR * (len(self.bars) + 1)
        note = style.wrap(remarks, width)
        below = self.labels_from + LINE * self.half + GAP
        height = below + LINE * (note.count("\n") + 1)
        self.figure = Figure((width, height))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.set_axis_off()
        self._text(GAP / 2, below, note, va="top")

    def draw(self) -> Figure:
        self._axis()
        for number, (first, last) in enumerate(self.bars, start=1):
            ends = self._x(self.ranks[first]) - 0.03, self._x(self.ranks[last]) + 0.03
            self._line(ends, [AXIS + BAR * number] * 2, lw=2.2, label="_clique")
        for number in range(len(self.texts)):
            self._row(number)
        return self.figure

    def _axis(self) -> None:
        count = len(self.ranks)
        self._line((self.left, self.right), (AXIS, AXIS))
        for rank in range(1, count + 1):
            self._line([self._x(rank)] * 2, (AXIS - 0.04, AXIS))
            if (rank - 1) % math.ceil(count / 8) == 0:
                self._text(self._x(rank), AXIS - 0.06, str(rank), ha="center", va="bottom")
        ends = self._x(1), self._x(1 + self.distance)
        self._line(ends, (CRITICAL, CRITICAL), marker="|", label="_critical")
        middle, text = sum(ends) / 2, f"critical difference {self.distance:.2f}"
        self._text(middle, CRITICAL - 0.05, text, ha="center", va="bottom")

    def _row(self, number: int) -> None:
        """A line from the rank down and out to the label; those further out are further up."""
        on_left = number < self.half
        line = number if on_left else len(self.texts) - 1 - number
        x, y = self._x(self.ranks[number]), self.labels_from + LINE * (line + 0.5)
        end, side = (self.left, -1) if on_left else (self.right, 1)
        self._line((x, x, end + side * GAP / 2), (AXIS, y, y), lw=0.6)
        align = "right" if on_left else "left"
        self._text(end + side * GAP, y, self.texts[number], ha=align, va="center")

    def _x(self, rank: float) -> float:
        return self.left + (rank - 1) / (len(self.ranks) - 1) * (self.right - self.left)

    def _line(self, x: Sequence[float], y: Sequence[float], **look: Any) -> None:
        shape = {"color": INK, "lw": 0.8, "solid_capstyle": "butt"}
        self.axes.plot(x, y, **{**shape, **look})

    def _text(self, x: float, y: float, text: str, **look: Any) -> None:
        self.axes.text(x, y, text, fontsize=style.SMALL, **look)
