"""Scores on the way: a panel a metric, against the bytes of text seen (`eval.points`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from ctdbench import results
from ctdbench.report.figures import style
from ctdbench.report.tables import Column, Row, Table
from ctdbench.results import Result
from ctdbench.spec import format_bytes

Array = NDArray[np.float64]
Way = tuple[Array, Array]  # bytes of text [n], values [seeds, n]


@style.styled
def points(table: Table, folders: Mapping[str, Path]) -> Figure | str:
    """A line a row from the start's score to its own, its mean over the seeds; a band from the
    lowest to the highest seed."""
    cells = {
        cell: results.read_result(folders[cell] / results.RESULT)
        for row in table.rows
        if not row.is_baseline
        for cell in row.cells
        if cell in folders and (folders[cell] / results.RESULT).is_file()
    }
    ways = {column: _ways(table, column, cells) for column in table.columns}
    drawn = [column for column in table.columns if ways[column]]
    if not drawn:
        return "no row was evaluated on its way (eval.points)"
    figure, panels = style.panels(len(drawn), 1 if len(drawn) <= 2 else 2, 2.0, extra=0.4)
    figure.set_label(f"Scores on the way, {table.title}")
    for axes, column in zip(panels, drawn, strict=True):
        _panel(axes, column, ways[column], style.marks(table))
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    style.legend(figure, list(lines.values()), loc="outside right upper", handlelength=3.5)
    style.note(figure, ["Lines: means over seeds; bands: lowest to highest seed. Left end: start."])
    return style.settle(figure)


def _panel(
    axes: Axes, column: Column, ways: Mapping[str, Way], marks: Mapping[str, style.Mark]
) -> None:
    for label, (seen, values) in ways.items():
        mark = marks[label]
        look = {"color": mark.colour, "linestyle": mark.dashes, "marker": mark.marker}
        axes.plot(seen, values.mean(0), label=label, **look)
        if len(values) > 1:
            ends = values.min(0), values.max(0)
            axes.fill_between(seen, *ends, color=mark.colour, alpha=0.1, linewidth=0)
    axes.set_title(column.task)
    axes.set_ylabel(style.metric_name(column))
    axes.set_xlabel("text seen")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: format_bytes(round(size))))
    axes.grid()


def _ways(table: Table, column: Column, cells: Mapping[str, Result]) -> dict[str, Way]:
    """Of the rows all of whose cells have this score on the way."""
    start = next(
        (row.scores.get(column) for row in table.rows if row.method == results.START), None
    )
    first = None if start is None else start.value
    trained = (row for row in table.rows if not row.is_baseline)
    found = {row.label: _way(row, column, cells, first) for row in trained}
    return {label: way for label, way in found.items() if way is not None}


def _way(row: Row, column: Column, cells: Mapping[str, Result], first: float | None) -> Way | None:
    seeds = [_points(cells[cell], column) for cell in row.cells if cell in cells]
    if len(seeds) < len(row.cells) or not all(len(seed) == len(seeds[0]) > 1 for seed in seeds):
        return None
    values = np.array([[value for _, value in seed] for seed in seeds])
    seen = np.array([[size for size, _ in seed] for seed in seeds]).mean(0)
    if first is not None:
        seen, values = np.insert(seen, 0, 0.0), np.insert(values, 0, first, axis=1)
    return seen, np.vectorize(lambda value: style.shown(column, value))(values)


def _points(result: Result, column: Column) -> Sequence[tuple[float, float]]:
    """Bytes of text and score, the final one last."""
    name = f"{column.task}.{column.metric}"
    known = [(point["text_bytes"], point["scores"].get(name)) for point in result.get("points", [])]
    end = result["scores"].get(column.task, {}).get(column.metric)
    known.append((result["cost"]["text_bytes"], end))
    return [(size, value) for size, value in known if value is not None]
