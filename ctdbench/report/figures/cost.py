"""Quality against cost: a panel a task, with the Pareto front."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

from ctdbench.report.figures import style
from ctdbench.report.figures.labels import place
from ctdbench.report.significance import SEEDS_TO_RANK
from ctdbench.report.tables import Column, Row, Table

ACROSS = 3  # panels beside each other
UNITS = {"GPU": ("GPU-hours", 3600), "CPU": ("CPU-minutes", 60)}
LOG_SPAN = 10  # largest cost over smallest above which the axis is logarithmic


@style.styled
def cost(table: Table, folders: Mapping[str, Path]) -> Figure | str:
    """Points with 95 % intervals; the front steps through the rows that none beats on both."""
    device, costs = _costs(table)
    rows = [row for row in table.rows if row.label in costs]
    columns = [column for column in table.columns if any(column in row.scores for row in rows)]
    if not columns:
        return "no trained row has both a score and its training time"
    figure, panels = style.panels(len(columns), ACROSS, 1.75, extra=0.4 + 0.03 * len(rows))
    figure.set_label(f"Score against cost of training, {table.title}")
    marks = style.marks(table)
    for axes, column in zip(panels, columns, strict=True):
        _panel(axes, rows, column, costs, marks)
        axes.set_xlabel(UNITS[device][0])
    _legend(figure, rows)
    style.note(figure, _remarks(table, rows))
    style.settle(figure)  # from here on the labels know where room is
    for axes, column in zip(panels, columns, strict=True):
        _label_front(axes, rows, column, costs)
    return figure


def _legend(figure: Figure, rows: list[Row]) -> None:
    """Above all panels, in the order of the table."""
    points = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    shown = [points[row.label] for row in rows if row.label in points]
    across = 5 if figure.get_figwidth() > style.COLUMN else 3
    style.legend(figure, shown, loc="outside upper center", ncols=across)


def pareto_front(points: Mapping[str, tuple[float, float]], lower_is_better: bool) -> list[str]:
    """Labels of the (cost, score) points that no other dominates, cheapest first.

    One dominates another if it is no worse in both and better in one.
    """
    sign = 1 if lower_is_better else -1
    ordered = sorted(points, key=lambda label: (points[label][0], sign * points[label][1]))
    front: list[str] = []
    for label in ordered:
        best = points[front[-1]] if front else None
        if best is None or sign * points[label][1] < sign * best[1] or points[label] == best:
            front.append(label)
    return front


def _costs(table: Table) -> tuple[str, dict[str, float]]:
    """The commonest kind of device, and time on it by row label, in its unit."""
    known = {
        row.label: row.cost
        for row in table.rows
        if row.cost is not None and row.cost.device_seconds is not None
    }
    kinds = Counter(spent.device for spent in known.values())
    device = max(kinds, key=lambda kind: kinds[kind], default="CPU")
    seconds = {
        label: spent.device_seconds for label, spent in known.items() if spent.device == device
    }
    return device, {label: (time or 0.0) / UNITS[device][1] for label, time in seconds.items()}


def _points(
    rows: list[Row], column: Column, costs: Mapping[str, float]
) -> dict[str, tuple[float, float]]:
    return {
        row.label: (costs[row.label], style.shown(column, row.scores[column].value))
        for row in rows
        if column in row.scores
    }


def _interval(column: Column, row: Row) -> tuple[float, float] | None:
    """The ends of the row's 95 % interval, as they are drawn; None where there is none."""
    score = row.scores[column]
    if score.low is None or score.high is None:
        return None
    return style.shown(column, score.low), style.shown(column, score.high)


def _panel(
    axes: Axes,
    rows: list[Row],
    column: Column,
    costs: Mapping[str, float],
    marks: Mapping[str, style.Mark],
) -> None:
    points = _points(rows, column, costs)
    for row in rows:
        if row.label not in points:
            continue
        mark, (spent, value) = marks[row.label], points[row.label]
        if ends := _interval(column, row):
            axes.plot([spent] * 2, ends, color=mark.colour, lw=0.7, label=f"_{row.label}")
        look = style.point(mark, hollow=style.too_few_seeds(row))
        axes.plot(spent, value, label=row.label, **look)
    _scale(axes, [spent for spent, _ in points.values()])
    axes.margins(y=0.1)
    _draw_front(axes, [points[label] for label in pareto_front(points, column.lower_is_better)])
    axes.set_title(column.task)
    axes.set_ylabel(style.metric_name(column), fontsize=style.SMALL)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.grid()


def _scale(axes: Axes, spent: list[float]) -> None:
    low, high = min(spent), max(spent)
    if low > 0 and high / low > LOG_SPAN:
        axes.set_xscale("log")
        ticks = [digit * 10.0**power for power in range(-6, 9) for digit in (1, 2, 5)]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(low / 1.5, high * 1.5)
    else:
        margin = 0.15 * (high - low) or 0.15 * high or 1.0
        axes.set_xlim(max(0.0, low - margin), high + margin)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _draw_front(axes: Axes, front: list[tuple[float, float]]) -> None:
    """From the cheapest point on: what is the best to be had for that much."""
    spent, values = zip(*front, strict=True)
    right, limits = axes.get_xlim()[1], axes.get_ylim()
    look = {"color": style.GREY, "lw": 0.9, "zorder": 1, "label": "_front"}
    axes.step([*spent, right], [*values, values[-1]], where="post", **look)
    axes.set_ylim(limits)


def _label_front(axes: Axes, rows: list[Row], column: Column, costs: Mapping[str, float]) -> None:
    """By the first word of a row's name if no other row has it: the legend has the rest."""
    points = _points(rows, column, costs)
    first = {label: label.partition(" ")[0] for label in costs}
    used = Counter(first.values())
    names = {label: word if used[word] == 1 else label for label, word in first.items()}
    front = [names[label] for label in pareto_front(points, column.lower_is_better)]
    bars = [
        (points[row.label][0], *ends)
        for row in rows
        if row.label in points and (ends := _interval(column, row))
    ]
    place(axes, {names[label]: point for label, point in points.items()}, front, bars)


def _remarks(table: Table, rows: list[Row]) -> Iterator[str]:
    yield "Step line: Pareto front of the means. Bars: 95 % intervals."
    if any(map(style.too_few_seeds, rows)):
        yield f"Open: fewer than {SEEDS_TO_RANK} seeds."
    shown = {row.label for row in rows}
    absent = [row.label for row in table.rows if not row.is_baseline and row.label not in shown]
    if absent:
        yield f"No training time on this kind of device: {style.listed(absent)}."
