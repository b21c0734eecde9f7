"""Finished cells beside each other: one table for each group of cells that compare.

`grouping` says which cells compare, `significance` what a table may claim. Cells that differ only
by seed make one row. Tests and intervals need the cells' stored outcomes; a row without them has
its score and nothing that would rest on them.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from ctdbench import registry, results
from ctdbench.registry import MethodInfo
from ctdbench.report import grouping, notes
from ctdbench.report.outcomes import Bootstraps, Samples
from ctdbench.report.tables import Column, Difference, Row, RowCost, Score, Table
from ctdbench.results import Result

if TYPE_CHECKING:
    from ctdbench.report.pairing import Comparison, Outcomes
    from ctdbench.report.significance import Share, Standing


def comparison(
    found: Mapping[Path, Result], headline: Mapping[str, str] | None = None
) -> list[Table]:
    """Tables of all cells found, by their folders; those that failed only as notes.

    headline: the metric to show of a task; by default a task's first.
    """
    newest_last = sorted(
        found.values(), key=lambda result: str(result["provenance"].get("created", ""))
    )
    baselines = [result for result in newest_last if grouping.is_baseline(result)]
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in newest_last:
        if not grouping.is_baseline(result):
            groups[grouping.group_key(result)].append(result)
    samples, bootstraps, known = Samples(found), Bootstraps(), registry.methods()
    tables = [
        _Group(cells, baselines, headline or {}, samples, bootstraps, known).table()
        for cells in groups.values()
    ]
    bootstraps.keep()
    return _numbered(sorted(tables, key=_order))


def _order(table: Table) -> tuple[str, str, int, str]:
    """By pair, then text, the smallest budget first."""
    return table.pair, table.setting["corpus"], table.setting["budget"], table.title


def _numbered(tables: Sequence[Table]) -> list[Table]:
    """Tables of one title (they differ in tasks' data, or in a part of the pair) get numbers."""
    seen: Counter[str] = Counter()
    numbered = []
    for table in tables:
        seen[table.title] += 1
        numbered.append(replace(table, number=seen[table.title]))
    return numbered


class _Group:
    """The cells of one table, by row and column."""

    def __init__(
        self,
        cells: Sequence[Result],
        baselines: Iterable[Result],
        headline: Mapping[str, str],
        samples: Samples,
        bootstraps: Bootstraps,
        known: Mapping[str, MethodInfo],
    ) -> None:
        self.cells, self.samples, self.bootstraps = cells, samples, bootstraps
        self.known = known
        self.done = [result for result in cells if result["status"] == "done"]
        matching = [result for result in baselines if grouping.is_baseline_of(result, cells[0])]
        latest = {result["spec"]["method"]: result for result in matching if result["scores"]}
        self.expected = results.baselines(len(cells[0]["spec"]["pair"]["teachers"]))
        self.columns = _columns([*latest.values(), *self.done], headline)
        trained = grouping.variants(self.done, known)
        self.reference = _reference(trained, latest)
        order = sorted(trained, key=lambda label: (label != self.reference, label))
        self.rows = {name: [latest[name]] for name in self.expected if name in latest}
        self.rows |= {label: trained[label] for label in order}

    def table(self) -> Table:
        rows = tuple(self._row(label, cells) for label, cells in self.rows.items())
        setting = grouping.setting(self.cells[0])
        return Table(
            pair=setting.pop("pair")["name"],
            setting=setting,
            columns=self.columns,
            rows=rows,
            reference=self.reference,
            standings=self.standings,
            notes=(*self._notes(rows), *self._without()),
        )

    def _notes(self, rows: Sequence[Row]) -> list[str]:
        return notes.of_table(self.cells, rows, self.expected, self.reference, self.known)

    def _without(self) -> list[str]:
        """Rows with a score that nothing is said of, and why where that is known."""
        missing = {
            column.task: [label for label in self.values[column] if label not in known]
            for column, known in self.outcomes.items()
        }
        told = [
            f"{task}: no outcomes to compare of {', '.join(labels)}."
            for task, labels in missing.items()
            if labels
        ]
        return told + list(dict.fromkeys(self.samples.faults))

    def _row(self, label: str, cells: Sequence[Result]) -> Row:
        return Row(
            label=label,
            method=cells[0]["spec"]["method"],
            seeds=tuple(cell["spec"]["seed"] for cell in cells),
            options=grouping.weighed(cells[0]),
            cells=tuple(cell["id"] for cell in cells),
            scores={c: self._score(label, c) for c in self.columns if label in self.values[c]},
            cost=None if label in self.expected else _cost(cells),
        )

    def _score(self, label: str, column: Column) -> Score:
        """A row's score with all that the outcomes of the table allow to say of it."""
        score = Score(self.values[column][label], delta=self.deltas.get((column, label)))
        own = self.outcomes[column].get(label)
        if own is None:
            return score
        from ctdbench.report.pairing import estimate

        interval = estimate(own, bootstrap=self.bootstraps)
        standing = self.standings.get(column)
        return replace(
            score,
            low=_finite(interval.low),
            high=_finite(interval.high),
            share=self._share(label, column),
            rank=standing.rank(label) if standing else None,
            floor=self._floor(label, column),
        )

    @cached_property
    def values(self) -> dict[Column, dict[str, float]]:
        """Means over seeds; a row that lacks a seed's number has none."""
        values: dict[Column, dict[str, float]] = {column: {} for column in self.columns}
        for column in self.columns:
            for label, cells in self.rows.items():
                known = [cell["scores"].get(column.task, {}).get(column.metric) for cell in cells]
                mean = _mean(known)
                if mean is not None:
                    values[column][label] = mean
        return values

    @cached_property
    def outcomes(self) -> dict[Column, dict[str, Outcomes]]:
        """By column and row, of the rows that have a score and samples."""
        read = {
            column: {
                label: self.samples.outcomes(self.rows[label], column.task, column.metric)
                for label in self.values[column]
            }
            for column in self.columns
        }
        return {
            column: _on_the_same_documents({k: o for k, o in rows.items() if o is not None})
            for column, rows in read.items()
        }

    @cached_property
    def standings(self) -> Mapping[Column, Standing]:
        """By column, of the rows that were trained; none where a row's outcomes are missing."""
        from ctdbench.report import significance

        trained = {
            column: {label: o for label, o in rows.items() if label not in self.expected}
            for column, rows in self.outcomes.items()
            if not self.values[column].keys() - rows.keys() - set(self.expected)
        }
        return significance.standings(trained, lambda column: column.lower_is_better)

    @cached_property
    def deltas(self) -> dict[tuple[Column, str], Difference]:
        """From the reference, of the rows that were trained; p-values adjusted over all of them."""
        plain = {
            (column, label): Difference(value - values[self.reference])
            for column, values in self.values.items()
            for label, value in values.items()
            if self.reference in values and label not in (self.reference, *self.expected)
        }
        return plain | self._tested(plain)

    def _tested(
        self, plain: Mapping[tuple[Column, str], Difference]
    ) -> dict[tuple[Column, str], Difference]:
        from ctdbench.report.pairing import compare_all
        from ctdbench.report.significance import holm

        reference = self.reference or ""
        pairs = {
            (column, label): (rows[label], rows[reference])
            for column, rows in self.outcomes.items()
            for label in rows
            if (column, label) in plain and reference in rows
        }
        found = compare_all(pairs.values(), bootstrap=self.bootstraps)
        tests = {
            key: test
            for key, test in zip(pairs, found, strict=True)
            # One seed is compared with one of the other's: another difference than is shown.
            if math.isclose(test.difference, plain[key].value, abs_tol=1e-9)
        }
        adjusted = holm([test.p for test in tests.values()]).tolist()
        return {
            key: _difference(test, p_holm)
            for (key, test), p_holm in zip(tests.items(), adjusted, strict=True)
        }

    def _share(self, label: str, column: Column) -> Share | None:
        from ctdbench.report.significance import gap_closed

        rows = self.outcomes[column]
        if label in self.expected or not {results.START, results.TEACHER} <= rows.keys():
            return None
        start, teacher = rows[results.START], rows[results.TEACHER]
        return gap_closed(rows[label], start, teacher, lower_is_better=column.lower_is_better)

    def _floor(self, label: str, column: Column) -> bool:
        from ctdbench.report.significance import above_chance
        from ctdbench.report.statistics import ALPHA

        if not column.metric.startswith("acc"):
            return False
        chance = self.samples.chance(self.rows[label][0], column.task)
        return chance is not None and above_chance(self.outcomes[column][label], chance) > ALPHA


def _reference(trained: Mapping[str, Sequence[Result]], baselines: Iterable[str]) -> str | None:
    """The `sft` row of most seeds, of several the plainest; else the start."""
    rows = [label for label, cells in trained.items() if cells[0]["spec"]["method"] == "sft"]
    if rows:
        return min(rows, key=lambda label: (-len(trained[label]), len(label)))
    return results.START if results.START in baselines else None


def _columns(cells: Iterable[Result], headline: Mapping[str, str]) -> tuple[Column, ...]:
    columns: dict[str, Column] = {}
    for result in cells:
        for task, metrics in result["scores"].items():
            if metrics and task not in columns:
                wanted = headline.get(task) or _stated_metric(result, task)
                columns[task] = Column(task, wanted if wanted in metrics else next(iter(metrics)))
    return tuple(columns.values())


def _stated_metric(result: Result, task: str) -> str:
    """The metric that a task of the user's own names as its first."""
    settings = result["provenance"].get("evaluation", {}).get("tasks", {})
    return str(settings.get(task, {}).get("metric", ""))


def _difference(test: Comparison, p_holm: float) -> Difference:
    from ctdbench.report.significance import SEEDS_TO_RANK
    from ctdbench.report.statistics import ALPHA

    claimed = p_holm <= ALPHA and test.seeds >= SEEDS_TO_RANK
    ends = _finite(test.low), _finite(test.high)
    return Difference(test.difference, *ends, test.p, p_holm, claimed)


def _finite(bound: float) -> float | None:
    """One document has no interval."""
    return bound if math.isfinite(bound) else None


def _on_the_same_documents(rows: Mapping[str, Outcomes]) -> dict[str, Outcomes]:
    """The rows on the documents that most of them are on."""
    documents = {label: frozenset(outcomes.ids) for label, outcomes in rows.items()}
    common = Counter(documents.values()).most_common(1)
    return {label: rows[label] for label, ids in documents.items() if ids == common[0][0]}


def _cost(cells: Sequence[Result]) -> RowCost:
    costs = [cell["cost"] for cell in cells]
    alike = len({_device(cell) for cell in cells}) == 1
    spent = [_device_seconds(cell) for cell in cells]
    return RowCost(
        device=_device(cells[0]),
        device_seconds=_mean(spent) if alike else None,
        seconds=_mean([cost.get("train_seconds") for cost in costs]),
        peak_memory_bytes=_mean([cost.get("peak_memory_bytes") for cost in costs]),
        text_bytes=_mean([cost.get("text_bytes") for cost in costs]),
        student_tokens=_mean([cost.get("student_tokens") for cost in costs]),
        teacher_tokens=_mean([cost.get("teacher_tokens") for cost in costs]),
        flops=_mean([cost.get("flops") for cost in costs]),
    )


def _device(cell: Result) -> str:
    return "GPU" if cell["provenance"].get("hardware", {}).get("gpus") else "CPU"


def _device_seconds(cell: Result) -> float | None:
    """Of all GPUs, one a process; else processor time, which what runs beside does not add to.

    Before that was measured: of all cores that the threads could use.
    """
    cost, processes = cell["cost"], cell["cost"].get("processes", 1)
    seconds = cost.get("train_seconds")
    if _device(cell) == "CPU":
        threads = cell["provenance"].get("hardware", {}).get("threads", 1)
        elapsed = None if seconds is None else seconds * threads
        seconds = cost.get("cpu_seconds", elapsed)
    return None if seconds is None else seconds * processes


def _mean(values: Sequence[float | None]) -> float | None:
    """None where any value is missing: a mean over fewer seeds would be of another row."""
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None
