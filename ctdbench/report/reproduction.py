"""A paper's table beside ours: both scores, their difference, and whether it is within noise.

At the paper's scale the difference is ours - paper. At CPU scale, where models and tasks are
others, scores are not comparable: there it is the difference of the two gains, each counted from
its own table's base row. Within noise: its 95 % interval holds 0 (`reproduction_numbers`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ctdbench.recipes import Measure, Recipe, Scale, Setting, Source, told
from ctdbench.report import papers
from ctdbench.report.outcomes import Samples
from ctdbench.report.papers import PaperTable
from ctdbench.report.reproduction_numbers import (
    ESTIMATED,
    ONE_SOURCE,
    Measured,
    Number,
    minus,
    printed,
)
from ctdbench.results import Result

OURS_ONLY, OTHER_PROTOCOL = "°", "≠"
MARKS = {
    ESTIMATED: "the paper's standard error is estimated, binomial on the items of the task",
    OURS_ONLY: "the paper's standard error is not known, the noise is ours alone",
    OTHER_PROTOCOL: "the paper evaluates with another number of shots",
    ONE_SOURCE: "the paper's number was read in one place only",
}
TOLD: dict[Source, str] = {"paper": "Stated by the paper", "ours": "Our choice"}


@dataclass(frozen=True)
class Ours:
    """Our cells for a row, one a seed, and the base of their pair; or why there are none."""

    cells: tuple[Result, ...] = ()
    base: Result | None = None
    absent: str = ""
    failed: str = ""


@dataclass(frozen=True)
class Comparison:
    """A cell of the side by side. gains: the paper's and ours over the base row (CPU scale).

    difference: ours - paper, of scores or of gains.
    """

    paper: Number | None
    ours: Number | None
    gains: tuple[Number | None, Number | None] | None
    difference: Number | None = None
    marks: str = ""

    @property
    def margin(self) -> float | None:
        """How far the difference could lie from 0 and be noise: its interval's side towards 0."""
        found = self.difference
        if found is None or found.low is None or found.high is None:
            return None
        return found.value - found.low if found.value > 0 else found.high - found.value

    @property
    def within(self) -> bool | None:
        """Whether the difference is within noise; None where that is not known."""
        if self.difference is None or self.margin is None:
            return None
        return abs(self.difference.value) <= self.margin


@dataclass(frozen=True)
class Line:
    """A row: its group (setting), its name, and a comparison a column; or why ours is missing."""

    group: str
    name: str
    cells: tuple[Comparison, ...]
    absent: str
    failed: str


@dataclass(frozen=True)
class Reproduction:
    """A published table and ours."""

    title: str
    scale: Scale
    measures: tuple[Measure, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...]


def side_by_side(
    recipe: Recipe,
    scale: Scale,
    measures: Sequence[Measure],
    ours: Mapping[tuple[str, str], Ours],
    samples: Samples,
    setup: Iterable[str] = (),
) -> Reproduction:
    """The recipe's table, and nothing of another, beside ours by (setting, method).

    samples: of our cells. setup: notes on what ran here.
    """
    measured = Measured(samples)
    sides = _Sides(papers.read(recipe.paper, recipe.table), measured, scale)
    lines = []
    for setting in recipe.settings:
        for method in setting.rows:
            own = ours.get((setting.name, method), Ours())
            cells = (sides.compare(setting, method, measure, own) for measure in measures)
            lines.append(Line(setting.label, method, tuple(cells), own.absent, own.failed))
    measured.bootstraps.keep()
    notes = [*_scale_notes(scale), *setup, *recipe.notes]
    notes += [*(recipe.cpu_notes if scale == "cpu" else ()), *_column_notes(measures)]
    notes += [f"{line.group}, {line.name}: {line.absent}." for line in lines if line.absent]
    notes += [f"{line.group}, {line.name}: failed: {line.failed}" for line in lines if line.failed]
    notes += [*dict.fromkeys(samples.faults), *_legend(lines)]
    return Reproduction(_title(recipe, scale), scale, tuple(measures), tuple(lines), tuple(notes))


