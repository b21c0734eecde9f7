"""What finished cells say beside each other: one table for each group of cells that compare.

`grouping` says which cells compare. Cells that differ only by seed are averaged here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any

from ctdbench import results
from ctdbench.report import grouping
from ctdbench.results import Result
from ctdbench.spec import EvalSpec, TrainSpec, format_bytes

LOWER_IS_BETTER = ("bpb", "bits", "jsd", "perplexity", "word_perplexity", "byte_perplexity")
GAP_IN_STANDARD_ERRORS = 3
LEGEND = (
    "d: difference from start. gap: share of the way from start to teacher, "
    f"where that way is longer than {GAP_IN_STANDARD_ERRORS} standard errors. "
    "±: standard error of a score."
)


@dataclass(frozen=True)
class Column:
    """A task's headline metric."""

    task: str
    metric: str

    @property
    def lower_is_better(self) -> bool:
        """Whether less is better, as for bits per byte."""
        return self.metric.startswith(LOWER_IS_BETTER)


@dataclass(frozen=True)
class Score:
    """Mean over seeds, its standard error, and what it means beside the baselines.

    stderr: sampling error of the items (which seeds share) and spread of the seeds, together.
    delta: difference from start. share: of the start-to-teacher gap. None where it is not told.
    """

    value: float
    stderr: float | None = None
    delta: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class Row:
    """One method with one setting, over its seeds; or a baseline."""

    label: str
    method: str
    seeds: tuple[int, ...]
    options: Mapping[str, Any]
    train_seconds: float | None
    scores: Mapping[Column, Score]


@dataclass(frozen=True)
class Table:
    """Rows that compare: teacher, start, then the methods."""

    pair: str
    setting: Mapping[str, Any]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        """The pair, and every setting that is not the default one."""
        defaults = {**TrainSpec().identity(), **grouping.evaluation_setting(EvalSpec().identity())}
        shown = ("corpus", "budget", "limit", "tasks")
        changed = [
            f"{name} {value}"
            for name, value in self.setting.items()
            if name not in shown and value != defaults.get(name)
        ]
        limit = self.setting["limit"]
        parts = [f"{format_bytes(self.setting['budget'])} of {self.setting['corpus']} text"]
        parts += [f"{limit} items a task"] if limit else []
        return f"{self.pair}: {', '.join(parts + changed)}"


def comparison(cells: Iterable[Result], headline: Mapping[str, str] | None = None) -> list[Table]:
    """Tables of all cells given, those that failed only as notes.

    headline: the metric to show of a task; by default a task's first.
    """
    newest_last = sorted(cells, key=lambda result: str(result["provenance"].get("created", "")))
    baselines = [result for result in newest_last if grouping.is_baseline(result)]
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in newest_last:
        if not grouping.is_baseline(result):
            groups[grouping.group_key(result)].append(result)
    tables = [_table(group, baselines, headline or {}) for group in groups.values()]
    return sorted(tables, key=lambda table: table.title)


def _table(
    cells: Sequence[Result], baselines: Sequence[Result], headline: Mapping[str, str]
) -> Table:
    done = [result for result in cells if result["status"] == "done"]
    matching = [result for result in baselines if grouping.is_baseline_of(result, cells[0])]
    latest = {result["spec"]["method"]: result for result in matching if result["scores"]}
    columns = _columns([*latest.values(), *done], headline)
    means = {method: _means([result], columns) for method, result in latest.items()}
    expected = results.baselines(len(cells[0]["spec"]["pair"]["teachers"]))
    groups = [(method, [latest[method]]) for method in expected if method in latest]
    groups += sorted(
        grouping.variants(done).items(),
        key=lambda entry: (not entry[0].startswith("sft"), entry[0]),
    )
    rows = tuple(_row(label, group, columns, means) for label, group in groups)
    notes = _notes(cells, rows)
    return Table(
        pair=cells[0]["spec"]["pair"]["name"],
        setting={key: value for key, value in grouping.setting(cells[0]).items() if key != "pair"},
        columns=columns,
        rows=rows,
        notes=notes,
    )


