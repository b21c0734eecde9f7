"""Tables as text. A new format is one function in `FORMATS`."""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ctdbench.errors import UserError
from ctdbench.registry import suggestion
from ctdbench.report.tables import Column, Row, Score, Table

WIDTH = 118
PERCENT = ("acc", "exact_match", "f1", "mc1", "mc2", "prompt_level", "inst_level")
ABSENT = "–"


def render(tables: Sequence[Table], name: str) -> str:
    """The tables in the format of that name; raises UserError for an unknown one."""
    if name not in FORMATS:
        raise UserError(f"unknown format {name!r}", suggestion(name, FORMATS))
    return FORMATS[name](tables)


def terminal(tables: Sequence[Table]) -> str:
    """Aligned text, at most WIDTH columns wide; columns that do not fit go below."""
    return "\n".join(_terminal_table(table) for table in tables)


def markdown(tables: Sequence[Table]) -> str:
    """A heading, a table and notes each; a cell reads `value ± error (difference, share)`."""
    return "\n".join(_markdown_table(table) for table in tables)


def as_csv(tables: Sequence[Table]) -> str:
    """One line a number, for spreadsheets; shares and accuracies as fractions."""
    records = [record for table in tables for record in _records(table)]
    out = io.StringIO()
    if records:
        writer = csv.DictWriter(out, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    return out.getvalue()


def as_json(tables: Sequence[Table]) -> str:
    """The same numbers by table, with settings and notes."""
    data = [
        {
            "pair": table.pair,
            "setting": table.setting,
            "scores": list(_records(table)),
            "options": {row.label: row.options for row in table.rows if row.options},
            "notes": table.notes,
        }
        for table in tables
    ]
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


FORMATS: dict[str, Callable[[Sequence[Table]], str]] = {
    "terminal": terminal,
    "markdown": markdown,
    "csv": as_csv,
    "json": as_json,
}


def _records(table: Table) -> Iterator[dict[str, Any]]:
    for row in table.rows:
        for column, score in row.scores.items():
            yield {
                "pair": table.pair,
                "corpus": table.setting["corpus"],
                "budget": table.setting["budget"],
                "limit": table.setting["limit"],
                "row": row.label,
                "method": row.method,
                "seeds": len(row.seeds),
                "task": column.task,
                "metric": column.metric,
                "lower_is_better": column.lower_is_better,
                **vars(score),
                "train_seconds": row.train_seconds,
            }


def _number(value: float | None, column: Column, *, sign: str = "") -> str:
    if value is None:
        return ABSENT
    if column.metric.startswith(PERCENT):
        return f"{100 * value:{sign}.1f}"
    return f"{value:{sign}.3f}" if abs(value) < 100 else f"{value:{sign}.4g}"


def _share(score: Score) -> str:
    # Adding 0.0 makes the -0.0 of a share just below nothing a plain 0.
    return ABSENT if score.share is None else f"{round(score.share, 2) + 0.0:.0%}"


def _metric(column: Column) -> str:
    unit = " %" if column.metric.startswith(PERCENT) else ""
    return f"{column.metric}{unit} {'↓' if column.lower_is_better else '↑'}"


def _row_label(row: Row) -> str:
    return f"{row.label} ({len(row.seeds)} seeds)" if len(row.seeds) > 1 else row.label


def _terminal_table(table: Table) -> str:
    labels = ["", "", "", *(_row_label(row) for row in table.rows), "± at most"]
    blocks: list[list[str]] = []
    for column in table.columns:
        lines = _terminal_column(table, column)
        if not blocks or len(blocks[-1][0]) + 2 + len(lines[0]) > WIDTH:
            blocks.append(_aligned(labels, str.ljust))
        blocks[-1] = [f"{left}  {right}" for left, right in zip(blocks[-1], lines, strict=True)]
    notes = [textwrap.fill(note, WIDTH, subsequent_indent="  ") for note in table.notes]
    body = ["\n".join(line.rstrip() for line in block) + "\n" for block in blocks]
    return "\n".join([table.title, "", *body, *notes, ""])


def _terminal_column(table: Table, column: Column) -> list[str]:
    """The lines of one task: three of head, a line a row, and the largest standard error."""
    scores = [row.scores.get(column) for row in table.rows]
    errors = [score.stderr for score in scores if score and score.stderr is not None]
    largest = _number(max(errors), column) if errors else ABSENT
    cells = [("", "d", "gap"), *(_terminal_cell(score, column) for score in scores)]
    parts = [
        _aligned(list(part), str.rjust) for part in zip(*cells, (largest, "", ""), strict=True)
    ]
    lines = [" ".join(line) for line in zip(*parts, strict=True)]
    return _aligned([column.task, _metric(column), *lines], str.rjust)


def _terminal_cell(score: Score | None, column: Column) -> tuple[str, str, str]:
    if score is None:
        return ABSENT, "", ""
    if score.delta is None:
        return _number(score.value, column), "", ""
    return _number(score.value, column), _number(score.delta, column, sign="+"), _share(score)


def _aligned(texts: list[str], pad: Callable[[str, int], str]) -> list[str]:
    width = max(map(len, texts))
    return [pad(text, width) for text in texts]


def _markdown_table(table: Table) -> str:
    heads = ["", *(f"{column.task}<br>{_metric(column)}" for column in table.columns)]
    lines = [heads, ["---", *["---:"] * len(table.columns)]]
    for row in table.rows:
        cells = (_markdown_cell(row.scores.get(column), column) for column in table.columns)
        lines.append([_row_label(row), *cells])
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = "\n".join(f"- {note}" for note in table.notes)
    return f"### {table.title}\n\n{body}\n\n{notes}\n"


def _markdown_cell(score: Score | None, column: Column) -> str:
    if score is None:
        return ABSENT
    text = _number(score.value, column)
    text += f" ± {_number(score.stderr, column)}" if score.stderr is not None else ""
    if score.delta is None:
        return text
    return f"{text} ({_number(score.delta, column, sign='+')}, {_share(score)})"