class _Sides(NamedTuple):
    """Where the numbers of both come from."""

    table: PaperTable
    measured: Measured
    scale: Scale

    def compare(self, setting: Setting, method: str, measure: Measure, own: Ours) -> Comparison:
        paper = printed(self.table, measure.column, setting.name, method)
        score = self.measured.score(own.cells, measure)
        if self.scale == "paper":
            return _difference(Comparison(paper, score, None), paper, score, measure)
        if (setting.name, method) == (setting.base.setting, setting.base.method):
            return Comparison(paper, score, (None, None))
        base = printed(self.table, measure.column, setting.base.setting, setting.base.method)
        own_base = (own.base,) if own.base else ()
        gains = minus(paper, base), self.measured.gain(own.cells, own_base, measure)
        return _difference(Comparison(paper, score, gains), *gains, measure)


def _difference(
    plain: Comparison, paper: Number | None, ours: Number | None, measure: Measure
) -> Comparison:
    """The comparison with the difference of the two numbers."""
    if paper is None or ours is None:
        return plain
    assert measure.column is not None
    assert measure.runs is not None
    exact = paper if paper.low is not None else paper._replace(low=paper.value, high=paper.value)
    marks = ESTIMATED * (ESTIMATED in paper.marks)
    marks += OURS_ONLY * (paper.low is None and ours.low is not None)
    marks += OTHER_PROTOCOL * (measure.column.shots not in (None, measure.runs.shots))
    return replace(plain, difference=minus(ours, exact), marks=marks)


def _title(recipe: Recipe, scale: Scale) -> str:
    table = f"{recipe.table} of {recipe.paper} (arXiv {recipe.arxiv}), {recipe.title}"
    if scale == "paper":
        return f"{recipe.name}: {table}; paper and ours"
    return (
        f"{recipe.name} at CPU scale: the design of {table}, on another, small model, so that our "
        "numbers cannot be compared with the paper's"
    )


def _scale_notes(scale: Scale) -> list[str]:
    if scale == "paper":
        return []
    return [
        "gain: over the base row of the same table. diff: our gain - the paper's, which tells "
        "whether a method helps or hurts alike on another model, and no more.",
    ]


def source_notes(recipe: Recipe, scale: Scale, here: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Which settings are the paper's, and which are ours; settings that agree come together.

    here: by setting, what is run in place of what the recipe states.
    """
    trained = [one for one in recipe.settings if any(row.method for row in one.rows.values())]
    notes = []
    for source, name in TOLD.items():
        labels: dict[str, list[str]] = {}
        for setting in trained:
            stated = recipe.stated(setting, training=scale == "paper")
            for line in told(stated, source, here.get(setting.name, {})):
                labels.setdefault(line, []).append(setting.label)
        lines: dict[str, list[str]] = {}
        for line, of in labels.items():
            where = "" if len(of) == len(trained) else f" ({', '.join(of)})"
            lines.setdefault(where, []).append(line)
        notes += [f"{name}{where}: {'; '.join(those)}." for where, those in lines.items()]
    rest = "ctdbench's default" if scale == "paper" else "ours: models, text, training"
    return [*notes, f"Everything else is {rest}."]


def _column_notes(measures: Iterable[Measure]) -> list[str]:
    """Remarks on columns; those that share one come together."""
    told: dict[str, list[str]] = {}
    for measure in measures:
        if measure.column and measure.note:
            told.setdefault(measure.note, []).append(measure.column.task)
    return [f"{', '.join(tasks)}: {note}." for note, tasks in told.items()]


def _legend(lines: Iterable[Line]) -> list[str]:
    used = {
        mark
        for line in lines
        for cell in line.cells
        for mark in cell.marks + (cell.paper.marks if cell.paper else "")
    }
    marks = [f"{mark} {meaning}" for mark, meaning in MARKS.items() if mark in used]
    rule = "noise: yes where the 95 % interval of diff holds 0; ±: its side towards 0"
    return ["; ".join([rule, *marks]) + "."]
