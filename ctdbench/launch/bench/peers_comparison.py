"""What is compared with a peer, how much of it, and the table that shows it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ctdbench.errors import PreflightError
from ctdbench.launch.bench.measure import Function, Timing, interleaved

COLUMNS = ("", "ours", "theirs", "ratio", "memory", "divergence", "target")
GAP = "  "
INSTALL = "run it by `make bench-peers`, which installs them into an environment of their own"


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    rows: of either side in `gold` and `uld`. repeats: of every loss. beam_bytes: of every text
    in `beam`; beam_repeats: of everything there, for its peer takes minutes.
    """

    rows: int = 256
    repeats: int = 7
    beam_bytes: int = 140
    beam_repeats: int = 1


@dataclass(frozen=True)
class Comparison:
    """One line of the table. seconds: ours and theirs; extra_bytes: likewise, where measured.

    least: how many times faster ours should be. most: of our extra memory over theirs. divergence:
    of our result over theirs, both from the truth; bounded: whether it should be 1 at most.
    note: how the two results compare, and what was measured.
    """

    what: str
    seconds: tuple[Timing, Timing]
    least: float
    note: str
    extra_bytes: tuple[int, int] | None = None
    most: float | None = None
    divergence: float | None = None
    bounded: bool = False

    @property
    def ratio(self) -> float:
        """Their time over ours."""
        return self.seconds[1].median / self.seconds[0].median

    @property
    def memory(self) -> float | None:
        """Our extra memory over theirs; None where theirs is not known."""
        ours, theirs = self.extra_bytes or (0, 0)
        return ours / theirs if theirs else None

    def cells(self) -> list[str]:
        """What the table shows."""
        sides = [_timing(timing) for timing in self.seconds]
        if self.extra_bytes:
            sides = [
                f"{side}, {size / 1e6:.0f} MB"
                for side, size in zip(sides, self.extra_bytes, strict=True)
            ]
        beside = [
            "" if share is None else f"{share:.2f}" for share in (self.memory, self.divergence)
        ]
        return [self.what, *sides, f"{self.ratio:.1f}", *beside, self._target()]

    def _target(self) -> str:
        goals = [(f">= {self.least:g}", self.ratio >= self.least)]
        if self.most is not None and self.memory is not None:
            goals.append((f"memory <= {self.most:.2f}", self.memory <= self.most))
        if self.bounded and self.divergence is not None:
            goals.append(("divergence <= 1", self.divergence <= 1))
        return ", ".join(f"{goal} {'met' if met else 'MISSED'}" for goal, met in goals)


def table(found: Sequence[Comparison]) -> str:
    """The comparisons in columns, their notes below."""
    rows = [list(COLUMNS), *(comparison.cells() for comparison in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [GAP.join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, *(f"{each.what}: {each.note}" for each in found)])


def in_turns(functions: Mapping[str, Function], repeats: int) -> dict[str, Timing]:
    """Times of functions that are called in turns, with a progress bar for who watches."""
    return interleaved(functions, repeats, progress=sys.stderr.isatty())


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def missing(error: ImportError) -> PreflightError:
    """A peer that is not installed."""
    return PreflightError(f"{error.name or error} is not installed here", INSTALL)


def _timing(timing: Timing) -> str:
    spread = "" if timing.low == timing.high else f" ({timing.low:.3g}-{timing.high:.3g})"
    return f"{timing.median:.3g}{spread} s"
