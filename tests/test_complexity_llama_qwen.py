"""A step of the shape of llama-qwen, with tiny bodies: its memory above the models, by method.

Real sizes of the vocabularies, 2 documents of 1,024 tokens.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from counted_allocations import Allocations
from sized_pairs import batch_of, pair_for, step_of, text_of

from ctdbench import registry
from ctdbench.method import create
from ctdbench.spec import TrainSpec

LLAMA, QWEN = 128_256, 151_936
LIMIT = 3 * 2**30
PROCESS = Path("/proc/self")


def resident(call: Callable[[], object]) -> int:
    """Bytes by which the process's resident memory grows at most in a call."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator kept would be used again, unseen
    (PROCESS / "clear_refs").write_text("5", encoding="ascii")
    before = _kilobytes("VmRSS")
    call()
    return 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(field: str) -> int:
    status = (PROCESS / "status").read_text(encoding="ascii")
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1])


@pytest.mark.slow
@pytest.mark.skipif(not (PROCESS / "clear_refs").exists(), reason="Linux tells peak memory")
@pytest.mark.parametrize("name", sorted(registry.methods()))
def test_a_step_stays_under_3_gib(name: str) -> None:
    method = create(name)
    pair = pair_for(method, (LLAMA, QWEN), width=64, layers=2)
    step = step_of(method, pair, TrainSpec().block_rows)
    step.gradients([batch_of([text_of(pair, 60)], pair)])  # tables are made when first used
    step.network.zero_grad(set_to_none=True)
    batch = batch_of([text_of(pair, 1022)] * 2, pair)  # and BOS and the end
    assert batch.student.ids.shape == (2, 1024)
    with Allocations() as seen:
        taken = resident(lambda: step.gradients([batch]))
    assert max(seen.peak, taken) < LIMIT, seen.maker
