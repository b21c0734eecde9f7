"""What a page is made of: cells, the tables that show them, and where each cell stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ctdbench import registry
from ctdbench.labels import row_label
from ctdbench.report.comparison import comparison
from ctdbench.report.outcomes import Samples
from ctdbench.report.page.markup import anchor
from ctdbench.report.tables import Column, Row, Table
from ctdbench.results import Result


@dataclass(frozen=True)
class Place:
    """The first table that shows a cell, counted from 1, and the cell's row in it.

    baselines: ids of the cells of the table's baselines, by name.
    """

    number: int
    table: Table
    row: Row
    baselines: Mapping[str, str]

    def column(self, task: str) -> Column | None:
        """The column of a task."""
        return next((column for column in self.table.columns if column.task == task), None)


class Material:
    """Cells by id, their folders (`<store>/<pair>/<method>/<id>`), and their tables."""

    def __init__(self, found: Mapping[Path, Result], headline: Mapping[str, str] | None) -> None:
        self.cells = {result["id"]: result for result in found.values()}
        self.folders = {result["id"]: folder for folder, result in found.items()}
        self.samples = Samples(found)
        self.tables = comparison(found, headline)

    @cached_property
    def places(self) -> dict[str, Place]:
        """Of the cells that a table shows."""
        places: dict[str, Place] = {}
        for number, table in enumerate(self.tables, start=1):
            baselines = {row.method: row.cells[-1] for row in table.rows if row.is_baseline}
            for row in table.rows:
                for cell in row.cells:
                    places.setdefault(cell, Place(number, table, row, baselines))
        return places

    def label(self, cell: str) -> str:
        """The name of a cell's row, as its table has it."""
        place = self.places.get(cell)
        if place is not None:
            return place.row.label
        return row_label(self.cells[cell]["spec"], registry.methods())

    def pair(self, table: Table) -> Mapping[str, Any]:
        """The pair of a table as its cells state it."""
        shown = (self.cells[name]["spec"]["pair"] for row in table.rows for name in row.cells)
        named = (cell["spec"]["pair"] for cell in self.cells.values())
        return next(pair for pair in (*shown, *named) if pair["name"] == table.pair)

    @property
    def failed(self) -> list[str]:
        """Ids of the cells that failed."""
        return [name for name, cell in self.cells.items() if cell["status"] == "failed"]

    @property
    def store(self) -> str:
        """The name of the store's folder; the rest of its path is nobody's business."""
        folder = next(iter(self.folders.values())).resolve()
        return folder.parents[min(2, len(folder.parents) - 1)].name


def cell_anchor(cell: str) -> str:
    """The id of a cell's section."""
    return anchor("cell", cell)


def table_anchor(number: int) -> str:
    """The id of a table's section."""
    return anchor("table", number)
