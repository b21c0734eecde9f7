"""The scores of one cell: every metric of every task, with an interval over its documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ctdbench import results
from ctdbench.report.formats.numbers import ABSENT, metric, number
from ctdbench.report.page.markup import Markup, element
from ctdbench.report.page.material import Material
from ctdbench.report.tables import Column
from ctdbench.results import Result

if TYPE_CHECKING:
    from ctdbench.report.statistics import Array, Interval, Items

HEADS = ("Task", "Metric", "Score", "95 % interval", "Standard error", "Documents")
TOLD = (
    "Intervals are over the documents of this seed alone: Wilson's where every outcome is right or "
    "wrong, else Student's; where the seed is the only one of its row, that of the table."
)


def scores(material: Material, cell: Result) -> Markup | None:
    """A table of them; None for a cell that has none."""
    rows = [row for task in cell["scores"] for row in _rows(material, cell, task)]
    if not rows:
        return None
    head = element("tr", *(_head(name) for name in HEADS))
    table = element("table", element("thead", head), element("tbody", *rows))
    return element(
        "section",
        element("h4", "Scores"),
        element("div", table, class_="scroll", tabindex=0, role="region", aria_label="Scores"),
        element("p", TOLD, class_="fine"),
    )


def _head(name: str) -> Markup:
    return element("th", name, scope="col", class_="text" if name == "Metric" else None)


def _rows(material: Material, cell: Result, task: str) -> list[Markup]:
    samples = material.samples.rows(cell, task)
    return [_row(material, cell, Column(task, metric), samples) for metric in cell["scores"][task]]


def _row(
    material: Material, cell: Result, column: Column, samples: Sequence[dict[str, Any]]
) -> Markup:
    score = cell["scores"][column.task][column.metric]
    error = cell["stderr"].get(column.task, {}).get(column.metric)
    low, high = _interval(material, cell, column, samples)
    interval = f"{_text(low, column)} to {_text(high, column)}" if low is not None else ABSENT
    return element(
        "tr",
        element("th", column.task, scope="row"),
        element("td", metric(column), class_="text"),
        element("td", _text(score, column), class_="number", data_value=_exact(score)),
        element("td", interval, class_="number", data_low=_exact(low), data_high=_exact(high)),
        element("td", _text(error, column), class_="number", data_value=_exact(error)),
        element("td", len(samples) or ABSENT, class_="number", data_value=len(samples) or None),
    )


def _interval(
    material: Material, cell: Result, column: Column, samples: Sequence[dict[str, Any]]
) -> tuple[float | None, float | None]:
    place = material.places.get(cell["id"])
    shown = place.row.scores.get(column) if place and len(place.row.cells) == 1 else None
    if shown is not None:
        return shown.low, shown.high
    if not samples or cell["scores"][column.task][column.metric] is None:
        return None, None
    from ctdbench.report.pairing import Outcomes, estimate

    trained = not results.is_baseline(cell["spec"]["method"])
    own = Outcomes.from_rows(column.task, column.metric, {0: samples}, trained=trained)
    found = estimate(own, bootstrap=student)
    return (found.low, found.high) if math.isfinite(found.low) else (None, None)


def student(x: Array, items: Items) -> Interval:
    """Student's t over documents, in place of a bootstrap: thousands of them would take minutes.

    p is not asked for here, and not computed.
    """
    from ctdbench.report.statistics import Interval, Variance

    variance = Variance(float((items.deviations(x) ** 2).sum()), items.freedom)
    score, half = float(items.mean(x)), float(variance.half_width())
    return Interval(score - half, score + half, math.nan)


def _text(value: float | None, column: Column) -> str:
    return ABSENT if value is None else number(value, column)


def _exact(value: float | None) -> str | None:
    return None if value is None else repr(value)
