"""A cell's trained student, kept beside its result where that was asked for (`train.keep_model`).

Off by default: a model of 135M parameters takes 540 MB, a grid of 100 cells of it 54 GB. A cell
that is done without its weights is computed again when they are asked for. Its result stays until
the new one is there, and weights come after it: a model and its scores are always of one training.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ctdbench import atomic, results
from ctdbench.distill import models, saving
from ctdbench.distill.models import Side
from ctdbench.errors import UserError
from ctdbench.results import Result
from ctdbench.spec import ModelSpec

DUE = f"{results.CHECKPOINTS}/.keep-model"  # of these checkpoints weights are to come


def announce(folder: Path) -> None:
    """Note that the training that begins is to leave weights."""
    atomic.write_bytes(folder / DUE, b"")


def are_due(folder: Path) -> bool:
    """Whether weights are still to come of the checkpoints in a cell's folder."""
    return (folder / DUE).exists() and not (folder / results.MODEL).is_dir()


def discard(folder: Path) -> None:
    """Remove the weights of an earlier run."""
    shutil.rmtree(folder / results.MODEL, ignore_errors=True)


def keep(student: Side, folder: Path) -> None:
    """Write the student as it is evaluated; raises UserError as `saving.save` does."""
    with atomic.new_folder(folder / results.MODEL) as temporary:
        saving.save(student, temporary)


def load(folder: Path, result: Result, *, trust_remote_code: bool = False) -> Side:
    """The student of a finished cell; raises UserError where its weights were not kept."""
    path = folder / results.MODEL
    if not path.is_dir():
        request = folder / results.REQUEST
        how = f"--config {request}" if request.is_file() else "... (as it was run)"
        raise UserError(
            f"cell {result['id']}: its weights were not kept",
            f"ctdbench run {how} --keep-model computes it again with its weights",
        )
    named = ModelSpec(model=f"dir:{path}")
    return models.load_side(named, trust_remote_code=trust_remote_code)
