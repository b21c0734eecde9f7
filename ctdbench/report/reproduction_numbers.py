"""The numbers of a paper's table and ours, each with its 95 % interval where that is known.

Our intervals are those of every other table (`pairing`). A number that a paper prints has its
printed standard error, or else the binomial one of an accuracy on the task's items, where their
number is known. Numbers that share no outcomes are taken as independent: the interval of their
difference is Newcombe's (1998), the square-and-add of both. Where they are of the same items, as
two rows of a paper are, it is wider than it need be: how they vary together is not printed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from ctdbench.recipes import Column, Measure, OurTask
from ctdbench.report.outcomes import Bootstraps, Samples
from ctdbench.report.papers import PaperTable, Reported
from ctdbench.report.tables import Column as ScoreColumn
from ctdbench.results import Result

if TYPE_CHECKING:
    from ctdbench.report.pairing import Outcomes

NORMAL_95 = 1.96
PERCENT = 100  # our accuracies are shares, the papers' are per cent
ESTIMATED, ONE_SOURCE = "~", "?"


class Number(NamedTuple):
    """A score or a difference in the column's unit, and its 95 % interval; None: not known."""

    value: float
    low: float | None = None
    high: float | None = None
    marks: str = ""


def printed(table: PaperTable, column: Column | None, setting: str, method: str) -> Number | None:
    """The paper's; None where it could not be read."""
    if column is None:
        return None
    found = table.find(setting, method, column.task, column.metric)
    return None if found is None else _with_error(found, column)


def minus(a: Number | None, b: Number | None) -> Number | None:
    """The difference of two independent numbers."""
    if a is None or b is None:
        return None
    value, marks = a.value - b.value, "".join(dict.fromkeys(a.marks + b.marks))
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return Number(value, marks=marks)
    low = value - math.hypot(a.value - a.low, b.high - b.value)
    high = value + math.hypot(a.high - a.value, b.value - b.low)
    return Number(value, low, high, marks)


def lower_is_better(task: OurTask) -> bool:
    """Whether less is better in our column."""
    return ScoreColumn(task.task, task.metric).lower_is_better


class Measured:
    """Our numbers: means over the seeds of a row, tested on the outcomes that its cells stored."""

    def __init__(self, samples: Samples) -> None:
        self.samples, self.bootstraps = samples, Bootstraps()

    def score(self, cells: Sequence[Result], measure: Measure) -> Number | None:
        """None where a cell lacks the score; without an interval where it lacks outcomes."""
        from ctdbench.report.pairing import estimate

        value = _mean(cells, measure.runs)
        own = self._outcomes(cells, measure.runs)
        if value is None or own is None:
            return None if value is None else _scaled(measure, value)
        found = estimate(own, bootstrap=self.bootstraps)
        return _scaled(measure, value, found.low, found.high)

    def gain(
        self, cells: Sequence[Result], base: Sequence[Result], measure: Measure
    ) -> Number | None:
        """How much better than the base, tested as a difference in any table is."""
        from ctdbench.report.pairing import compare

        value, level = _mean(cells, measure.runs), _mean(base, measure.runs)
        if measure.runs is None or value is None or level is None:
            return None
        sign = -1 if lower_is_better(measure.runs) else 1
        own, other = (self._outcomes(side, measure.runs) for side in (cells, base))
        if own is None or other is None or {*own.ids} != {*other.ids}:
            return _scaled(measure, sign * (value - level))
        found = compare(own, other, bootstrap=self.bootstraps)
        ends = sorted((sign * found.low, sign * found.high))
        return _scaled(measure, sign * found.difference, *ends)

    def _outcomes(self, cells: Sequence[Result], runs: OurTask | None) -> Outcomes | None:
        return self.samples.outcomes(cells, runs.task, runs.metric) if runs and cells else None


def _with_error(found: Reported, column: Column) -> Number:
    marks, error = ONE_SOURCE * (found.provenance == "one-source"), found.stderr
    if error is None and column.items is not None and column.metric == "acc":
        share = found.value / PERCENT
        error, marks = PERCENT * math.sqrt(share * (1 - share) / column.items), marks + ESTIMATED
    if error is None:
        return Number(found.value, marks=marks)
    half = NORMAL_95 * error
    return Number(found.value, found.value - half, found.value + half, marks)


def _mean(cells: Sequence[Result], runs: OurTask | None) -> float | None:
    if runs is None or not cells:
        return None
    values = [cell["scores"].get(runs.task, {}).get(runs.metric) for cell in cells]
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(cells) else None


def _scaled(
    measure: Measure, value: float, low: float = -math.inf, high: float = math.inf
) -> Number:
    """In the unit of the column; one document has no interval."""
    unit = PERCENT if measure.column else 1
    if not math.isfinite(low):
        return Number(unit * value)
    return Number(unit * value, unit * low, unit * high)
