"""A paper's table beside ours: both scores, their difference, and whether it is within noise.

At the paper's scale the difference is ours - paper. At CPU scale, where models and tasks are
others, scores are not comparable: there it is the difference of the two gains, each counted from
its own table's base row. Within noise: at most 1.96 standard errors of the difference, with the
errors taken as independent. What a paper prints without an error has the binomial one of an
accuracy on the task's items, where their number is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import NamedTuple

from ctdbench.recipes import Column, Measure, OurTask, Recipe, Scale, Setting, Source
from ctdbench.report import papers
from ctdbench.report.papers import PaperTable, Reported
from ctdbench.report.tables import Column as ScoreColumn
from ctdbench.results import Result

NORMAL_95 = 1.96
PERCENT = 100  # our accuracies are shares, the papers' are per cent
ESTIMATED, OURS_ONLY, OTHER_PROTOCOL, ONE_SOURCE = "~", "°", "≠", "?"
MARKS = {
    ESTIMATED: "the paper's standard error is estimated, binomial on the items of the task",
    OURS_ONLY: "the paper's standard error is not known, the noise is ours alone",
    OTHER_PROTOCOL: "the paper evaluates with another number of shots",
    ONE_SOURCE: "the paper's number was read in one place only",
}
TOLD: dict[Source, str] = {"paper": "Stated by the paper", "ours": "Our choice"}


class Number(NamedTuple):
    """A score in the column's unit, and its standard error where it is known."""

    value: float
    stderr: float | None
    marks: str = ""


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

    difference: ours - paper, of scores or of gains. margin: of 95 %.
    """

    paper: Number | None
    ours: Number | None
    gains: tuple[Number | None, Number | None] | None
    difference: float | None = None
    margin: float | None = None
    marks: str = ""

    @property
    def within(self) -> bool | None:
        """Whether the difference is within noise; None where that is not known."""
        if self.difference is None or self.margin is None:
            return None
        return abs(self.difference) <= self.margin


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
    setup: Iterable[str] = (),
) -> Reproduction:
    """The recipe's table, and nothing of another, beside ours by (setting, method).

    setup: notes on what ran here.
    """
    table = papers.read(recipe.paper, recipe.table)
    lines = []
    for setting in recipe.settings:
        for method in setting.rows:
            own = ours.get((setting.name, method), Ours())
            cells = (_compare(table, setting, method, scale, one, own) for one in measures)
            lines.append(Line(setting.label, method, tuple(cells), own.absent, own.failed))
    notes = [*_scale_notes(scale), *source_notes(recipe, scale), *setup, *recipe.notes]
    notes += [*(recipe.cpu_notes if scale == "cpu" else ()), *_column_notes(measures)]
    notes += [f"{line.group}, {line.name}: {line.absent}." for line in lines if line.absent]
    notes += [f"{line.group}, {line.name}: failed: {line.failed}" for line in lines if line.failed]
    notes += _legend(lines)
    return Reproduction(_title(recipe, scale), scale, tuple(measures), tuple(lines), tuple(notes))


def _compare(
    table: PaperTable, setting: Setting, method: str, scale: Scale, measure: Measure, own: Ours
) -> Comparison:
    column, runs = measure.column, measure.runs
    paper = _paper(column, table, setting.name, method)
    score = _ours(own.cells, runs, PERCENT if column else 1)
    if scale == "paper":
        return _difference(Comparison(paper, score, None), paper, score, measure)
    if (setting.name, method) == (setting.base.setting, setting.base.method):
        return Comparison(paper, score, (None, None))
    base = _paper(column, table, setting.base.setting, setting.base.method)
    own_base = _ours((own.base,) if own.base else (), runs, PERCENT if column else 1)
    less = runs is not None and lower_is_better(runs)
    gains = _gain(paper, base), _gain(own_base, score) if less else _gain(score, own_base)
    return _difference(Comparison(paper, score, gains), *gains, measure)


def _paper(column: Column | None, table: PaperTable, setting: str, method: str) -> Number | None:
    if column is None:
        return None
    found = table.find(setting, method, column.task, column.metric)
    return None if found is None else _with_error(found, column)


def _with_error(found: Reported, column: Column) -> Number:
    doubt = ONE_SOURCE if found.provenance == "one-source" else ""
    if found.stderr is not None:
        return Number(found.value, found.stderr, doubt)
    if column.items is None or column.metric != "acc":
        return Number(found.value, None, doubt)
    share = found.value / PERCENT
    error = PERCENT * math.sqrt(share * (1 - share) / column.items)
    return Number(found.value, error, doubt + ESTIMATED)


def _ours(cells: Sequence[Result], runs: OurTask | None, unit: float) -> Number | None:
    """Mean over seeds. They share the items, so that averaging does not shrink those's error.

    The seeds' part of it is that of Student's t, scaled to the normal quantile that margins use.
    """
    if runs is None or not cells:
        return None
    values = [cell["scores"].get(runs.task, {}).get(runs.metric) for cell in cells]
    known = [unit * value for value in values if value is not None]
    if len(known) < len(cells):
        return None
    errors = [cell["stderr"].get(runs.task, {}).get(runs.metric) for cell in cells]
    squares = [(unit * error) ** 2 for error in errors if error is not None]
    if len(squares) < len(cells):
        return Number(fmean(known), None)
    seeds = 0.0
    if len(known) > 1:
        from ctdbench.report.statistics import critical

        widened = float(critical(1, len(known) - 1)) / NORMAL_95**2
        seeds = widened * variance(known) / len(known)
    return Number(fmean(known), math.sqrt(fmean(squares) + seeds))


def lower_is_better(task: OurTask) -> bool:
    """Whether less is better in our column."""
    return ScoreColumn(task.task, task.metric).lower_is_better


def _gain(score: Number | None, base: Number | None) -> Number | None:
    if score is None or base is None:
        return None
    marks = "".join(dict.fromkeys(score.marks + base.marks))
    return Number(score.value - base.value, _joint(score.stderr, base.stderr), marks)


def _joint(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else math.hypot(one, other)


def _difference(
    plain: Comparison, paper: Number | None, ours: Number | None, measure: Measure
) -> Comparison:
    """The comparison with the difference of the two numbers and its margin."""
    if paper is None or ours is None:
        return plain
    assert measure.column is not None
    assert measure.runs is not None
    marks = ESTIMATED * (ESTIMATED in paper.marks)
    marks += OURS_ONLY * (paper.stderr is None and ours.stderr is not None)
    marks += OTHER_PROTOCOL * (measure.column.shots not in (None, measure.runs.shots))
    error = None if ours.stderr is None else math.hypot(ours.stderr, paper.stderr or 0.0)
    return Comparison(
        plain.paper,
        plain.ours,
        plain.gains,
        difference=ours.value - paper.value,
        margin=None if error is None else NORMAL_95 * error,
        marks=marks,
    )


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


def source_notes(recipe: Recipe, scale: Scale) -> list[str]:
    """Which settings are the paper's, and which are ours; settings that agree come together."""
    trained = [one for one in recipe.settings if any(row.method for row in one.rows.values())]
    notes = []
    for source, name in TOLD.items():
        labels: dict[str, list[str]] = {}
        for setting in trained:
            for line in recipe.sources(setting, source, scale):
                labels.setdefault(line, []).append(setting.label)
        lines: dict[str, list[str]] = {}
        for line, of in labels.items():
            where = "" if len(of) == len(trained) else f" ({', '.join(of)})"
            lines.setdefault(where, []).append(line)
        notes += [f"{name}{where}: {'; '.join(told)}." for where, told in lines.items()]
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
    rule = f"noise: yes where the difference is at most {NORMAL_95} standard errors of it (±)"
    return ["; ".join([rule, *marks]) + "."]
