"""Numbers that papers printed (`results/papers/*.csv`), one table of one paper at a time.

Protocols differ between papers and between the tables of one paper, so there is no way to look
a number up without naming its table. What each file holds: results/papers/README.md.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import NamedTuple

from ctdbench.errors import PreflightError, UserError
from ctdbench.registry import suggestion

PACKAGE = "ctdbench_results"


class Key(NamedTuple):
    """What a number belongs to, in the paper's words; tasks have lm-eval's names."""

    setting: str
    method: str
    task: str
    metric: str


@dataclass(frozen=True)
class Reported:
    """A number as printed: per cent, unless the metric is no share (`count`, `bert_f1`).

    stderr: only where the paper prints one. provenance: `primary`, `two-sources` or `one-source`.
    student, teacher: as the paper names them; empty where there is none.
    """

    value: float
    stderr: float | None
    provenance: str
    student: str
    teacher: str
    note: str


@dataclass(frozen=True)
class PaperTable:
    """All numbers of one table that could be read."""

    paper: str
    table: str
    numbers: Mapping[Key, Reported]

    def find(self, setting: str, method: str, task: str, metric: str = "acc") -> Reported | None:
        """The printed number; None where it could not be read."""
        return self.numbers.get(Key(setting, method, task, metric))


def read(paper: str, table: str) -> PaperTable:
    """A table, as `read("alm", "Table 3")`; raises UserError for one that is not there."""
    known = _tables()
    if (paper, table) not in known:
        names = [" ".join(name) for name in known]
        hint = suggestion(f"{paper} {table}", names)
        raise UserError(f"no numbers of {paper} {table} in results/papers", hint)
    return PaperTable(paper, table, known[paper, table])


def tables() -> list[tuple[str, str]]:
    """(paper, table) of every table there is."""
    return sorted(_tables())


@cache
def _tables() -> dict[tuple[str, str], dict[Key, Reported]]:
    found: dict[tuple[str, str], dict[Key, Reported]] = {}
    for row in _rows():
        key = Key(row["setting"], row["method"], row["task"], row["metric"])
        numbers = found.setdefault((row["paper"], row["table"]), {})
        if key in numbers:
            raise UserError(f"results/papers: two numbers for {row['table']}, {', '.join(key)}")
        numbers[key] = Reported(
            value=float(row["value"]),
            stderr=float(row["stderr"]) if row["stderr"] else None,
            provenance=row["provenance"],
            student=row["student"],
            teacher=row["teacher"],
            note=row["note"],
        )
    return found


def _rows() -> Iterator[dict[str, str]]:
    try:
        folder = resources.files(PACKAGE) / "papers"
        files = sorted(
            (entry for entry in folder.iterdir() if entry.name.endswith(".csv")),
            key=lambda entry: entry.name,
        )
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise PreflightError(
            f"the papers' numbers (package {PACKAGE}) are missing", "pip install -e ."
        ) from error
    for entry in files:
        yield from csv.DictReader(io.StringIO(entry.read_text(encoding="utf-8")))
