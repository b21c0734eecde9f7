"""Two vocabularies: what only one side has, and what both have, by class of token."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from ctdbench.report.figures import style
from ctdbench.report.figures.style import Look
from ctdbench.text.diagnostics import Overlap, vocabulary_overlap
from ctdbench.text.token_bytes import TokenBytes

PARTS = {  # field of Overlap: its name and its colour, dark, light, middle in grey
    "student_only": ("only student", style.BLUE),
    "common": ("common", style.SKY),
    "teacher_only": ("only teacher", style.VERMILLION),
}
LINE = 0.17  # inches a class
# Inches: names on the left, a column of numbers on the right, the bars between; above, below.
NAMES, NUMBER, ABOVE, BELOW = 0.95, 0.5, 0.27, 0.35
BARS = style.COLUMN - NAMES - 3 * NUMBER - 0.05


@style.styled
def overlap(student: TokenBytes, teacher: TokenBytes) -> Figure | str:
    """Stacked bars of the shares of a class's tokens, and the counts beside them."""
    found = vocabulary_overlap(student.vocabulary, teacher.vocabulary)
    classes = {name: counts for name, counts in found.items() if any(vars(counts).values())}
    if not classes:
        return "neither vocabulary has a token"
    totals = (sum(getattr(c, part) for c in classes.values()) for part in vars(Overlap(0, 0, 0)))
    classes = {"all": Overlap(*totals), **classes}
    height = ABOVE + LINE * len(classes) + BELOW
    figure = Figure((style.COLUMN, height))
    figure.set_label("Tokens that only the student, both, or only the teacher has")
    size = BARS / style.COLUMN, LINE * len(classes) / height
    axes = figure.add_axes((NAMES / style.COLUMN, BELOW / height, *size))
    _bars(axes, classes)
    _counts(axes, classes)
    return figure


def _bars(axes: Axes, classes: Mapping[str, Overlap]) -> None:
    for line, counts in enumerate(classes.values()):
        total, left = sum(vars(counts).values()), 0.0
        for part, (name, colour) in PARTS.items():
            share = getattr(counts, part) / total
            edge: Look = {"edgecolor": style.PAPER, "linewidth": 0.4}
            axes.barh(line, share, 0.72, left, color=colour, label=name, **edge)
            left += share
    axes.set(xlim=(0, 1), ylim=(len(classes) - 0.5, -0.5), xticks=(0, 0.5, 1))
    axes.set_yticks(range(len(classes)), list(classes))
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("share of the class", fontsize=style.SMALL)
    axes.spines["left"].set_visible(False)


def _counts(axes: Axes, classes: Mapping[str, Overlap]) -> None:
    """A column a part, below its name and colour: the head is the legend."""
    for number, (part, (name, colour)) in enumerate(PARTS.items(), start=1):
        right = 1 + number * NUMBER / BARS  # as a share of the axes
        look: Look = {
            "ha": "right",
            "fontsize": style.SMALL,
            "transform": axes.get_yaxis_transform(),
        }
        axes.text(right, -0.7, name.replace(" ", "\n"), va="bottom", linespacing=1, **look)
        swatch = Rectangle((right - 0.1, -0.6), 0.1, 0.12, color=colour, clip_on=False)
        swatch.set_transform(axes.get_yaxis_transform())
        axes.add_patch(swatch)
        for line, counts in enumerate(classes.values()):
            axes.text(right, line, f"{getattr(counts, part):,}", va="center", **look)
