"""What a reader should not have to find out alone: what is absent, thin or at chance."""

from __future__ import annotations

from collections.abc import Iterator

from ctdbench import registry, results
from ctdbench.report.page.facts import Fact, listed
from ctdbench.report.page.markup import Markup, element, link
from ctdbench.report.page.material import Material, cell_anchor, table_anchor
from ctdbench.report.tables import Table


def missing(material: Material) -> Markup:
    """The cells that failed, and a list a table."""
    parts = [
        element(
            "section",
            element("h3", link(table_anchor(number), table.title)),
            listed(_facts(material, table)) or element("p", "Nothing."),
        )
        for number, table in enumerate(material.tables, start=1)
    ]
    return element(
        "section", element("h2", "What is missing"), _failed(material), parts, id="missing"
    )


def _failed(material: Material) -> Markup | None:
    items = []
    for name in material.failed:
        cell = material.cells[name]
        spec = cell["spec"]
        called = f"{spec['pair']['name']}, {material.label(name)}, seed {spec['seed']}"
        reason = "; ".join(cell["notes"]) or "no reason recorded"
        items.append(element("li", link(cell_anchor(name), called), ": ", reason))
    if not items:
        return None
    return element("section", element("h3", "Cells that failed"), element("ul", *items))


def _facts(material: Material, table: Table) -> Iterator[Fact]:
    from ctdbench.report.significance import SEEDS_TO_RANK

    shown = {row.method for row in table.rows}
    expected = results.baselines(len(material.pair(table)["teachers"]))
    few = [
        f"{row.label} ({len(row.seeds)})"
        for row in table.rows
        if len(row.seeds) < SEEDS_TO_RANK and not row.is_baseline
    ]
    absent = {
        "Baselines not evaluated": [name for name in expected if name not in shown],
        "Methods without a finished cell": [n for n in registry.methods() if n not in shown],
        f"Rows of fewer than {SEEDS_TO_RANK} seeds, so not ranked": few,
    }
    for column in table.columns:
        scores = {row.label: row.scores.get(column) for row in table.rows}
        absent[f"No number for {column.task}"] = [n for n, score in scores.items() if not score]
        floor = [name for name, score in scores.items() if score and score.floor]
        absent[f"Not better than guessing on {column.task}"] = floor
    yield from ((name, ", ".join(found)) for name, found in absent.items() if found)
