"""GitHub's Markdown: a heading, a table and notes each; a cell reads `value ± half (d, gap)`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ctdbench.report.formats.columns import (
    Cell,
    CostColumn,
    ScoreColumn,
    cost_columns,
    row_label,
    score_columns,
)
from ctdbench.report.tables import Table

_SPECIAL = re.compile(r"[\\|*~<`]")


def render(tables: Sequence[Table]) -> str:
    """All tables, each under a heading of the third level."""
    return "\n".join(map(_table, tables))


def escape(text: str) -> str:
    """Text of one line that Markdown shows as it is."""
    return _SPECIAL.sub(r"\\\g<0>", " ".join(text.split()))


def _table(table: Table) -> str:
    labels = ["method", "---", *(escape(row_label(row)) for row in table.rows)]
    columns = [labels, *map(_scores, score_columns(table)), *map(_costs, cost_columns(table))]
    body = "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))
    notes = "".join(f"- {escape(note)}\n" for note in table.notes)
    return f"### {escape(table.title)}\n\n{body}\n\n{notes}"


def _scores(scores: ScoreColumn) -> list[str]:
    return [_head(scores.head), "---:", *(_cell(scores, cell) for cell in scores.cells)]


def _costs(cost: CostColumn) -> list[str]:
    return [_head(cost.head), "---:", *cost.texts]


def _head(lines: Iterable[str]) -> str:
    return "<br>".join(escape(line) for line in lines if line)


def _cell(scores: ScoreColumn, cell: Cell) -> str:
    value = f"**{cell.value}**" if cell.best else cell.value
    value += r"\~" if cell.floor else ""
    parts = (value, cell.half and f"± {cell.half}", scores.beside(cell))
    return " ".join(part for part in parts if part)
