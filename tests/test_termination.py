"""SIGTERM to one of two processes: both stop after the same step, with one checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_distributed import train_case

from ctdbench.distill import train
from ctdbench.distill.termination import deferred_sigterm
from ctdbench.errors import Terminated


def test_a_deferred_signal_is_noted_and_the_default_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with deferred_sigterm() as came:
        assert not came()
        os.kill(os.getpid(), signal.SIGTERM)
        assert came()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_thread_that_cannot_defer_it_runs_all_the_same() -> None:
    found = []

    def work() -> None:
        with deferred_sigterm() as came:
            found.append(came())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


@pytest.mark.slow
def test_processes_stop_together(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, __file__, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in ("0", "1"):
        assert "after step 2 of 3" in (tmp_path / rank).read_text()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000002"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2


def worker(folder: Path) -> None:
    rank, own = os.environ["RANK"], train._Loop._optimise

    def optimise(loop: train._Loop, *arguments: object) -> dict[str, float]:
        if rank == "1" and loop.done.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return own(loop, *arguments)  # type: ignore[arg-type]

    train._Loop._optimise = optimise  # type: ignore[method-assign, assignment]
    try:
        train_case("sft-full", folder)
    except Terminated as error:
        (folder / rank).write_text(str(error))


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
