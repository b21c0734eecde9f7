"""Checkpoints of a run: safetensors and JSON, complete or absent. No pickle is written or read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ctdbench.errors import RunError

TENSORS, STATE = "tensors.safetensors", "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's state of a parameter
KEPT = 2  # the newest may turn out truncated after a power cut


def save(
    folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Write `folder/step-N`, then remove all but the newest two checkpoints.

    Holds every trained parameter, AdamW's moments and `state`, whose "step" is N; a reader sees it
    whole or not.
    """
    target = folder / f"step-{state['step']:07d}"
    temporary = folder / f"{target.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(_tensors(network, optimizer), temporary / TENSORS)
    (temporary / STATE).write_text(json.dumps(state), encoding="utf-8")
    for name in (TENSORS, STATE):
        with (temporary / name).open("rb") as stream:
            os.fsync(stream.fileno())
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    for older in _all(folder)[:-KEPT]:
        shutil.rmtree(older)


def load(
    folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Restore the newest checkpoint that can be read, in place, and return its state.

    None where there is no checkpoint. Raises RunError, naming the newest, where none can be read.
    """
    failures: list[tuple[Path, Exception]] = []
    for path in reversed(_all(folder)):
        try:
            tensors = load_file(path / TENSORS)
            state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
            _restore(tensors, network, optimizer)
            return state
        except Exception as error:  # truncated, foreign or of another shape: the same to the user
            failures.append((path, error))
    if failures:
        newest, cause = failures[0]
        reason = str(cause).partition("\n")[0]
        raise RunError(f"checkpoint {newest} cannot be read ({reason})", f"delete {folder}")
    return None


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".tmp")


def _trained(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def _tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in _trained(network).items():
        tensors[f"parameter:{name}"] = parameter.detach().contiguous()
        for key in MOMENTS:
            if key in optimizer.state[parameter]:
                tensors[f"{key}:{name}"] = optimizer.state[parameter][key].contiguous()
    return tensors


@torch.no_grad()
def _restore(
    tensors: dict[str, Tensor], network: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    for name, parameter in _trained(network).items():
        parameter.copy_(tensors[f"parameter:{name}"])
        optimizer.state[parameter] = {
            key: tensors[f"{key}:{name}"].to("cpu" if key == "step" else parameter.device)
            for key in MOMENTS
            if f"{key}:{name}" in tensors
        }
