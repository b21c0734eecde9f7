"""Labels beside points, where there is room for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from ctdbench.report.figures import style

AWAY = 4.0  # points from a point to its label
# Beside, above, below, then the corners: x and y of the side, and the alignment that faces it.
SIDES = [
    (x, y, {-1: "right", 0: "center", 1: "left"}[x], {-1: "top", 0: "center", 1: "bottom"}[y])
    for x, y in ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
]


def place(
    axes: Axes,
    points: Mapping[str, tuple[float, float]],
    labels: Iterable[str],
    bars: Iterable[tuple[float, float, float]] = (),
) -> list[str]:
    """Label these points so that no label covers another, a point, a bar or the axes' edge.

    bars: x, lower and upper end of upright lines. The figure's layout must be done. Returns the
    labels for which no side had room.
    """
    inside = axes.get_window_extent()
    radius = AWAY * 0.6 * axes.figure.dpi / 72
    middles = axes.transData.transform(list(points.values()))
    taken = [Bbox.from_extents(x - radius, y - radius, x + radius, y + radius) for x, y in middles]
    for x, low, high in bars:
        taken.append(Bbox(axes.transData.transform([(x, low), (x, high)])))
    left_out = []
    for label in labels:
        for x, y, across, up in SIDES:
            text = axes.annotate(
                label,
                points[label],
                (AWAY * x, AWAY * y),
                textcoords="offset points",
                ha=across,
                va=up,
                fontsize=style.SMALL,
            )
            box = text.get_window_extent()
            free = not any(box.overlaps(other) for other in taken)
            if free and inside.containsx(box.x0) and inside.containsx(box.x1):
                text.set_in_layout(False)
                taken.append(box)
                break
            text.remove()
        else:
            left_out.append(label)
    return left_out
