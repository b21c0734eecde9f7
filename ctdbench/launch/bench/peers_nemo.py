"""Our P-KL and H-KL beside the times of X-Token's own code in NeMo-RL.

PyPI has no NeMo-RL (its `nemo-rl` is an empty placeholder), so their times are constants and not of
this run: taken beforehand on two threads of a machine with two cores, at 32,768 x 32,768 tokens and
128 rows. Another machine, or one that is not idle, shifts the ratios.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from ctdbench.launch.bench.inputs import Inputs, make_inputs
from ctdbench.launch.bench.losses import make_block
from ctdbench.launch.bench.measure import Timing
from ctdbench.launch.bench.peers_comparison import Comparison, Settings, in_turns, threads
from ctdbench.method import create, total_loss

SIZES, ROWS, THREADS = (32_768, 32_768), 128, 2
STATED: dict[str, tuple[str, dict[str, Any], float]] = {  # method, its options, their seconds
    "p-kl": ("p-kl", {}, 0.117),
    "h-kl": ("h-kl", {}, 0.207),
    "h-kl strict (their gold)": ("h-kl", {"partition": "strict"}, 0.207),
}


def compare(settings: Settings) -> list[Comparison]:
    """Ours, measured, and theirs, as stated."""
    given = make_inputs(SIZES, ROWS, torch.device("cpu"))
    functions = {name: _loss(given, *stated[:2]) for name, stated in STATED.items()}
    with threads(THREADS):
        timings = in_turns(functions, settings.repeats)
    return [_comparison(name, timings[name], STATED[name][2], settings.repeats) for name in STATED]


def _comparison(name: str, timing: Timing, stated: float, repeats: int) -> Comparison:
    note = "theirs is a stated figure, not of this run: compare on an idle machine (load now "
    note += f"{os.getloadavg()[0]:.1f}); {ROWS} rows, {repeats} repeats, {THREADS} threads"
    theirs = Timing(stated, stated, stated)
    return Comparison(f"{name} (NeMo-RL)", (timing, theirs), 2, note)


def _loss(given: Inputs, name: str, options: dict[str, Any]) -> Callable[[], object]:
    """Forward and backward, with the choice of the teacher's tokens, without CE."""
    method = create(name, options)

    def run() -> object:
        loss = total_loss(method, None, method.terms(make_block(method, given), {}))
        return torch.autograd.grad(loss, given.student.scores())

    return run
