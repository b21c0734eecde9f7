"""A sweep on a real Slurm of one node, whose jobs are requeued, killed and out of time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_node import slurm_node
from tiny_grids import CORPUS, write_corpus

from ctdbench import results
from ctdbench.launch.slurm import CELLS
from ctdbench.launch.slurm_queue import Entry, queue

pytestmark = pytest.mark.slow

SWEEP = ("sweep", "--method", "sft,uld", "--pair", "tiny", "--seeds", "3", "--budget", "8kB")
SETTINGS = (f"train.corpus={CORPUS}", "train.batch_documents=1", "train.checkpoint_every=5")
BEGUN = 20  # steps, of about 200


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with slurm_node(tmp_path_factory.mktemp("slurm")):
        yield


def start_sweep(store: str, *arguments: str) -> subprocess.Popen[str]:
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    size = ("--tasks", "bpb_heldout", "--limit", "2", "--store", store)
    command = [sys.executable, "-m", "ctdbench", *SWEEP, *size, *settings, *arguments]
    # One thread: more of them add up in another order.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def told(*command: str) -> None:
    """Slurm refuses, and asks to try again, while a job goes from one state to the next."""
    for _ in range(60):
        done = subprocess.run(command, capture_output=True, text=True)
        if "try again later" not in done.stderr:
            break
        time.sleep(1)
    assert done.returncode == 0, done.stderr


def requeue(task: Entry, cell: Path) -> None:
    """As Slurm does for a job of higher priority."""
    told("scontrol", "requeue", f"{task.array}_{task.index}")


def run_out_of_time(task: Entry, cell: Path) -> None:
    """As Slurm does ahead of a time limit: a signal to the script alone."""
    told("scancel", "--batch", "--signal=TERM", f"{task.array}_{task.index}")


def kill(task: Entry, cell: Path) -> None:
    """The cell's process, not its script."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        words = path.read_bytes().split(b"\0")
        if b"ctdbench" in words and any(cell.name.encode() in word for word in words):
            os.kill(int(path.parent.name), signal.SIGKILL)


Disturb = Callable[[Entry, Path], None]


def disturb(
    process: subprocess.Popen[str], store: Path, plan: dict[int, Disturb]
) -> dict[int, Any]:
    """Do to the cells of `uld`, by seed, what the plan says once they train.

    The metrics that each one had by then, and its task.
    """
    seen: dict[int, Any] = {}
    while process.poll() is None and len(seen) < len(plan):
        time.sleep(0.1)
        for request in store.glob("tiny/uld/*/request.yaml"):
            cell = request.parent
            (seed,) = (n for n in range(3) if f"\nseed: {n}\n" in request.read_text())
            metrics = cell / results.METRICS
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            if seed not in seen and len(lines) > BEGUN:
                task = task_of(cell, store / "slurm")
                plan[seed](task, cell)
                seen[seed] = (cell, lines[:BEGUN], task)
        hasten()
    return seen


def task_of(cell: Path, folder: Path) -> Entry:
    for entry in queue():
        cells = json.loads((folder / entry.name / CELLS).read_text())
        if entry.state == "RUNNING" and (folder / cells[entry.index]).resolve() == cell.resolve():
            return entry
    raise AssertionError(f"{cell} trains, but is not in the queue")


def hasten() -> None:
    """Slurm lets a requeued job wait for two minutes."""
    for entry in queue():
        if entry.reason == "BeginTime":
            number = f"{entry.array}_{entry.index}"
            subprocess.run(["scontrol", "update", f"JobId={number}", "StartTime=now"])


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    deadline = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < deadline:
        hasten()
        time.sleep(1)
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr


def scores(store: str) -> dict[str, Any]:
    found = results.find(Path(store)).values()
    return {result["id"]: (result["scores"], result["stderr"]) for result in found}


def table(stdout: str) -> list[str]:
    """Without what the cells took."""
    return stdout.split("\n\n")[:2]


@pytest.mark.usefixtures("cluster")
def test_a_disturbed_sweep_ends_in_the_table_of_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CTDBENCH_CACHE", str(tmp_path / "cache"))
    write_corpus(tmp_path)
    plan = {0: requeue, 1: run_out_of_time, 2: kill}
    first = start_sweep("clustered", "--launcher", "slurm")
    seen = disturb(first, Path("clustered"), plan)
    code, _, stderr = finish(first)
    assert set(seen) == set(plan), stderr
    assert code == 1, stderr
    assert "tiny, uld, seed 2: failed: ChildProcessError: killed by SIGKILL" in stderr
    for seed in (0, 1):
        cell, lines, task = seen[seed]
        number = f"{task.array}_{task.index}"
        told = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True)
        assert "Restarts=1 " in told.stdout
        assert "stopped by SIGTERM" in (cell / "log.txt").read_text()
        # Seconds are among the metrics: steps that were taken twice would have others.
        assert (cell / results.METRICS).read_text().splitlines()[:BEGUN] == lines
    code, shown, stderr = finish(
        start_sweep("clustered", "--launcher", "slurm", "--when", "only-failed")
    )
    assert code == 0, stderr
    assert "submitted 1 cells" in stderr  # that it started is seen only if it takes some seconds
    assert "[1/1] tiny, uld, seed 2: done" in stderr
    code, expected, stderr = finish(start_sweep("local"))
    assert code == 0, stderr
    assert scores("clustered") == scores("local")
    assert len(scores("local")) == 6 + 2
    assert table(shown) == table(expected)
    logs = [path.read_text() for path in Path("clustered").rglob("log.txt")]
    assert sum(log.count("evaluating start") for log in logs) == 1
