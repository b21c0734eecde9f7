"""A table's section: what was compared, the numbers, what they mean, and the figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from ctdbench.report.formats.html import table as html_table
from ctdbench.report.page.drawing import inline
from ctdbench.report.page.facts import Fact, listed
from ctdbench.report.page.markup import Content, Markup, element, joined, link
from ctdbench.report.page.material import Material, cell_anchor, table_anchor
from ctdbench.report.tables import Row, Table

HALF_PAGE = 4.0  # inches: what is wider has the width of the page


def sections(material: Material) -> list[Markup]:
    """One a table."""
    return [_section(material, number) for number in range(1, len(material.tables) + 1)]


def subtitle(table: Table) -> str:
    """A table's title without its pair."""
    return table.title.removeprefix(f"{table.pair}: ")


def _section(material: Material, number: int) -> Markup:
    table = material.tables[number - 1]
    pair = material.pair(table)
    name = table_anchor(number)
    heading = element("h2", table.pair, id=f"{name}-name")
    return element(
        "section",
        heading,
        element("p", subtitle(table), class_="subtitle"),
        element("p", pair["title"], class_="lead") if pair.get("title") else None,
        listed(_pair(pair)),
        Markup(html_table(table, partial(_row_head, material))),
        element("div", *_figures(material, table), class_="figures"),
        id=name,
        class_="table",
        aria_labelledby=f"{name}-name",
    )


def _pair(pair: Mapping[str, Any]) -> Iterator[Fact]:
    yield "Student", _model(pair["student"])
    for teacher in pair["teachers"]:
        yield "Teacher", _model(teacher)
    lora = pair.get("lora")
    yield "Trained", f"LoRA of rank {lora['rank']}" if lora else "every parameter"


def _model(side: Mapping[str, Any]) -> list[Content]:
    layers, tokenizer = side.get("layers"), side.get("tokenizer")
    return [
        element("code", side["model"]),
        f", its first {layers} layers" if layers else None,
        [" with the tokenizer ", element("code", tokenizer)] if tokenizer else None,
    ]


def _row_head(material: Material, row: Row) -> Markup:
    """The label of a row, which leads to its cells."""
    if len(row.cells) == 1:
        return link(cell_anchor(row.cells[0]), row.label)
    seeds = sorted((material.cells[cell]["spec"]["seed"], cell) for cell in row.cells)
    links = [
        element("a", seed, href=f"#{cell_anchor(cell)}", aria_label=f"{row.label}, seed {seed}")
        for seed, cell in seeds
    ]
    return joined([row.label, element("span", "seeds ", *links, class_="seeds")])


def _figures(material: Material, table: Table) -> Iterator[Markup]:
    from ctdbench.report import figures

    for name, draw in figures.FIGURES.items():
        figure = draw(table, material.folders)
        if isinstance(figure, str):
            yield element("p", f"No figure of {name}: {figure}.", class_="fine absent")
            continue
        caption = str(figure.get_label()).removesuffix(f", {table.title}")
        drawing = element("div", inline(figures.svg(figure), caption), class_="scroll", tabindex=0)
        width = "wide" if figure.get_figwidth() > HALF_PAGE else None
        yield element("figure", element("figcaption", caption), drawing, class_=width)
