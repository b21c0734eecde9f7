"""Learning curves: bits per byte of the training text against the bytes of text seen."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from ctdbench.errors import UserError
from ctdbench.report.figures import style
from ctdbench.report.tables import Row, Table
from ctdbench.spec import format_bytes

Array = NDArray[np.float64]
WINDOW = 0.05  # of all text: what the running mean is over
POINTS = 200
ABOVE = 6  # curves at most whose legend stands above the axes, not beside them
LINE = 0.11  # inches a line of the legend


@dataclass(frozen=True)
class Curve:
    """A row's seeds on one grid: bytes of text [n], bits per byte [seeds, n]."""

    seen: Array
    bits: Array


@style.styled
def curves(table: Table, folders: Mapping[str, Path]) -> Figure | str:
    """A line a row, its mean over the seeds; a band from the lowest to the highest seed."""
    trained = [row for row in table.rows if not row.is_baseline]
    found = {row.label: _curve(row, folders) for row in trained}
    drawn = {label: curve for label, curve in found.items() if curve is not None}
    if not drawn:
        return "no row has a log of its cross-entropy (metrics.jsonl)"
    lines = sum(style.wrap(label, style.LABEL).count("\n") + 1.4 for label in drawn)
    narrow = style.COLUMN, 2.2 + LINE * lines
    figure = Figure(narrow if len(drawn) <= ABOVE else (style.PAGE, 3.0), layout="constrained")
    figure.set_label(f"Learning curves, {table.title}")
    _draw(figure, drawn, style.marks(table))
    style.note(figure, _remarks(drawn, [label for label in found if label not in drawn]))
    return style.settle(figure)


def _draw(figure: Figure, drawn: Mapping[str, Curve], marks: Mapping[str, style.Mark]) -> None:
    axes = figure.subplots()
    _lines(axes, drawn, marks)
    axes.set_ylim(*_limits(drawn.values()))
    axes.set_xlim(0, max(curve.seen[-1] for curve in drawn.values()))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: format_bytes(round(size))))
    axes.set_xlabel("text seen")
    axes.set_ylabel(f"bits per byte of training text\n(running mean over {WINDOW:.0%} of the text)")
    axes.grid()
    where = "outside upper right" if len(drawn) <= ABOVE else "outside right upper"
    style.legend(figure, axes.get_lines(), loc=where, handlelength=3.5)


def _lines(axes: Axes, drawn: Mapping[str, Curve], marks: Mapping[str, style.Mark]) -> None:
    """Highest end first, so that the legend names them from top to bottom."""
    shade = 0.15 if len(drawn) <= ABOVE else 0.07
    for number, label in enumerate(sorted(drawn, key=lambda n: -drawn[n].bits[:, -1].mean())):
        curve, mark = drawn[label], marks[label]
        every = (number * POINTS // (5 * len(drawn)), POINTS // 5)
        look = {"color": mark.colour, "linestyle": mark.dashes, "marker": mark.marker}
        axes.plot(curve.seen, curve.bits.mean(0), label=label, markevery=every, **look)
        if len(curve.bits) > 1:
            band = curve.bits.min(0), curve.bits.max(0)
            axes.fill_between(curve.seen, *band, color=mark.colour, alpha=shade, linewidth=0)


def _limits(drawn: Collection[Curve]) -> tuple[float, float]:
    """All of the curves but their first tenth, which would flatten the rest."""
    later = [curve.bits[:, POINTS // 10 :] for curve in drawn]
    low, high = min(bits.min() for bits in later), max(bits.max() for bits in later)
    margin = 0.05 * (high - low) or 0.05
    return float(low - margin), float(high + 3 * margin)


def _remarks(drawn: Mapping[str, Curve], absent: Sequence[str]) -> list[str]:
    told = []
    if any(len(curve.bits) > 1 for curve in drawn.values()):
        told.append("Lines: means over seeds; bands: lowest to highest seed.")
    if any(curve.bits.max() > _limits(drawn.values())[1] for curve in drawn.values()):
        told.append("The first tenth of the text can lie above the axes.")
    if absent:
        told.append(f"No cross-entropy is logged of {style.listed(absent)}.")
    return told


def _curve(row: Row, folders: Mapping[str, Path]) -> Curve | None:
    """None where the log of one of the row's cells is missing or has no cross-entropy."""
    known = [folders[cell] / "metrics.jsonl" for cell in row.cells if cell in folders]
    logs = [log for path in known if path.is_file() and (log := running_bits(path)) is not None]
    if len(logs) < len(row.cells):
        return None
    smooth = [(seen[1:], running_mean(seen, bits, WINDOW * seen[-1])) for seen, bits in logs]
    first, last = max(seen[0] for seen, _ in smooth), min(seen[-1] for seen, _ in smooth)
    grid = np.linspace(first, last, POINTS)
    return Curve(grid, np.stack([np.interp(grid, seen, bits) for seen, bits in smooth]))


def running_bits(path: Path) -> tuple[Array, Array] | None:
    """Bytes of text seen and bits spent on them [steps + 1], running sums from 0.

    A step's bits are its mean cross-entropy (nats a token) times its tokens / ln 2. None for a log
    without cross-entropy. Raises UserError naming a file that cannot be read.
    """
    try:
        steps = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        seen, tokens = (
            np.array([0.0, *(step[name] for step in steps)])
            for name in ("text_bytes", "student_tokens")
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        hint = f"remove the folder {path.parent} to compute the cell again"
        raise UserError(f"{path} is no log of a training: {error}", hint) from error
    losses = [step.get("ce") for step in steps]
    if None in losses or not losses:
        return None
    bits = np.concatenate([[0.0], np.cumsum(losses * np.diff(tokens))]) / math.log(2)
    grows = np.diff(seen, prepend=-1.0) > 0
    return seen[grows], bits[grows]


def running_mean(seen: Array, bits: Array, window: float) -> Array:
    """Bits per byte over the last `window` bytes before each step's end, one step at least.

    seen, bits: running sums [n + 1]; the result is [n].
    """
    ends = np.arange(1, len(seen))
    starts = np.minimum(np.searchsorted(seen, seen[1:] - window), ends - 1)
    return np.asarray((bits[ends] - bits[starts]) / (seen[ends] - seen[starts]))
