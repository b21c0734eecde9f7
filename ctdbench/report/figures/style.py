"""One look for all figures: sizes of a paper's column, colours that the colour-blind tell apart.

Colours are Okabe and Ito's (2008). Every row also has its own marker and dashes, so a figure reads
in grey. Files are the same bytes whenever they are drawn.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from ctdbench import atomic
from ctdbench.errors import UserError
from ctdbench.registry import suggestion
from ctdbench.report.formats.numbers import is_percent
from ctdbench.report.significance import SEEDS_TO_RANK
from ctdbench.report.tables import Column, Row, Table

COLUMN, PAGE = 3.25, 6.75  # inches: a column of a two-column paper, and both
LABEL = 1.3  # inches, at most
BASE, SMALL = 7.0, 6.0  # points
INK, PAPER, GREY = "#222222", "#ffffff", "#808080"
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
# No two of 6, 5 and 11 have a common divisor: 30 rows differ in colour or dashes, 66 in colour or
# marker.
DASHES: tuple[Any, ...] = (
    "-",
    (0, (4, 1.5)),
    (0, (1, 1)),
    (0, (5, 1.5, 1, 1.5)),
    (0, (6, 1, 1, 1, 1, 1)),
)
MARKERS = "osD^vPX<>pd"

STYLE = {
    "font.size": BASE,
    "axes.titlesize": BASE,
    "axes.labelsize": BASE,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.6,
    "lines.markeredgewidth": 0.8,
    "figure.constrained_layout.w_pad": 0.04,
    "figure.constrained_layout.h_pad": 0.04,
    "figure.facecolor": PAPER,
    "figure.dpi": 300,
    "svg.hashsalt": "ctdbench",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,  # publishers refuse Type 3
}
UNDATED: dict[str, dict[str, None]] = {
    "pdf": {"CreationDate": None},
    "svg": {"Date": None},
    "png": {"Software": None},
}
Look = dict[str, Any]  # properties of an artist
# Inside a page matplotlib's style sheet would be that of all other elements, too.
ROOT_STYLE = "stroke-linejoin: round; stroke-linecap: butt"
GLOBAL_STYLE = rf'<defs>\s*<style type="text/css">\*{{{ROOT_STYLE}}}</style>\s*</defs>'
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Mark:
    """What tells a row from the others in every figure of a table."""

    colour: str
    marker: str
    dashes: Any


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Runs `draw` in this style, whatever the user's own settings are; they are left as found."""

    @wraps(draw)
    def inner(*args: P.args, **kwargs: P.kwargs) -> T:
        with matplotlib.style.context(["default", STYLE]):
            return draw(*args, **kwargs)

    return inner


def marks(table: Table) -> dict[str, Mark]:
    """By row label; baselines are grey, the others' depend on the sorted labels alone."""
    found = {row.label: Mark(GREY, "|", DASHES[2]) for row in table.rows if row.is_baseline}
    trained = sorted(row.label for row in table.rows if not row.is_baseline)
    for number, label in enumerate(trained):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        found[label] = Mark(colour, marker, DASHES[number % len(DASHES)])
    return found


def point(mark: Mark, hollow: bool) -> Look:
    """How a row's point is drawn; hollow where its seeds are too few to rank it."""
    return {
        "linestyle": "",
        "marker": mark.marker,
        "color": mark.colour,
        "markerfacecolor": PAPER if hollow else mark.colour,
    }


def too_few_seeds(row: Row) -> bool:
    """Whether a trained row cannot be ranked."""
    return not row.is_baseline and len(row.seeds) < SEEDS_TO_RANK


def panels(
    count: int, at_most: int, height: float, *, extra: float = 0.0, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` axes, at most so many beside each other; heights in inches.

    One or two are as wide as a column, more as a page. extra: height beside that of the axes.
    """
    lines = math.ceil(count / at_most)
    across = math.ceil(count / lines)
    size = (COLUMN if count <= 2 else PAGE, lines * height + extra)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(lines, across, squeeze=False, sharey=sharey).flat
    for axes in grid[count:]:
        axes.remove()
    return figure, list(grid[:count])


def shown(column: Column, value: float) -> float:
    """A score in the unit that `metric_name` tells."""
    return 100 * value if is_percent(column) else value


def metric_name(column: Column) -> str:
    """For an axis: the metric, its unit, and which way is better."""
    unit = " (%)" if is_percent(column) else ""
    better = "← lower is better" if column.lower_is_better else "higher is better →"
    return f"{column.metric}{unit}\n{better}"


def note(figure: Figure, sentences: Iterable[str]) -> None:
    """What a reader must know, in small type below the axes; lines fit the figure's width."""
    text = " ".join(sentences)
    if text:
        figure.supxlabel(wrap(text, figure.get_figwidth()), x=0.01, ha="left", fontsize=SMALL)


def settle(figure: Figure) -> Figure:
    """Lay the figure out, for good: every further pass would move it by a hair."""
    FigureCanvasAgg(figure)  # it keeps its renderer; without it every text measured makes one
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine(None)  # "none" would leave one that asks for a second drawing
    return figure


def wrap(text: str, inches: float, size: float = SMALL) -> str:
    """Broken into lines of at most that width, at the mean width of a letter."""
    return textwrap.fill(text, int(inches * 72 / (0.53 * size)))


def text_width(text: str, size: float = SMALL) -> float:
    """Inches."""
    width, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(size=size), False)
    return float(width) / 72


def legend(figure: Figure, handles: Sequence[Any], **look: Any) -> None:
    """A legend of the rows of these artists, long labels broken."""
    figure.legend(handles, [wrap(handle.get_label(), LABEL) for handle in handles], **look)


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def check_formats(formats: Iterable[str]) -> None:
    """Raises UserError naming the first format that figures are not written in."""
    for name in formats:
        if name not in UNDATED:
            raise UserError(f"unknown figure format {name!r}", suggestion(name, UNDATED))


def save(figure: Figure, folder: Path, name: str, formats: Sequence[str]) -> list[Path]:
    """Write `<folder>/<name>.<format>` for each format, whole or not at all; returns the paths."""
    check_formats(formats)
    paths = [folder / f"{name}.{kind}" for kind in formats]
    for path, kind in zip(paths, formats, strict=True):
        atomic.write_bytes(path, _rendered(figure, kind))
    return paths


def svg(figure: Figure) -> str:
    """An <svg> element to put into a page; several can be in one, since their ids differ.

    Its ink is the colour of the text around it, its paper the CSS variable --paper.
    """
    text = _rendered(figure, "svg").decode()
    element = re.sub(f"{GLOBAL_STYLE}|<metadata>.*?</metadata>", "", text, flags=re.S)
    element = element[element.index("<svg") :]
    own = hashlib.sha256(element.encode()).hexdigest()[:8]
    element = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>f{own}-", element)
    element = element.replace(INK, "currentColor").replace(PAPER, "var(--paper, transparent)")
    return element.replace("<svg", f'<svg role="img" style="{ROOT_STYLE}"', 1)


@styled
def _rendered(figure: Figure, kind: str) -> bytes:
    stream = io.BytesIO()
    title = {"Title": figure.get_label()}
    figure.savefig(stream, format=kind, metadata={**UNDATED[kind], **title})
    return stream.getvalue()
