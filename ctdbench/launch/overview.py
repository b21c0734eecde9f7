"""A sweep as text: its cells, what they will take, what tuning said, what would fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ctdbench.errors import UserError
from ctdbench.launch.cache_use import cache_use
from ctdbench.launch.estimate import Estimate
from ctdbench.launch.grid import key_of
from ctdbench.launch.preflight import Scarce, estimated
from ctdbench.launch.sweep import RUNS, Place, Sweep
from ctdbench.results import State
from ctdbench.spec import RunSpec, format_bytes

SHOWN: dict[State, str] = {"absent": "missing"}  # how a person calls a state
AFTER_TRIALS, UNKNOWN = "after its trials", "?"
HEADER = ("", "state", "FLOPs", "memory")


@dataclass(frozen=True)
class _Row:
    """due: whether the sweep would run it. spec: as far as it is known."""

    title: str
    state: str
    due: bool
    spec: RunSpec | None = None

    @cached_property
    def cost(self) -> Estimate | None:
        """None where it is not known."""
        return estimated(self.spec) if self.spec else None


def overview(sweep: Sweep, problems: Sequence[UserError]) -> str:
    """Every cell with its state and cost, as far as all that they need is there, and what fails."""
    known = is_known(problems)
    rows = list(_known(sweep) if known else _unknown(sweep))
    counts = Counter(row.state for row in rows)
    listed = ", ".join(f"{count} {state}" for state, count in counts.items())
    lines = [*_aligned(rows), "", f"{len(rows)} cells: {listed}", *_due(rows)]
    lines += tuning(sweep) if known else []
    lines += [f"would fail: {problem}" for problem in problems]
    return "\n".join(lines) + "\n"


def is_known(problems: Sequence[UserError]) -> bool:
    """Whether the cells are: what there is too little of says nothing against that."""
    return all(isinstance(problem, Scarce) for problem in problems)


def tuning(sweep: Sweep) -> Iterator[str]:
    """What the trials that are done said, row by row."""
    for line, found in zip(sweep.lines, sweep.tuned(), strict=True):
        if line.tuning is not None and found.scores:
            told = ", ".join(f"{score:.4g} at {value}" for value, score in found.scores.items())
            chosen = "not decided" if found.why else choice(found.value, line.tuning.values)
            yield f"{line.title}: {line.tuning.field} {chosen} ({line.tuning.select}: {told})"


def choice(value: Any, tried: Sequence[Any]) -> str:
    """The value, and whether it is the last one that way, so that the best may lie further out."""
    if all(type(one) in (int, float) for one in tried):
        for name, end in (("smallest", min), ("largest", max)):
            if value == end(tried):
                return f"{value}, the {name} that was tried"
    return str(value)


def _known(sweep: Sweep) -> Iterator[_Row]:
    yield from (_row(place.title, place, sweep) for place in sweep.trials)
    found = {key_of(place.cell.spec): place for place in sweep.finals()}
    for line, tuned in zip(sweep.lines, sweep.tuned(), strict=True):
        for cell in line.finals(tuned.value):
            if tuned.why:
                due = "absent" in RUNS[sweep.when]
                yield _Row(cell.title, AFTER_TRIALS, due, cell.spec)
            else:
                yield _row(cell.title, found[cell.key], sweep)


def _row(title: str, place: Place, sweep: Sweep) -> _Row:
    state = place.state
    due = state in RUNS[sweep.when]
    return _Row(title, SHOWN.get(state, state), due, place.cell.spec)


def _unknown(sweep: Sweep) -> Iterator[_Row]:
    for line in sweep.lines:
        cells = [*line.trials, *line.finals()]
        yield from (_Row(cell.title, UNKNOWN, False) for cell in cells)


def _due(rows: Sequence[_Row]) -> Iterator[str]:
    """What the cells that would run take together, as far as it is known."""
    costs = [row.cost for row in rows if row.due and row.cost is not None]
    if costs:
        memory, disk = (max(getattr(cost, of) for cost in costs) for of in ("memory", "disk"))
        yield (
            f"{len(costs)} to run, about {sum(cost.flops for cost in costs):.2g} FLOPs of "
            f"training; each about {format_bytes(memory)} of memory or less, and at most "
            f"{format_bytes(disk)} of disk while it runs; "
            f"{format_bytes(sum(cost.kept for cost in costs))} of disk to keep"
        )
    if specs := [row.spec for row in rows if row.due and row.spec]:
        taken = cache_use(specs, {})
        yield (
            f"cache, at most: {format_bytes(taken.examples)} of tokenized text and "
            f"{format_bytes(taken.states)} of teacher states, shared by cells with the same text"
        )


def _aligned(rows: Sequence[_Row]) -> Iterator[str]:
    cells = [HEADER, *map(_texts, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for texts in cells:
        padded = [text.ljust(width) for text, width in zip(texts, widths, strict=True)]
        yield "  ".join(padded).rstrip()


def _texts(row: _Row) -> tuple[str, ...]:
    cost = row.cost
    costs = (f"{cost.flops:.1e}", format_bytes(cost.memory)) if cost else ("-", "-")
    return (row.title, row.state, *costs)
