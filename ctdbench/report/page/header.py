"""The head of the page: what it is about, when and with what it was made, and where things are."""

from __future__ import annotations

import time
from collections.abc import Iterator

from ctdbench import __version__
from ctdbench.report.page.facts import Fact, listed
from ctdbench.report.page.markup import Markup, element, link
from ctdbench.report.page.material import Material, table_anchor

TITLE = "Cross-tokenizer distillation"
VERSIONS = ("ctdbench", "torch", "transformers", "lm-eval")


def header(material: Material) -> Markup:
    """Title, facts and contents."""
    pairs = sorted({table.pair for table in material.tables})
    return element(
        "header",
        element("p", "ctdbench report", class_="kicker"),
        element("h1", TITLE),
        element("p", f"Methods compared on {_listed(pairs)}.", class_="lead"),
        listed(_facts(material)),
        _contents(material),
    )


def _facts(material: Material) -> Iterator[Fact]:
    done, failed = len(material.cells) - len(material.failed), len(material.failed)
    yield "Store", element("code", material.store)
    yield "Cells", f"{done} finished" + (f", {failed} failed" if failed else "")
    now = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    yield "Written", f"{now} UTC by ctdbench {__version__}"
    yield "Measured", _dates(material)
    yield "With", ", ".join(_versions(material))


def _dates(material: Material) -> str:
    """First and last day on which a cell was measured."""
    created = (str(cell["provenance"].get("created", "")) for cell in material.cells.values())
    dates = sorted({moment[:10] for moment in created if moment})
    return " to ".join([*dates[:1], *dates[1:][-1:]]) or "unknown"


def _versions(material: Material) -> Iterator[str]:
    """Of the packages that numbers depend on most, every version that made a cell."""
    for name in VERSIONS:
        found = {
            str(cell["provenance"].get("versions", {}).get(name, ""))
            for cell in material.cells.values()
        } - {""}
        if found:
            yield f"{name} {' and '.join(sorted(found))}"


def _contents(material: Material) -> Markup:
    tables = [
        element("li", link(table_anchor(number), table.title))
        for number, table in enumerate(material.tables, start=1)
    ]
    others = [
        element("li", link(name, text))
        for name, text in (("missing", "What is missing"), ("cells", "All cells"))
    ]
    return element("nav", element("ol", *tables, *others), aria_label="Contents")


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
