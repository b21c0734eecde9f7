"""Figures of a table and of a pair. Importing this imports matplotlib; nothing else does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ctdbench.report.figures import style
from ctdbench.report.figures.alignment import alignment
from ctdbench.report.figures.cost import cost
from ctdbench.report.figures.curves import curves
from ctdbench.report.figures.overlap import overlap
from ctdbench.report.figures.points import points
from ctdbench.report.figures.ranks import ranks
from ctdbench.report.figures.scores import scores
from ctdbench.report.figures.style import svg
from ctdbench.report.tables import Table
from ctdbench.text.token_bytes import TokenBytes

__all__ = ["FIGURES", "alignment", "draw", "draw_pair", "overlap", "svg"]

Drawn = dict[str, list[Path] | str]
FIGURES: dict[str, Callable[[Table, Mapping[str, Path]], Figure | str]] = {
    "scores": scores,
    "curves": curves,
    "points": points,
    "cost": cost,
    "ranks": ranks,
}


def draw(
    table: Table,
    folders: Mapping[str, Path],
    out: Path,
    formats: Sequence[str] = ("pdf", "svg", "png"),
) -> Drawn:
    """Write every figure of a table: by name its files, or why it cannot be drawn.

    folders: of the table's cells, by id. Raises UserError for an unknown format and for a log
    that cannot be read.
    """
    style.check_formats(formats)
    made = {name: figure(table, folders) for name, figure in FIGURES.items()}
    return _save(made, out, "", formats)


def draw_pair(
    student: TokenBytes,
    teacher: TokenBytes,
    sentence: str,
    out: Path,
    name: str,
    formats: Sequence[str] = ("pdf", "svg", "png"),
) -> Drawn:
    """Write `<name>-alignment` of a sentence and `<name>-overlap`; returns what `draw` does."""
    style.check_formats(formats)
    made = {
        "alignment": alignment(student, teacher, sentence),
        "overlap": overlap(student, teacher),
    }
    return _save(made, out, f"{name}-", formats)


def _save(
    made: Mapping[str, Figure | str], out: Path, prefix: str, formats: Sequence[str]
) -> Drawn:
    return {
        name: figure if isinstance(figure, str) else style.save(figure, out, prefix + name, formats)
        for name, figure in made.items()
    }
