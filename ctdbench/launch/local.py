"""Commands as processes of this machine, a few at a time, each in a slot of its own.

A launcher takes jobs and a function to call as each one ends; this is the local one.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ctdbench.distill.example_cache import WORKERS
from ctdbench.launch import devices
from ctdbench.launch.progress import Display

POLL_SECONDS = 0.25
GRACE_SECONDS = 120.0  # to finish a step and write a checkpoint
BAR_SECONDS = "10"  # between the lines that a progress bar leaves in a log
STOPPING = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Job:
    """A command, and the file that its output is added to.

    group: jobs that share what the first of them makes, which is made once `opened` is there; until
    then one of them runs alone. "" shares nothing. stale: what is removed as the job starts.
    """

    title: str
    command: tuple[str, ...]
    log: Path
    group: str = ""
    opened: Path = Path()
    stale: tuple[Path, ...] = ()


Ended = Callable[[Job, int], str]  # job, exit status (negative: a signal) -> what came of it
Launcher = Callable[[Sequence[Job], Ended], None]
Slot = Mapping[str, str]  # what a job's environment has beside the launcher's


class Stopped(Exception):
    """The launcher was asked to stop, by the signal `number`; its jobs have ended."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def slots(jobs: int | None = None) -> list[Slot]:
    """One for each job at a time: a GPU where there are any, else a share of the threads.

    jobs: how many; by default as many as there are GPUs, else one.
    """
    gpus = devices.gpus()
    count = jobs or max(len(gpus), 1)
    threads = str(max(devices.threads() // count, 1))
    share = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS", WORKERS), threads)
    if not gpus:
        return [share] * count
    share["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # nvidia-smi's; CUDA's own puts the fastest first
    return [{**share, "CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)].name} for i in range(count)]


def run(
    jobs: Sequence[Job], ended: Ended, *, places: Sequence[Slot], display: Display | None = None
) -> None:
    """Run every job; on SIGINT or SIGTERM end those that run and raise Stopped.

    Jobs get SIGTERM then, and GRACE_SECONDS to leave a checkpoint; a second signal kills them. They
    stay in this process's group, so that what kills the group kills them, too.
    """
    pool = _Pool(jobs, ended, places, display or Display())
    with noted(*STOPPING) as came, pool.display:
        try:
            while not came and pool.step():
                time.sleep(POLL_SECONDS)
            if came:
                pool.stop(came)
        finally:
            pool.kill()
    if came:
        raise Stopped(came[0])


class _Pool:
    """Jobs that wait and jobs that run, by slot."""

    def __init__(
        self, jobs: Sequence[Job], ended: Ended, places: Sequence[Slot], display: Display
    ) -> None:
        self.jobs = jobs
        self.ended = ended
        self.places = places
        self.display = display
        self.waiting = list(jobs)
        self.running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}

    def step(self) -> bool:
        """Note what has ended, start what can start; whether anything is left."""
        self._collect()
        for place in range(len(self.places)):
            job = next(filter(self._may_start, self.waiting), None)
            if job is not None and place not in self.running:
                self.waiting.remove(job)
                self.running[place] = (job, _start(job, self.places[place]))
                self.display.started(job.title)
        self.display.show({job.title: job.log for job, _ in self.running.values()})
        return bool(self.waiting or self.running)

    def stop(self, came: Sequence[int]) -> None:
        """Ask all to end and wait for it, or for one more signal to come."""
        for _, process in self.running.values():
            process.terminate()
        self.display.say(f"stopping {len(self.running)} running; once more to kill")
        deadline, known = time.monotonic() + GRACE_SECONDS, len(came)
        while self.running and time.monotonic() < deadline and len(came) == known:
            time.sleep(POLL_SECONDS)
            self._collect()

    def kill(self) -> None:
        """End what still runs; as if it had heeded the signal to stop."""
        self._collect()
        for place, (_, process) in list(self.running.items()):
            process.kill()
            process.wait()
            self._settle(place, -signal.SIGTERM)

    def _collect(self) -> None:
        for place, (_, process) in list(self.running.items()):
            status = process.poll()
            if status is not None:
                self._settle(place, status)

    def _settle(self, place: int, status: int) -> None:
        job, _ = self.running.pop(place)
        done = len(self.jobs) - len(self.waiting) - len(self.running)
        outcome = self.ended(job, status)
        self.display.say(f"[{done}/{len(self.jobs)}] {job.title}: {outcome}")

    def _may_start(self, job: Job) -> bool:
        kin = [other for other in self.jobs if other.group == job.group]
        alone = all(other.group != job.group for other, _ in self.running.values())
        return not job.group or alone or any(other.opened.exists() for other in kin)


def _start(job: Job, slot: Slot) -> subprocess.Popen[bytes]:
    """Deaf to Ctrl-C, which a terminal sends to all: the launcher passes on what it gets."""
    for path in job.stale:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    quiet = {"TQDM_MININTERVAL": BAR_SECONDS}
    with job.log.open("ab") as log, _ignored(signal.SIGINT):
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **quiet, **slot},
        )


@contextmanager
def _ignored(number: int) -> Iterator[None]:
    """What a process started meanwhile inherits."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)


@contextmanager
def noted(*numbers: int) -> Iterator[list[int]]:
    """The signals that came, instead of what they do; nothing is ever cut off in the middle."""
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers
    }
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
