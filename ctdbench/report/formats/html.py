"""HTML: escaped tables without styles of their own; `render` makes a small document of them.

Every number carries its full precision as `data-value`, for scripts that sort or draw. Classes:
scores (a table), scroll (around it), notes; baseline, reference (rows); best, floor, absent, cost
(cells); half, beside, claimed (inside a cell).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape

from ctdbench.report.formats.columns import (
    Cell,
    CostColumn,
    ScoreColumn,
    cost_columns,
    row_label,
    score_columns,
)
from ctdbench.report.tables import Row, Table

_DOCUMENT = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>ctdbench</title>
<style>
:root {{ color-scheme: light dark; font-family: sans-serif; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
caption {{ text-align: left; font-weight: bold; padding: 0.5em 0; }}
th, td {{ padding: 0.3em 0.7em; text-align: right; white-space: nowrap; }}
th[scope=row], th:first-child {{ text-align: left; }}
thead, tbody {{ border-bottom: 1px solid; }}
small, .half, .beside {{ font-weight: normal; opacity: 0.75; }}
.notes {{ font-size: 0.9em; }}
</style>
</head>
<body>
{body}</body>
</html>
"""


def render(tables: Sequence[Table]) -> str:
    """A document of all tables."""
    return _DOCUMENT.format(body="".join(map(table, tables)))


def plain_label(row: Row) -> str:
    """What the head of a row says, as HTML."""
    return escape(row_label(row))


def table(table: Table, label: Callable[[Row], str] = plain_label) -> str:
    """One table with its notes below, as a fragment. label: the HTML in the head of a row."""
    scores, costs = score_columns(table), cost_columns(table)
    heads = "".join(map(_head, [*(s.head for s in scores), *(c.head for c in costs)]))
    rows = "".join(
        _row(
            table,
            row,
            label(row),
            [_score(s, index, row) for s in scores] + [_cost(c, index) for c in costs],
        )
        for index, row in enumerate(table.rows)
    )
    notes = "".join(f"<li>{escape(note)}</li>\n" for note in table.notes)
    return (
        f'<div class="scroll">\n<table class="scores">\n<caption>{escape(table.title)}</caption>\n'
        f'<thead>\n<tr><th scope="col">method</th>{heads}</tr>\n</thead>\n'
        f"<tbody>\n{rows}</tbody>\n</table>\n</div>\n"
    ) + (f'<ul class="notes">\n{notes}</ul>\n' if notes else "")


def _head(lines: Iterable[str]) -> str:
    first, *others = (escape(line) for line in lines if line)
    return f'<th scope="col">{first}' + "".join(f"<br><small>{o}</small>" for o in others) + "</th>"


def _row(table: Table, row: Row, label: str, cells: Iterable[str]) -> str:
    kind = "baseline" * row.is_baseline or "reference" * (row.label == table.reference)
    return f'<tr{_class(kind)}><th scope="row">{label}</th>{"".join(cells)}</tr>\n'


def _score(scores: ScoreColumn, index: int, row: Row) -> str:
    cell = scores.cells[index]
    score = row.scores.get(scores.column)
    names = ["best"] * cell.best + ["floor"] * cell.floor
    return _cell(" ".join(names), score.value if score else None, _text(scores, cell))


def _text(scores: ScoreColumn, cell: Cell) -> str:
    value = f"<strong>{cell.value}</strong>" if cell.best else cell.value
    value += "~" if cell.floor else ""
    value += f' <span class="half">± {cell.half}</span>' if cell.half else ""
    beside = scores.beside(cell)
    claimed = " claimed" * cell.claimed
    return value + (f' <span class="beside{claimed}">{beside}</span>' if beside else "")


def _cost(cost: CostColumn, index: int) -> str:
    return _cell("cost", cost.values[index], escape(cost.texts[index]))


def _cell(names: str, value: float | None, text: str) -> str:
    if value is None:
        return f"<td{_class(f'{names} absent'.strip())}>{text}</td>"
    return f'<td{_class(names)} data-value="{float(value)!r}">{text}</td>'


def _class(names: str) -> str:
    return f' class="{names}"' if names else ""
