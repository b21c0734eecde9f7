"""Slurm's own commands: what is in the user's queue, and what is put there."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ctdbench.errors import PreflightError, UserError
from ctdbench.launch.preflight import Scarce

CALL_SECONDS = 120.0  # that Slurm has to answer
FORMAT = "%F|%K|%T|%r|%j"  # fields of Entry
STATES = "COMPLETED FAILED CANCELLED TIMEOUT DEADLINE PREEMPTED OUT_OF_MEMORY NODE_FAIL BOOT_FAIL"
OVER = frozenset(STATES.split())  # Slurm's names; in any other a task goes on, or will


@dataclass(frozen=True)
class Entry:
    """A task of an array. Slurm lists it for some minutes after its end.

    reason: why it waits. name: of the array.
    """

    array: str
    index: int
    state: str
    reason: str
    name: str

    @property
    def is_over(self) -> bool:
        """It has ended, and not to be requeued."""
        return self.state in OVER


def missing() -> list[UserError]:
    """What keeps this machine from submitting anything."""
    hint = "call it on a login node of the cluster"
    lacking = Scarce("--launcher slurm: there is no sbatch on this machine", hint)
    return [] if shutil.which("sbatch") else [lacking]


def queue() -> list[Entry]:
    """Tasks of all of the user's arrays; raises PreflightError where Slurm does not answer."""
    told = _call("squeue", "--me", "--array", "--states=all", "--noheader", f"--format={FORMAT}")
    found = []
    for line in told.splitlines():
        array, index, state, reason, name = (*line.strip().split("|", 4), *[""] * 4)[:5]
        if index.isdigit():  # a job of its own has none
            found.append(Entry(array, int(index), state, reason, name))
    return found


def submit(
    script: Path, indices: Sequence[int], at_once: int | None = None, *, after: str | None = None
) -> str:
    """The array that these tasks of a script are in; raises PreflightError where Slurm refuses.

    after: an array that has to be over, whatever came of it.
    """
    chosen = ",".join(map(str, indices)) + (f"%{at_once}" if at_once else "")
    dependency = [f"--dependency=afterany:{after}"] if after else []
    told = _call("sbatch", "--parsable", f"--array={chosen}", *dependency, str(script))
    return told.splitlines()[-1].partition(";")[0].strip()  # the cluster's name may follow


def release(array: str) -> None:
    """It waits for no other any more; raises PreflightError where Slurm refuses."""
    _call("scontrol", "update", f"JobId={array}", "Dependency=")


def _call(*command: str) -> str:
    """What a command prints; it is deaf to a terminal's Ctrl-C."""
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=CALL_SECONDS, start_new_session=True
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PreflightError(f"{command[0]} does not answer: {error}") from error
    if ended.returncode:
        told = next(iter(ended.stderr.strip().splitlines()), f"exit code {ended.returncode}")
        hint = "--slurm-option NAME=VALUE gives what the cluster asks for"
        raise PreflightError(told, hint if command[0] == "sbatch" else "")
    return ended.stdout
