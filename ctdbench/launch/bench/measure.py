"""Seconds and bytes: functions timed in turns, and the most memory that one holds meanwhile."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ctdbench.distill.train import peak_memory, reset_peak_memory
from ctdbench.errors import PreflightError

Function = Callable[[], object]
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
MIB = 2**20


@dataclass(frozen=True)
class Timing:
    """Seconds: the median of the repeats, the fastest and the slowest."""

    median: float
    low: float
    high: float


def interleaved(
    functions: Mapping[str, Function], repeats: int = 7, *, progress: bool = False
) -> dict[str, Timing]:
    """Time functions in turns, so that what slows the machine for a while slows all of them.

    Each is called once beforehand. They run in the mapping's order, so that one may use up what the
    one before it left (a backward, its forward's graph).
    """
    from tqdm import tqdm

    seconds: dict[str, list[float]] = {name: [] for name in functions}
    with _no_collection(), tqdm(total=(1 + repeats) * len(functions), disable=not progress) as bar:
        for _ in range(1 + repeats):
            gc.collect()
            for name, function in functions.items():
                bar.set_description(name)
                seconds[name].append(_seconds(function))
                bar.update()
    return {name: _timing(taken[1:]) for name, taken in seconds.items()}


def extra_peak_bytes(function: Function) -> int:
    """The most memory that a call holds above what was held before it.

    Call it once before, or what is loaded and built only once counts, too. With a GPU: bytes of its
    allocator. Else pages of this process (resident set, Linux alone), which hold everything: torch,
    NumPy, what C++ takes for itself; memory that is never written has none. Beforehand freed memory
    goes back to the system, and blocks from 64 KiB on are mapped, not kept when freed, so that the
    count is exact but for some 100 KiB; where the kernel counts pages core by core, as Linux from
    6.2 on, for some MiB on a machine of many cores. Raises PreflightError on other systems.
    """
    if not torch.cuda.is_available() and not Path("/proc/self/clear_refs").exists():
        raise PreflightError("peak memory cannot be measured here", "use Linux, or a GPU")
    gc.collect()
    with _mapped_blocks():
        reset_peak_memory()
        before = peak_memory()
        function()
        return peak_memory() - before


def _timing(seconds: Sequence[float]) -> Timing:
    return Timing(statistics.median(seconds), min(seconds), max(seconds))


def _seconds(function: Function) -> float:
    _synchronise()
    start = time.perf_counter()
    function()
    _synchronise()
    return time.perf_counter() - start


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _mapped_blocks() -> Iterator[None]:
    """No freed memory is kept by glibc, where it is the allocator."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, MIB // 16)
    try:
        yield
    finally:  # where glibc's moving thresholds end up once a large block was freed
        libc.mallopt(M_MMAP_THRESHOLD, 32 * MIB)
        libc.mallopt(M_TRIM_THRESHOLD, 64 * MIB)
