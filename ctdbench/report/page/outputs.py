"""What the models wrote for the same documents, side by side: start, method, teachers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ctdbench import results
from ctdbench.report.page.markup import Markup, element, joined
from ctdbench.report.page.material import Material, Place
from ctdbench.results import Result

SHOWN = 3  # documents of a task
Rows = Mapping[str, Mapping[str, Any]]  # by document


def outputs(material: Material, cell: Result) -> Markup | None:
    """Of every task of the cell that generates text; None where no task does."""
    parts = [_task(material, cell, task) for task in cell["scores"]]
    return joined(part for part in parts if part) or None


def _task(material: Material, cell: Result, task: str) -> Markup | None:
    own = _written(material, cell, task)
    if not own:
        return None
    place = material.places.get(cell["id"])
    sides = _sides(material, cell, task, place)
    column = place.column(task) if place else None
    metric = column.metric if column else ""
    documents = [name for name in own if all(name in rows for rows in sides.values())][:SHOWN]
    return element(
        "section",
        element("h4", "Outputs: ", task),
        element("p", _told(len(documents), len(own), metric), class_="fine"),
        [
            _document(name, {side: rows[name] for side, rows in sides.items()}, metric)
            for name in documents
        ],
    )


def _told(shown: int, size: int, metric: str) -> str:
    which = f"The first {shown} of {size} documents" if shown < size else f"All {size} documents"
    judged = f" Right and wrong by {metric}." if metric else ""
    return f"{which}, not chosen; of an output the store keeps 500 characters.{judged}"


def _written(material: Material, cell: Result, task: str) -> dict[str, dict[str, Any]]:
    rows = material.samples.rows(cell, task)
    return {str(row["id"]): row for row in rows if "output" in row}


def _sides(
    material: Material, cell: Result, task: str, place: Place | None
) -> dict[str, dict[str, dict[str, Any]]]:
    """Rows by document of the start, the cell itself and the teachers, as far as there are any."""
    others = dict(place.baselines) if place else {}
    start = others.pop(results.START, None)
    named = {results.START: start, material.label(cell["id"]): cell["id"]} | others
    written = {
        name: _written(material, material.cells[found], task)
        for name, found in named.items()
        if found is not None
    }
    return {name: rows for name, rows in written.items() if rows}


def _document(name: str, sides: Rows, metric: str) -> Markup:
    texts = [
        element(
            "figure",
            element("figcaption", element("b", side), " ", _verdict(row.get(metric))),
            element("pre", str(row["output"])),
        )
        for side, row in sides.items()
    ]
    told = element("p", "Document ", element("code", name), class_="fine")
    return element("div", told, element("div", *texts, class_="sides"), class_="document")


def _verdict(value: Any) -> Markup | None:
    """Right or wrong, where an outcome is one of both."""
    if value not in (0, 1):
        return None
    mark, word = ("✓", "right") if value else ("✗", "wrong")
    return element("span", f"{mark} {word}", class_=word)
