"""A table column by column, its numbers rounded and in words; every format for people lays it out.

A text is empty where there is nothing to tell and ABSENT where a number is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from ctdbench.report.formats.numbers import ABSENT, count, metric, number, percent, significant
from ctdbench.report.tables import Column, Row, RowCost, Score, Table
from ctdbench.spec import format_bytes

_Cost = tuple[tuple[str, str], Callable[[RowCost], float | None], Callable[[float], str]]


@dataclass(frozen=True)
class Cell:
    """A score: value, longer side of its interval, difference from the reference, gap closed."""

    value: str = ABSENT
    half: str = ""
    delta: str = ""
    share: str = ""
    best: bool = False
    floor: bool = False
    claimed: bool = False


@dataclass(frozen=True)
class ScoreColumn:
    """A task, with a cell for every row of the table."""

    column: Column
    cells: tuple[Cell, ...]

    @property
    def head(self) -> tuple[str, str, str]:
        """Task, metric, and what stands beside a score: `± (d, gap)`, as far as any row has it."""
        inside = ", ".join(self._inside())
        told = ["±"] if any(cell.half for cell in self.cells) else []
        told += [f"({inside})"] if inside else []
        return self.column.task, metric(self.column), " ".join(told)

    def beside(self, cell: Cell) -> str:
        """`(-0.106!, 68%)`: what the head has in brackets; empty where the row has nothing."""
        texts = {"d": cell.delta + "!" * cell.claimed, "gap": cell.share}
        shown = [texts[name] or ABSENT for name in self._inside()]
        return f"({', '.join(shown)})" if cell.delta or cell.share else ""

    def _inside(self) -> list[str]:
        has_delta = any(cell.delta for cell in self.cells)
        has_share = any(cell.share for cell in self.cells)
        return ["d"] * has_delta + ["gap"] * has_share


@dataclass(frozen=True)
class CostColumn:
    """A cost, with a text and a number for every row of the table; baselines have none."""

    head: tuple[str, str]
    texts: tuple[str, ...]
    values: tuple[float | None, ...]


def score_columns(table: Table) -> list[ScoreColumn]:
    """The tasks of a table."""
    return [
        ScoreColumn(column, tuple(_cell(row.scores.get(column), column) for row in table.rows))
        for column in table.columns
    ]


def cost_columns(table: Table) -> list[CostColumn]:
    """The costs that are known of any row."""
    columns = [_cost_column(table, *kind) for kind in (*_times(table), *_COSTS)]
    return [column for column in columns if any(value is not None for value in column.values)]


def row_label(row: Row) -> str:
    """A row's label, with the number of its seeds where that is not one."""
    return f"{row.label} ({len(row.seeds)} seeds)" if len(row.seeds) != 1 else row.label


_COSTS: tuple[_Cost, ...] = (
    (("peak", "GB"), lambda cost: cost.peak_memory_bytes, lambda size: significant(size / 1e9)),
    (("text", "seen"), lambda cost: cost.text_bytes, lambda size: format_bytes(round(size))),
    (("student", "tokens"), lambda cost: cost.student_tokens, count),
    (("teacher", "tokens"), lambda cost: cost.teacher_tokens, count),
)


def _times(table: Table) -> Iterator[_Cost]:
    """A column for every kind of device that rows were trained on."""
    devices = {row.cost.device for row in table.rows if row.cost}
    for device, head, unit in (("GPU", "GPU-h", 3600), ("CPU", "CPU-min", 60)):
        if device in devices:
            yield ("train", head), partial(_seconds, device), partial(_time, unit)


def _seconds(device: str, cost: RowCost) -> float | None:
    return cost.device_seconds if cost.device == device else None


def _time(unit: int, seconds: float) -> str:
    return significant(seconds / unit)


def _cost_column(
    table: Table,
    head: tuple[str, str],
    read: Callable[[RowCost], float | None],
    write: Callable[[float], str],
) -> CostColumn:
    values = tuple(None if row.cost is None else read(row.cost) for row in table.rows)
    texts = tuple(ABSENT if value is None else write(value) for value in values)
    return CostColumn(head, texts, values)


def _cell(score: Score | None, column: Column) -> Cell:
    if score is None:
        return Cell()
    delta, half = score.delta, _half(score)
    return Cell(
        value=number(score.value, column),
        half="" if half is None else number(half, column),
        delta=number(delta.value, column, sign="+") if delta else "",
        share=percent(score.share.value) if score.share else "",
        best=score.best,
        floor=score.floor,
        claimed=delta is not None and delta.claimed,
    )


def _half(score: Score) -> float | None:
    """The longer side of the interval: that of an accuracy near 0 or 1 is not symmetric."""
    if score.low is None or score.high is None:
        return None
    return max(score.high - score.value, score.value - score.low)
