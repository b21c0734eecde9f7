"""Aligned text, at most WIDTH columns wide: tasks that do not fit go below, costs come last."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence

from ctdbench.report.formats.columns import (
    CostColumn,
    ScoreColumn,
    cost_columns,
    row_label,
    score_columns,
)
from ctdbench.report.tables import Table

WIDTH = 118
GAP = "  "


def render(tables: Sequence[Table]) -> str:
    """A title, blocks of columns, and notes each."""
    return "\n".join(map(_table, tables))


def _table(table: Table) -> str:
    labels = ["", "", "", *map(row_label, table.rows)]
    blocks = _blocks(labels, map(_score_lines, score_columns(table)))
    blocks += _blocks(labels, map(_cost_lines, cost_columns(table)))
    notes = [textwrap.fill(note, WIDTH, subsequent_indent="  ") for note in table.notes]
    return "\n".join([table.title, "", *map(_text, blocks), *notes, ""])


def _blocks(labels: list[str], columns: Iterable[list[str]]) -> list[list[str]]:
    """Columns beside each other, each block with the labels at its left."""
    blocks: list[list[str]] = []
    for column in columns:
        if not blocks or len(blocks[-1][0] + GAP + column[0]) > WIDTH:
            blocks.append(_aligned(labels, str.ljust))
        blocks[-1] = [left + GAP + right for left, right in zip(blocks[-1], column, strict=True)]
    return blocks


def _text(block: list[str]) -> str:
    lines = (line.rstrip() for line in block)
    return "\n".join(line for line in lines if line) + "\n"  # no third line of head: no line


def _score_lines(scores: ScoreColumn) -> list[str]:
    """The lines of one task: three of head and a line a row."""
    cells = scores.cells
    marks = ["*" * cell.best + "~" * cell.floor for cell in cells]
    claims = ["!" * cell.claimed for cell in cells]
    parts = [
        _joined(_part("", [cell.value for cell in cells]), marks),
        _part("", [cell.half and f"±{cell.half}" for cell in cells]),
        _joined(_part("d", [cell.delta for cell in cells]), claims),
        _part("gap", [cell.share for cell in cells]),
    ]
    lines = [" ".join(line) for line in zip(*filter(None, parts), strict=True)]
    task, metric, _ = scores.head
    return _aligned([task, metric, *lines], str.rjust)


def _cost_lines(cost: CostColumn) -> list[str]:
    return _aligned([*cost.head, "", *cost.texts], str.rjust)


def _part(head: str, texts: Sequence[str]) -> list[str]:
    """Numbers under each other below their head; nothing at all where no row has one."""
    return _aligned([head, *texts], str.rjust) if any(texts) else []


def _joined(part: Sequence[str], marks: Sequence[str]) -> list[str]:
    """Marks right behind the numbers, which stay aligned."""
    texts = zip(part, _aligned(["", *marks], str.ljust), strict=True) if part else ()
    return [number + mark for number, mark in texts]


def _aligned(texts: Sequence[str], pad: Callable[[str, int], str]) -> list[str]:
    width = max(map(len, texts))
    return [pad(text, width) for text in texts]
