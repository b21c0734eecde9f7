"""Commands as tasks of a Slurm job array: submitted, then waited for.

A task is over once it has left Slurm's queue; one that is requeued has not. Its script leaves its
exit code in a file; where there is none, its last state has to do. What an earlier call submitted
and what is still in the queue is waited for, and not submitted again.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ctdbench import atomic
from ctdbench.errors import PreflightError
from ctdbench.launch.local import POLL_SECONDS, STOPPING, Ended, Job, Stopped, noted
from ctdbench.launch.progress import Display
from ctdbench.launch.slurm_queue import Entry, queue, release, submit
from ctdbench.launch.slurm_script import Script, render
from ctdbench.results import RESULT

ASK_SECONDS = 15.0  # between two looks at the queue
LATE_SECONDS = 60.0  # that a file may take to be seen from another machine
CELLS = "cells.json"  # beside a script: the folders of its tasks' jobs
STOPPED = 128 + signal.SIGTERM
UNTOLD = {"OUT_OF_MEMORY": 128 + signal.SIGKILL, "FAILED": 1, "BOOT_FAIL": 1}  # else STOPPED


@dataclass(frozen=True)
class Task:
    """Where a job is in the queue, and the folder of its script."""

    array: str
    index: int
    folder: Path


@dataclass(frozen=True)
class Cluster:
    """A launcher of arrays.

    folder: of a store's arrays. options: of sbatch, as for `slurm_script.parse`. at_once: how many
    tasks may run at a time.
    """

    folder: Path
    options: tuple[str, ...] = ()
    at_once: int | None = None

    def script(self, jobs: Sequence[Job]) -> Script:
        """What would be submitted."""
        return render(jobs, self.folder, self.options, self.at_once)

    def run(self, jobs: Sequence[Job], ended: Ended, display: Display | None = None) -> None:
        """Submit what is not in the queue, and wait for all.

        SIGINT and SIGTERM leave the queue as it is and raise Stopped. Raises PreflightError where
        Slurm does not answer or refuses.
        """
        display = display or Display()
        with noted(*STOPPING) as came, display:
            tasks = _in_queue(jobs, self.folder)
            if tasks:
                display.say(f"{len(tasks)} of {len(jobs)} cells are in Slurm's queue already")
            if new := [job for job in jobs if job not in tasks]:
                script = self.script(new)
                tasks |= _submit(new, script, self.at_once)
                display.say(f"submitted {len(new)} cells: {script.path}")
            watch = _Watch(jobs, ended, display, tasks, may_release=self.at_once is None)
            while not came and watch.step():
                time.sleep(POLL_SECONDS)
            if came:
                watch.say_what_stays()
        if came:
            raise Stopped(came[0])


def _in_queue(jobs: Iterable[Job], folder: Path) -> dict[Job, Task]:
    """Those of the jobs that an earlier call submitted and that are not over."""
    named = {_named(job, folder): job for job in jobs}
    found = {}
    for entry in queue():
        task = Task(entry.array, entry.index, folder.absolute() / entry.name)
        if not entry.is_over and (task.folder / CELLS).is_file():
            name = json.loads((task.folder / CELLS).read_bytes())[entry.index]
            if name in named:
                found[named[name]] = task
    return found


def _named(job: Job, folder: Path) -> str:
    return os.path.relpath(job.log.parent, folder)


def _submit(jobs: Sequence[Job], script: Script, at_once: int | None) -> dict[Job, Task]:
    """The first job of every group, and those of none, ahead of the rest."""
    names = [_named(job, script.folder.parent) for job in jobs]
    atomic.write_bytes(script.folder / CELLS, json.dumps(names).encode())
    atomic.write_bytes(script.path, script.text.encode())
    groups = [job.group for job in jobs]
    ahead = [i for i, group in enumerate(groups) if not group or groups.index(group) == i]
    rest = sorted({*range(len(jobs))} - {*ahead})
    for index in range(len(jobs)):
        _exit_file(script.folder, index).unlink(missing_ok=True)
    first = submit(script.path, ahead, at_once)
    second = submit(script.path, rest, at_once, after=first) if rest else ""
    arrays = dict.fromkeys(ahead, first) | dict.fromkeys(rest, second)
    return {jobs[index]: Task(array, index, script.folder) for index, array in arrays.items()}


def _exit_file(folder: Path, index: int) -> Path:
    return folder / f"{index}.exit"


class _Watch:
    """Jobs in the queue, until each of them has left it.

    may_release: what waits for other cells may begin once these have begun to train.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        ended: Ended,
        display: Display,
        tasks: dict[Job, Task],
        *,
        may_release: bool,
    ) -> None:
        self.jobs = jobs
        self.ended = ended
        self.display = display
        self.tasks = tasks
        self.may_release = may_release
        self.released: set[str] = set()
        self.running: dict[str, Path] = {}
        self.left: dict[Job, float] = {}  # the queue, at what time
        self.next_look = time.monotonic()
        self.complaint = ""

    def step(self) -> bool:
        """Look at the queue if it is time to; whether anything is left."""
        if time.monotonic() >= self.next_look:
            self._look()
            self.next_look = time.monotonic() + ASK_SECONDS
        self.display.show(self.running)
        return bool(self.tasks)

    def say_what_stays(self) -> None:
        """And how to take it out."""
        names = ",".join(sorted({task.folder.name for task in self.tasks.values()}))
        left = f"{len(self.tasks)} cells stay in Slurm's queue"
        self.display.say(f"{left}; scancel --name={names} takes them out")

    def _look(self) -> None:
        try:
            entries = {(entry.array, entry.index): entry for entry in queue()}
        except PreflightError as error:  # its controller restarts, say
            if str(error) != self.complaint:
                self.complaint = str(error)
                self.display.say(f"{error}; asked again every {ASK_SECONDS:.0f} s")
            return
        for job, task in list(self.tasks.items()):
            entry = entries.get((task.array, task.index))
            if entry is None or entry.is_over:
                self._leave(job, task, entry.state if entry else "")
            else:
                self._stay(job, entry.state)
        if self.may_release:
            self._release(entries.values())

    def _stay(self, job: Job, state: str) -> None:
        self.left.pop(job, None)
        if state == "PENDING":
            self.running.pop(job.title, None)
        elif job.title not in self.running:
            self.running[job.title] = job.log
            self.display.started(job.title)

    def _leave(self, job: Job, task: Task, state: str) -> None:
        code, now = _exit_code(task), time.monotonic()
        seen = (job.log.parent / RESULT).exists() if code == 0 else code is not None
        if not seen and now < self.left.setdefault(job, now) + LATE_SECONDS:
            return
        del self.tasks[job]
        self.running.pop(job.title, None)
        outcome = self.ended(job, _status(UNTOLD.get(state, STOPPED) if code is None else code))
        number = len(self.jobs) - len(self.tasks)
        self.display.say(f"[{number}/{len(self.jobs)}] {job.title}: {outcome}")

    def _release(self, entries: Collection[Entry]) -> None:
        """Arrays that wait for baselines which are there by now."""
        opened = {job.group for job in self.jobs if job.opened.exists()}
        for array in {entry.array for entry in entries if entry.reason == "Dependency"}:
            groups = {job.group for job, task in self.tasks.items() if task.array == array}
            if groups and groups <= opened and array not in self.released:
                self.released.add(array)
                with suppress(PreflightError):  # then they wait until those have ended
                    release(array)


def _exit_code(task: Task) -> int | None:
    """What the script left; None where it was killed, or never begun."""
    try:
        text = _exit_file(task.folder, task.index).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _status(code: int) -> int:
    """A shell's exit code as a launcher's: negative for a signal."""
    return 128 - code if code - 128 in set(signal.Signals) else code
