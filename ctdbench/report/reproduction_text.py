"""A paper's table beside ours as text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from ctdbench.recipes import Measure, Scale
from ctdbench.report.reproduction import Comparison, Line, Reproduction
from ctdbench.report.reproduction_numbers import ONE_SOURCE, Number, lower_is_better

WIDTH = 118
ABSENT = "–"
HEADS: dict[Scale, list[str]] = {
    "paper": ["paper", "ours", "diff", "noise"],
    "cpu": ["paper", "gain", "ours", "gain", "diff", "noise"],
}


def render(reproduction: Reproduction) -> str:
    """Aligned text, at most WIDTH columns wide; columns that do not fit go below."""
    labels = _labels(reproduction.lines)
    blocks: list[list[str]] = []
    for index, measure in enumerate(reproduction.measures):
        cells = [line.cells[index] for line in reproduction.lines]
        lines = _spread(_rendered(measure, cells, reproduction.scale), reproduction.lines)
        if not blocks or len(blocks[-1][0]) + 3 + len(lines[0]) > WIDTH:
            blocks.append(labels)
        blocks[-1] = [f"{left} | {right}" for left, right in zip(blocks[-1], lines, strict=True)]
    body = ["\n".join(line.rstrip(" |") for line in block) + "\n" for block in blocks]
    title = textwrap.fill(reproduction.title, WIDTH)
    notes = [textwrap.fill(note, WIDTH, subsequent_indent="  ") for note in reproduction.notes]
    return "\n".join([title, "", *body, *notes, ""])


def _labels(lines: Sequence[Line]) -> list[str]:
    """Two lines of head, then a line a row under a line a group."""
    labels = _spread(["", "", *map(_name, lines)], lines, groups=True)
    width = max(map(len, labels))
    return [label.ljust(width) for label in labels]


def _name(line: Line) -> str:
    return f"  {line.name}" + " (failed)" * bool(line.failed)


def _spread(texts: Sequence[str], lines: Sequence[Line], *, groups: bool = False) -> list[str]:
    """The texts with a line before each group: its name, or nothing."""
    spread, before = list(texts[:2]), None
    for text, line in zip(texts[2:], lines, strict=True):
        if line.group != before:
            spread.append(line.group if groups else " " * len(texts[0]))
        spread.append(text)
        before = line.group
    return spread


def _rendered(measure: Measure, cells: Sequence[Comparison], scale: Scale) -> list[str]:
    """Two lines of head and a line a row, all of one width."""
    places = 2 if measure.column else 3  # per cent; bits or divergences
    rows = [HEADS[scale], *(_texts(cell, places) for cell in cells)]
    keep = _shown(measure, HEADS[scale])
    columns = [[row[place] for row in rows] for place in keep]
    padded = [[text.rjust(max(map(len, column))) for text in column] for column in columns]
    body = [" ".join(parts) for parts in zip(*padded, strict=True)]
    lines = [_head(measure), *body]
    width = max(map(len, lines))
    return [lines[0].ljust(width), *(line.rjust(width) for line in lines[1:])]


def _shown(measure: Measure, heads: Sequence[str]) -> list[int]:
    """Which parts a column has: all, both scores if nothing runs here, or ours alone."""
    if measure.runs is None:
        return [heads.index("paper"), heads.index("ours")]
    if measure.column is None:
        ours = heads.index("ours")
        return [place for place in (ours, ours + 1) if heads[place] in ("ours", "gain")]
    return list(range(len(heads)))


def _head(measure: Measure) -> str:
    if measure.column is None:
        runs = measure.runs
        down = " ↓" if runs and lower_is_better(runs) else ""
        return f"{runs.task} {runs.metric}{down}" if runs else ""
    runs = measure.runs
    stands_in = runs is not None and runs == measure.column.stand_in
    return f"{measure.column.task} %" + (f" (ours {runs.task})" if runs and stands_in else "")


def _texts(cell: Comparison, places: int) -> list[str]:
    doubt = ONE_SOURCE if cell.paper and ONE_SOURCE in cell.paper.marks else ""
    paper, ours = _number(cell.paper, places) + doubt, _number(cell.ours, places)
    verdict = {True: "yes", False: "no", None: ABSENT}[cell.within]
    margin = "" if cell.margin is None else f" ±{cell.margin:.1f}"
    diff = ABSENT if cell.difference is None else f"{cell.difference.value:+.2f}"
    noise = verdict + margin + cell.marks
    if cell.gains is None:
        return [paper, ours, diff, noise]
    own, mine = (_number(gain, places, sign="+") for gain in cell.gains)
    return [paper, own, ours, mine, diff, noise]


def _number(number: Number | None, places: int, sign: str = "") -> str:
    return ABSENT if number is None else f"{number.value:{sign}.{places}f}"
