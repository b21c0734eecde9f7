"""Tables inside a Markdown file, between two marks that its author puts there."""

from __future__ import annotations

from pathlib import Path

from ctdbench import atomic
from ctdbench.errors import UserError

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def insert(path: Path, text: str) -> None:
    """Replace what lies between the marks, each on a line of its own.

    Raises UserError naming the file if it cannot be read or has not both marks once.
    """
    before, after = _around(path)
    atomic.write_bytes(path, f"{before}{BEGIN}\n{text}{END}{after}".encode())


def shown(path: Path) -> str:
    """What lies between the marks now."""
    before, after = _around(path)
    return _read(path)[len(before) + len(BEGIN) + 1 : -(len(after) + len(END))]


def _around(path: Path) -> tuple[str, str]:
    before, begin, rest = _read(path).partition(f"{BEGIN}\n")
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise UserError(f"{path} has no place for a table", f"write {BEGIN} and {END} into it")
    return before, after


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
