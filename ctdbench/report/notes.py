"""What is said below a table: its marks, what it lacks, and how its rows differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ctdbench.labels import is_teachers_text, row_label
from ctdbench.registry import MethodInfo
from ctdbench.report.grouping import trained_in
from ctdbench.report.tables import Row
from ctdbench.results import Result


def of_table(
    cells: Sequence[Result],
    rows: Sequence[Row],
    expected: Iterable[str],
    reference: str | None,
    known: Mapping[str, MethodInfo],
) -> list[str]:
    """The notes of a table of these cells, those that failed too.

    expected: names of the pair's baselines. reference: label of the row that differences are from.
    known: `registry.methods()`.
    """
    notes = _legend(rows, reference)
    shown = {row.method for row in rows}
    if absent := [name for name in expected if name not in shown]:
        notes.append(f"No {' and no '.join(absent)} was evaluated with these settings.")
    notes += _seeds_note(rows)
    notes += _corpus_note(cells[0]["spec"])
    notes += _options(rows)
    notes += _precisions(cells, known)
    for cell in cells:
        if cell["status"] == "failed":
            label, seed = row_label(cell["spec"], known), cell["spec"]["seed"]
            notes.append(f"failed: {label} seed {seed}: {_reason(cell)}")
    return notes


def _legend(rows: Sequence[Row], reference: str | None) -> list[str]:
    """What the marks of this table mean; a mark that it does not have is not explained."""
    scores = [score for row in rows for score in row.scores.values()]
    told = (
        ["±: the 95 % interval, its longer side."] if any(s.low is not None for s in scores) else []
    )
    if any(score.delta for score in scores):
        told.append(f"d: difference from {reference}.")
    if any(score.delta and score.delta.claimed for score in scores):
        told.append("!: different from it at 5 %, adjusted for all differences (Holm).")
    if any(score.share for score in scores):
        told.append(
            "gap: share of the way from start to teacher, where that is over 3 standard errors."
        )
    if any(score.best for score in scores):
        told.append("* or bold: best, or not different from the best at 5 % in its column.")
    if any(score.floor for score in scores):
        told.append("~: not better than guessing.")
    return [" ".join(told)] if told else []


def _seeds_note(rows: Sequence[Row]) -> list[str]:
    from ctdbench.report.significance import SEEDS_TO_RANK

    counts = {row.label: len(row.seeds) for row in rows if not row.is_baseline}
    few = [label for label, count in counts.items() if count < SEEDS_TO_RANK]
    if not few:
        return []
    none = len(counts) - len(few) < 2  # a rank takes two rows
    which = "No row is ranked" if none else f"Not ranked: {', '.join(few)}"
    told = f"{which}: that takes {SEEDS_TO_RANK} seeds."
    if 1 in counts.values():
        told += " The interval of a row of one seed is of its items alone, not of what another "
        told += "seed would give."
    return [told]


def _corpus_note(spec: Mapping[str, Any]) -> list[str]:
    if spec["train"]["corpus"] != "embedded":
        return []
    if is_teachers_text(spec):
        return ["The embedded corpus is the teacher's own text: sft is sequence-level KD here."]
    return ["The embedded corpus was written by SmolLM2-135M-Instruct, no teacher of this pair."]


def _options(rows: Sequence[Row]) -> Iterator[str]:
    """The options in which rows differ that have them; all are in the JSON and on the page."""
    for name in dict.fromkeys(name for row in rows for name in row.options):
        labels: dict[str, list[str]] = {}
        for row in rows:
            if name in row.options:
                labels.setdefault(f"{row.options[name]}", []).append(row.label)
        if len(labels) > 1:
            told = (f"{value} in {', '.join(those)}" for value, those in labels.items())
            yield f"{name}: {'; '.join(told)}."


def _precisions(cells: Sequence[Result], known: Mapping[str, MethodInfo]) -> Iterator[str]:
    """What cells computed in, where `auto` was not the same everywhere."""
    found: dict[str, dict[str, None]] = {}
    for cell in cells:
        if (precision := trained_in(cell)) is not None:
            found.setdefault(precision, {})[row_label(cell["spec"], known)] = None
    if len(found) > 1:
        told = (f"{', '.join(labels)} in {precision}" for precision, labels in found.items())
        yield f"Trained on machines of different precision: {'; '.join(told)}."


def _reason(cell: Result) -> str:
    return cell["notes"][0] if cell["notes"] else "no reason recorded"
