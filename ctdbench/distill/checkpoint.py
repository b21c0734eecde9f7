"""Checkpoints of a run: safetensors and JSON, complete or absent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ctdbench import atomic
from ctdbench.distill.processes import share, whole
from ctdbench.distill.references import fingerprint
from ctdbench.errors import RunError

TENSORS, STATE = "tensors.safetensors", "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's state of a parameter
KEPT = 2  # the newest may turn out damaged


def save(
    folder: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    writes: bool = True,
) -> None:
    """Write `folder/step-N`, then remove all but the newest two checkpoints.

    Holds every trained parameter, AdamW's moments and `state`, whose "step" is N; a reader sees it
    whole or not. All processes call it, for they may hold shares of parameters; `writes` is true in
    the one that writes. Raises RunError where the disk is full.
    """
    tensors = _tensors(network, optimizer, kept=writes)
    if not writes:
        return
    target = folder / f"step-{state['step']:07d}"
    for path in _all(folder):
        if path.name >= target.name:  # it could not be read, or the run would be past it
            shutil.rmtree(path)
    with atomic.new_folder(target) as temporary:
        save_file(tensors, temporary / TENSORS)
        sums = {TENSORS: fingerprint(temporary / TENSORS)}
        text = json.dumps({"sha256": sums, "state": state})
        (temporary / STATE).write_text(text, encoding="utf-8")
    for older in _all(folder)[:-KEPT]:
        shutil.rmtree(older)


def load(
    folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Restore the newest checkpoint that is intact, in place, and return its state.

    None where there is no checkpoint. Raises RunError, naming the newest, where none is intact.
    """
    failures: list[tuple[Path, Exception]] = []
    for path in reversed(_all(folder)):
        try:
            state, tensors = _read(path)
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
    return sorted(folder.glob("step-*"))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """State and tensors as they were written; raises for anything else."""
    stored = json.loads((path / STATE).read_text(encoding="utf-8"))
    for name, digest in stored["sha256"].items():
        if fingerprint(path / name) != digest:
            raise ValueError(f"{name} is damaged")
    return stored["state"], load_file(path / TENSORS)


def _trained(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def _tensors(
    network: nn.Module, optimizer: torch.optim.Optimizer, *, kept: bool
) -> dict[str, Tensor]:
    """What a checkpoint holds; where it is not kept, nothing, but this process gives its shares."""
    tensors = {}
    for name, parameter in _trained(network).items():
        moments = optimizer.state[parameter]
        found = {"parameter": parameter.detach()} | {k: moments[k] for k in MOMENTS if k in moments}
        for key, tensor in found.items():
            gathered = whole(tensor)
            if kept:
                tensors[f"{key}:{name}"] = gathered.to("cpu").contiguous()
    return tensors


@torch.no_grad()
def _restore(
    tensors: dict[str, Tensor], network: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    shapes = {f"parameter:{name}": p.shape for name, p in _trained(network).items()}
    stored = {key: tensor.shape for key, tensor in tensors.items() if key in shapes}
    if stored != shapes:
        raise ValueError("it is of another network")
    for name, parameter in _trained(network).items():
        parameter.copy_(share(tensors[f"parameter:{name}"], parameter))
        moments = {key: tensors[f"{key}:{name}"] for key in MOMENTS if f"{key}:{name}" in tensors}
        optimizer.state[parameter] = {
            key: tensor if key == "step" else share(tensor, parameter)
            for key, tensor in moments.items()
        }
