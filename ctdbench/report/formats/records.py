"""For programs: CSV with a line a score, JSON with a table an object; unrounded, shares of one."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from ctdbench.report.tables import Column, Difference, Row, RowCost, Score, Table

if TYPE_CHECKING:
    from ctdbench.report.significance import Standing

_PARTS = {
    "delta": [field.name for field in fields(Difference)],
    "share": ["value", "low", "high", "seeds"],
}
_COST = [field.name for field in fields(RowCost)]


def render_csv(tables: Sequence[Table]) -> str:
    """One line a row and task, nothing where a number is missing; costs are those of the row."""
    lines = [line for table in tables for line in _lines(table)]
    out = io.StringIO()
    if lines:
        writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return out.getvalue()


def render_json(tables: Sequence[Table]) -> str:
    """All that the tables know: settings, rows with cells and options, tie groups, notes."""
    return json.dumps([_table(table) for table in tables], indent=1, ensure_ascii=False) + "\n"


def _lines(table: Table) -> Iterator[dict[str, Any]]:
    place = {"table": table.title, "pair": table.pair}
    place |= {name: table.setting[name] for name in ("corpus", "budget", "limit")}
    for row in table.rows:
        own = {"row": row.label, "method": row.method, "seeds": len(row.seeds)}
        cost = {name: getattr(row.cost, name, None) for name in _COST}
        for column, score in row.scores.items():
            numbers = _flat(_score(score))
            yield {**place, **own, **_column(column), **numbers, **cost}


def _flat(score: Mapping[str, Any]) -> dict[str, Any]:
    """`delta: {value, low}` as `delta` and `delta_low`, all empty where there is none."""
    flat: dict[str, Any] = {}
    for name, value in score.items():
        if name in _PARTS:
            known = {} if value is None else value
            flat |= {
                f"{name}_{part}".removesuffix("_value"): known.get(part) for part in _PARTS[name]
            }
        else:
            flat[name] = value
    return flat


def _table(table: Table) -> dict[str, Any]:
    return {
        "title": table.title,
        "pair": table.pair,
        "setting": table.setting,
        "reference": table.reference,
        "rows": [_row(row) for row in table.rows],
        "standings": [{**_column(c), **_standing(s)} for c, s in table.standings.items()],
        "notes": table.notes,
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "row": row.label,
        "method": row.method,
        "seeds": row.seeds,
        "cells": row.cells,
        "options": row.options,
        "cost": asdict(row.cost) if row.cost else None,
        "scores": [{**_column(c), **_score(score)} for c, score in row.scores.items()],
    }


def _column(column: Column) -> dict[str, Any]:
    lower = column.lower_is_better
    return {"task": column.task, "metric": column.metric, "lower_is_better": lower}


def _score(score: Score) -> dict[str, Any]:
    return {**asdict(score), "best": score.best}


def _standing(standing: Standing) -> dict[str, Any]:
    """p-values of every pair of ranked rows, adjusted; p: of "all rows are equal"."""
    pairs = {frozenset(rows): p for rows, p in standing.p.items()}
    return {
        "seeds": standing.seeds,
        "groups": standing.groups,
        "p": standing.gate,
        "pairs": [{"rows": sorted(rows), "p": p} for rows, p in pairs.items()],
    }
