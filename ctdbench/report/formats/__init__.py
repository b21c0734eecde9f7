"""Tables as text. A new format is one file, and its function in `FORMATS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ctdbench.errors import UserError
from ctdbench.registry import suggestion
from ctdbench.report.formats import html, latex, markdown, records, terminal
from ctdbench.report.tables import Table

FORMATS: dict[str, Callable[[Sequence[Table]], str]] = {
    "terminal": terminal.render,
    "markdown": markdown.render,
    "latex": latex.render,
    "csv": records.render_csv,
    "html": html.render,
    "json": records.render_json,
}
SUFFIXES = {"terminal": "txt", "markdown": "md", "latex": "tex"}  # of files; others: the name


def render(tables: Sequence[Table], name: str) -> str:
    """The tables in the format of that name; raises UserError for an unknown one."""
    if name not in FORMATS:
        raise UserError(f"unknown format {name!r}", suggestion(name, FORMATS))
    return FORMATS[name](tables)