def _columns(cells: Iterable[Result], headline: Mapping[str, str]) -> tuple[Column, ...]:
    columns: dict[str, Column] = {}
    for result in cells:
        for task, metrics in result["scores"].items():
            if metrics and task not in columns:
                wanted = headline.get(task, "")
                columns[task] = Column(task, wanted if wanted in metrics else next(iter(metrics)))
    return tuple(columns.values())


def _row(
    label: str,
    cells: Sequence[Result],
    columns: Iterable[Column],
    baselines: Mapping[str, Mapping[Column, Score]],
) -> Row:
    means = _means(cells, columns)
    method = cells[0]["spec"]["method"]
    if not results.is_baseline(method):
        means = {column: _beside(score, column, baselines) for column, score in means.items()}
    seconds = [time for cell in cells if (time := cell["cost"].get("train_seconds")) is not None]
    return Row(
        label=label,
        method=method,
        seeds=tuple(sorted(cell["spec"]["seed"] for cell in cells)),
        options=cells[0]["spec"]["options"],
        train_seconds=fmean(seconds) if seconds else None,
        scores=means,
    )


def _means(cells: Sequence[Result], columns: Iterable[Column]) -> dict[Column, Score]:
    means = {}
    for column in columns:
        values = [cell["scores"].get(column.task, {}).get(column.metric) for cell in cells]
        known = [value for value in values if value is not None]
        if known and len(known) == len(cells):
            errors = [cell["stderr"].get(column.task, {}).get(column.metric) for cell in cells]
            means[column] = Score(fmean(known), _stderr(known, errors))
    return means


def _stderr(values: Sequence[float], errors: Iterable[float | None]) -> float | None:
    """The seeds share their items, so averaging does not shrink the items' sampling error."""
    known = [error for error in errors if error is not None]
    if len(known) < len(values):
        return None
    seeds = variance(values) / len(values) if len(values) > 1 else 0.0
    return math.sqrt(fmean(error**2 for error in known) + seeds)


def _beside(score: Score, column: Column, baselines: Mapping[str, Mapping[Column, Score]]) -> Score:
    start = baselines.get("start", {}).get(column)
    if start is None:
        return score
    delta = score.value - start.value
    gap = _gap(start, baselines.get("teacher", {}).get(column), column)
    return Score(score.value, score.stderr, delta, delta / gap if gap else None)


def _gap(start: Score, teacher: Score | None, column: Column) -> float | None:
    """Teacher minus start, where the teacher is better by more than three standard errors."""
    if teacher is None or start.stderr is None or teacher.stderr is None:
        return None
    gap = teacher.value - start.value
    better = -gap if column.lower_is_better else gap
    noise = math.hypot(start.stderr, teacher.stderr)
    return gap if better > GAP_IN_STANDARD_ERRORS * noise else None


def _notes(cells: Sequence[Result], rows: Sequence[Row]) -> tuple[str, ...]:
    notes = [LEGEND]
    shown = {row.method for row in rows}
    expected = results.baselines(len(cells[0]["spec"]["pair"]["teachers"]))
    if absent := [name for name in expected if name not in shown]:
        notes.append(f"No {' and no '.join(absent)} was evaluated with these settings.")
    if any(len(row.seeds) == 1 and not results.is_baseline(row.method) for row in rows):
        notes.append("Rows of one seed: too few to rank.")
    notes += _corpus_note(cells[0]["spec"])
    notes += [f"{row.label}: {_options(row.options)}" for row in rows if row.options]
    failed = [cell for cell in cells if cell["status"] == "failed"]
    notes += [
        f"failed: {grouping.row_label(cell['spec'])} seed {cell['spec']['seed']}: {_reason(cell)}"
        for cell in failed
    ]
    return tuple(notes)


def _corpus_note(spec: Mapping[str, Any]) -> list[str]:
    if spec["train"]["corpus"] != "embedded":
        return []
    if grouping.is_teachers_text(spec):
        return ["The embedded corpus is the teacher's own text: sft is sequence-level KD here."]
    return ["The embedded corpus was written by SmolLM2-135M-Instruct, no teacher of this pair."]


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


def _reason(cell: Result) -> str:
    return cell["notes"][0] if cell["notes"] else "no reason recorded"
