"""What this machine has room for: GPUs, cores, memory. Asks the system, never torch.

A sweep runs for days beside its cells, so it must not hold a GPU's context itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MIB = 2**20
BFLOAT16_SINCE = 8.0  # compute capability of the first GPUs (Ampere) that multiply in it
QUERY = ("index", "uuid", "memory.total", "compute_cap")
CGROUPS = (  # a container's limit: version 2, version 1
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


@dataclass(frozen=True)
class Gpu:
    """name: as CUDA_VISIBLE_DEVICES takes it, in the order of the bus. memory: bytes."""

    name: str
    memory: int
    bfloat16: bool


@cache
def gpus() -> tuple[Gpu, ...]:
    """NVIDIA GPUs that a process started now would see, in its order; none without a driver."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ()
    found: dict[str, Gpu] = {}
    for line in told.stdout.splitlines():
        index, name, mebibytes, capability = (part.strip() for part in line.split(","))
        memory, since = _number(mebibytes), _number(capability)
        gpu = Gpu(index, int(memory * MIB) or sys.maxsize, not since or since >= BFLOAT16_SINCE)
        found |= {index: gpu, name: Gpu(name, gpu.memory, gpu.bfloat16)}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(gpu for name, gpu in found.items() if name.isdigit())
    return tuple(found[name.strip()] for name in visible.split(",") if name.strip() in found)


def _number(told: str) -> float:
    """0 for what a driver does not tell: memory that a GPU shares with the processor, say."""
    try:
        return float(told)
    except ValueError:
        return 0.0


def threads() -> int:
    """OMP_NUM_THREADS where it is set, else the cores that this process may use."""
    stated = os.environ.get("OMP_NUM_THREADS", "")
    if stated.isdigit() and int(stated):
        return int(stated)
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1


def free_memory() -> int | None:
    """Bytes that processes may still take, a container's limit heeded; None where not told."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    return min([free, *_container_limits()])


def _container_limits() -> Iterator[int]:
    for path in CGROUPS:
        with suppress(OSError, ValueError):  # no such group, or `max`: no limit
            yield int(Path(path).read_text(encoding="ascii"))
