"""The stored per-document outcomes of the cells of a table, and bootstraps that are kept.

A bootstrap of 10,000 draws takes tens of milliseconds and its outcome never changes, so each is
computed once and kept in the cache.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from ctdbench import results
from ctdbench.cache import cache_dir
from ctdbench.errors import RunError, UserError
from ctdbench.results import Result

if TYPE_CHECKING:
    from ctdbench.report.pairing import Outcomes
    from ctdbench.report.statistics import Array, Interval, Items

KEPT = 50_000  # intervals; the oldest go first
KEPT_FILES = 32  # of samples: a cell's and its baselines', which a page shows one after the other
TEXTS = frozenset({"id", "subset", "output"})  # of a row of samples; all else is a number
NUMBERS = {int, float, bool, type(None)}


class Samples:
    """Outcomes by document of found cells, read when they are asked for."""

    def __init__(self, found: Mapping[Path, Result]) -> None:
        self._folders = {result["id"]: folder for folder, result in found.items()}
        self.faults: list[str] = []  # why cells with samples gave no outcomes
        self._chances: dict[tuple[str, str], list[Any]] = {}  # by cell and task, of those read
        self._kept = lru_cache(KEPT_FILES)(self._read)

    def rows(self, cell: Result, task: str) -> Sequence[dict[str, Any]]:
        """A task's documents, none where the cell has no samples of it.

        Raises UserError naming a file that cannot be read.
        """
        return self._kept(cell["id"], task)

    def _read(self, cell: str, task: str) -> list[dict[str, Any]]:
        path = self._folders[cell] / "samples" / f"{task}.jsonl"
        packed = path.with_name(f"{path.name}.gz")  # as in published cells
        if not path.is_file() and not packed.is_file():
            return []
        try:
            text = path.read_bytes() if path.is_file() else gzip.decompress(packed.read_bytes())
            rows: list[dict[str, Any]] = from_json(b"[" + b",".join(text.splitlines()) + b"]")
            if (odd := next((i for i, row in enumerate(rows, 1) if not _is_row(row)), 0)) > 0:
                raise ValueError(f"line {odd} has no id, no weight, or a metric that is no number")
        except (OSError, ValueError, EOFError) as error:
            hint = f"remove the folder {path.parents[1]} to compute the cell again"
            raise UserError(f"{path} is no list of samples: {error}", hint) from error
        self._chances[cell, task] = [row.get("chance") for row in rows]
        return rows

    def outcomes(self, cells: Sequence[Result], task: str, metric: str) -> Outcomes | None:
        """Those of the cells of one row, a seed each; None where one of them has no samples."""
        from ctdbench.report.pairing import Outcomes

        rows = {cell["spec"]["seed"]: self.rows(cell, task) for cell in cells}
        if not all(rows.values()):
            return None
        method = cells[0]["spec"]["method"]
        try:
            return Outcomes.from_rows(task, metric, rows, trained=not results.is_baseline(method))
        except UserError as error:
            self.faults.append(f"{method}: {error}")
            return None

    def chance(self, cell: Result, task: str) -> list[float] | None:
        """Of every document what a guesser scores; None where that is not recorded."""
        if (cell["id"], task) not in self._chances:
            self.rows(cell, task)
        chances = self._chances.get((cell["id"], task))
        return None if not chances or None in chances else chances


class Bootstraps:
    """`statistics.bootstrap`, each computed once: kept in the cache under a hash of its input."""

    def __init__(self) -> None:
        self._path = cache_dir() / "bootstraps.json"
        self._known = _read(self._path)
        self._used: dict[str, list[float]] = {}

    def __call__(self, x: Array, items: Items) -> Interval:
        """Interval and p-value of the weighted mean of `x` [n]."""
        from ctdbench.report import statistics

        if items.freedom < 1:  # no interval, and JSON knows no infinity
            return statistics.bootstrap(x, items)
        key = _key(x, items)
        if key not in self._known:
            self._known[key] = list(statistics.bootstrap(x, items))
        self._used[key] = self._known[key]
        return statistics.Interval(*self._known[key])

    def keep(self) -> None:
        """Write what was used, newest last. A cache that cannot be written to is no error."""
        if self._used.keys() <= _read(self._path).keys():
            return
        merged = {k: v for k, v in _read(self._path).items() if k not in self._used} | self._used
        newest = dict(list(merged.items())[-KEPT:])
        try:
            results.write_json_atomic(self._path, newest)
        except RunError:
            return


def _is_row(row: Any) -> bool:
    if not (isinstance(row, dict) and isinstance(row.get("id"), str)):
        return False
    kinds = {type(value) for name, value in row.items() if name not in TEXTS}
    return kinds <= NUMBERS and 0 < (row.get("weight") or 0) < math.inf


def _read(path: Path) -> dict[str, list[float]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _key(x: Array, items: Items) -> str:
    from ctdbench.report import statistics

    digest = hashlib.sha256(f"{statistics.BOOTSTRAP_VERSION} {statistics.DRAWS}".encode())
    for part in (x, items.weights, *items.subsets):
        digest.update(part.tobytes())
    return digest.hexdigest()[:32]
