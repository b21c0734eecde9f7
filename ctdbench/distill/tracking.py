"""A run's metrics in a tracker as well, through accelerate; nothing is tracked unless asked.

metrics.jsonl is written in any case. What a tracker keeps on disk lies in the cell's folder.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctdbench.errors import PreflightError
from ctdbench.results import TRACKING
from ctdbench.spec import RunSpec

if TYPE_CHECKING:
    from accelerate import Accelerator

PROJECT = "ctdbench"


def require(tracker: str) -> None:
    """Raise PreflightError if the package of a tracker of accelerate's is not installed."""
    if find_spec(tracker) is None:
        raise PreflightError(
            f"--track {tracker}: its package is not installed", f"pip install {tracker}"
        )


@contextmanager
def tracked(accelerator: Accelerator, spec: RunSpec, folder: Path, step: int) -> Iterator[None]:
    """What `accelerator.log` gets meanwhile goes to the accelerator's tracker, if it has one.

    The run is called <pair>/<method>/<cell id>. step: the last one that is done; where it is not 0
    the same run goes on. Raises PreflightError if the tracker does not start (no login, say).
    """
    if not accelerator.log_with:
        yield
        return
    if accelerator.is_main_process:
        (folder / TRACKING).mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TRACKIO_DIR", str(folder / TRACKING))  # read as trackio is imported
    try:
        with redirect_stdout(sys.stderr):  # a run's own output is its table
            accelerator.init_trackers(PROJECT, init_kwargs=_arguments(spec, folder, step))
    except Exception as error:
        told = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise PreflightError(f"--track: the tracker does not start ({told})") from error
    try:
        yield
    finally:  # not `end_training`, which also ends the processes' connection
        with redirect_stdout(sys.stderr):
            for tracker in accelerator.trackers:
                tracker.finish()


def _arguments(spec: RunSpec, folder: Path, step: int) -> dict[str, dict[str, Any]]:
    """What each tracker's start is given; of the settings, those that can change the result."""
    place = str(folder / TRACKING)
    shared = {"name": "/".join(folder.parts[-3:]), "config": spec.identity()}
    return {
        # Points after `step` are of an attempt that was stopped; they come again.
        "tensorboard": {"purge_step": step + 1},
        "trackio": {**shared, "resume": "allow" if step else "never"},
        "wandb": {**shared, "id": folder.name, "resume": "allow" if step else None, "dir": place},
    }
