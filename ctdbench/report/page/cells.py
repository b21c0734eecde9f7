"""A cell's own section: scores, curves, outputs, settings, cost, provenance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ctdbench.report.grouping import is_baseline
from ctdbench.report.page.curves import curves
from ctdbench.report.page.facts import Fact, listed, lists, titled, value
from ctdbench.report.page.markup import Content, Markup, element, joined, link
from ctdbench.report.page.material import Material, cell_anchor, table_anchor
from ctdbench.report.page.outputs import outputs
from ctdbench.report.page.scores import scores
from ctdbench.results import Result
from ctdbench.spec import EvalSpec, TrainSpec

SECTIONS: Mapping[str, TrainSpec | EvalSpec] = {"train": TrainSpec(), "eval": EvalSpec()}


def cells(material: Material) -> Markup:
    """All cells by table, baselines first, each closed until it is asked for."""
    groups: dict[int, list[str]] = {}
    for name in sorted(material.cells, key=lambda name: _order(material, name)):
        place = material.places.get(name)
        groups.setdefault(place.number if place else 0, []).append(name)
    parts = [
        element(
            "section",
            element("h3", _heading(material, number)),
            [_cell(material, name) for name in groups[number]],
            class_="group",
        )
        for number in sorted(groups, key=lambda number: (number == 0, number))
    ]
    return element("section", element("h2", "Cells"), parts, id="cells")


def _order(material: Material, name: str) -> tuple[bool, str, int]:
    cell = material.cells[name]
    return not is_baseline(cell), material.label(name), cell["spec"]["seed"]


def _heading(material: Material, number: int) -> Markup:
    if not number:
        return joined("In no table")
    return link(table_anchor(number), material.tables[number - 1].title)


def _cell(material: Material, name: str) -> Markup:
    cell = material.cells[name]
    spec, label, done = cell["spec"], material.label(name), cell["status"] == "done"
    summary = element(
        "summary",
        element("span", label, class_="name"),
        element("span", f"seed {spec['seed']}", class_="seed"),
        None if done else element("span", cell["status"], class_="failed"),
        element("code", name),
    )
    body = element(
        "div",
        _place(material, name),
        scores(material, cell),
        titled("Training", curves(material.folders[name])),
        outputs(material, cell),
        element("div", *_facts(cell), class_="facts"),
    )
    words = (spec["pair"]["name"], label, spec["seed"], name)
    return element(
        "details",
        summary,
        body,
        class_="cell",
        id=cell_anchor(name),
        data_name=" ".join(map(str, words)),
    )


def _place(material: Material, name: str) -> Markup:
    place = material.places.get(name)
    told: Content = (
        "In no table: it failed, or a newer cell took its place, of its seed, or of its row by "
        "another version of the method."
    )
    if place is not None:
        told = ["In ", link(table_anchor(place.number), place.table.title), "."]
    notes = [element("p", note, class_="note") for note in material.cells[name]["notes"]]
    return joined([element("p", told, class_="fine"), notes])


def _facts(cell: Result) -> list[Markup | None]:
    """Lists of names and values, each with a heading."""
    provenance: dict[str, Any] = dict(cell["provenance"])
    evaluation = provenance.pop("evaluation", {})
    options = cell["spec"]["options"].items()
    return [
        titled("Options", listed((name, value(found)) for name, found in options)),
        titled("Settings other than the default", listed(_changed(cell["spec"]))),
        *lists("Cost", cell["cost"]),
        *lists("Provenance", provenance),
        *lists("Evaluation", evaluation),
        *lists("Content, SHA-256", cell["content"]),
    ]


def _changed(spec: Mapping[str, Any]) -> Iterator[Fact]:
    """Of the settings that can change a result the ones that are not the default."""
    if spec.get("trust_remote_code"):
        yield "trust_remote_code", value(True)
    for section, default in SECTIONS.items():
        usual = default.model_dump(mode="json")
        for name in default.identity():
            found = spec[section].get(name, usual[name])
            if found != usual[name]:
                was = element("span", " (default ", value(usual[name]), ")", class_="fine")
                yield f"{section}.{name}", [value(found), was]
