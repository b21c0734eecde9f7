"""Training curves as small drawings: each logged number against the bytes of text seen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ctdbench.errors import UserError
from ctdbench.report.page.markup import Markup, element, joined
from ctdbench.spec import format_bytes

METRICS = "metrics.jsonl"
COUNTERS = ("step", "text_bytes", "student_tokens", "teacher_tokens", "seconds")
WIDTH, HEIGHT, MARGIN = 200, 56, 3  # in units of the drawing
POINTS = 80  # a curve has no more; at this size the eye would not tell them apart
Point = tuple[float, float]


def curves(folder: Path) -> Markup | None:
    """All curves of a cell side by side; None where it logged nothing."""
    rows = read_metrics(folder)
    names = dict.fromkeys(name for row in rows for name in row if name not in COUNTERS)
    drawn = [curve for name in names if (curve := _curve(name, _points(rows, name)))]
    if not drawn:
        return None
    seen = format_bytes(int(rows[-1].get("text_bytes") or 0) or 1)
    steps = len(rows)
    told = f"First and last value, and the range drawn; {steps:,} steps, {seen} of text."
    if steps > POINTS:
        told += f" A point is a mean of {-(-steps // POINTS)} steps."
    grid = element("div", *drawn, class_="curves")
    return joined([grid, element("p", told, class_="fine")])


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The steps that a cell logged, none where it has no log; UserError names a broken file."""
    path = folder / METRICS
    if not path.is_file():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        hint = f"remove the folder {folder} to compute the cell again"
        raise UserError(f"{path} is no training log: {error}", hint) from error
    return [row for row in rows if isinstance(row, dict)]


def _points(rows: Sequence[dict[str, Any]], name: str) -> list[Point]:
    """Bytes and value of the steps that have both."""
    pairs = [(row.get("text_bytes"), row.get(name)) for row in rows]
    return [(x, y) for x, y in pairs if isinstance(x, int | float) and isinstance(y, int | float)]


def _curve(name: str, points: Sequence[Point]) -> Markup | None:
    """One number's; None where it never changes, as a fixed weight."""
    values = [value for _, value in points]
    if len(points) < 2 or min(values) == max(values):
        return None
    low, high = min(values), max(values)
    ends = f"{values[0]:.4g} to {values[-1]:.4g}"
    line = element("polyline", points=_path(_thinned(points)))
    size = f"0 0 {WIDTH} {HEIGHT}"
    drawing = element("svg", line, viewBox=size, role="img", aria_label=f"{name}: {ends}")
    caption = [element("b", name), f" {values[0]:.4g} → {values[-1]:.4g} "]
    extremes = element("span", f"{low:.4g} to {high:.4g}", class_="fine")
    return element("figure", element("figcaption", *caption, extremes), drawing, class_="curve")


def _thinned(points: Sequence[Point]) -> list[Point]:
    size = -(-len(points) // POINTS)
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(x for x, _ in part), fmean(y for _, y in part)) for part in bins]


def _path(points: Sequence[Point]) -> str:
    """The points of a polyline that fills the drawing."""
    left, right = points[0][0], points[-1][0]
    values = [value for _, value in points]
    low, high = min(values), max(values)
    across = (WIDTH - 2 * MARGIN) / ((right - left) or 1)
    up = (HEIGHT - 2 * MARGIN) / ((high - low) or 1)
    return " ".join(
        f"{MARGIN + (x - left) * across:.1f},{HEIGHT - MARGIN - (y - low) * up:.1f}"
        for x, y in points
    )
