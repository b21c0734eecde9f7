"""SIGTERM is acted on wherever it comes; of two processes both stop after the same step."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed_cases import in_two_processes, train_case
from harness_setup import run_spec, train_once

from ctdbench.distill import checkpoint, train
from ctdbench.distill.termination import deferred_sigterm
from ctdbench.errors import Terminated


def interrupted(then: Callable[[], object]) -> None:
    """SIGTERM where it is deferred, and what is done then."""
    with deferred_sigterm() as came:
        assert not came()
        os.kill(os.getpid(), signal.SIGTERM)
        assert came()
        then()


def test_a_deferred_signal_is_told_at_the_end_and_the_default_comes_back() -> None:
    before, went_on = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(Terminated):
        interrupted(lambda: went_on.append(True))
    assert went_on
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_was_made_of_a_signal_is_what_is_told() -> None:
    def stop() -> None:
        raise Terminated("stopped after step 7")

    with pytest.raises(Terminated, match="after step 7"):
        interrupted(stop)
    with pytest.raises(ZeroDivisionError):
        interrupted(lambda: 1 / 0)


def test_a_signal_during_the_last_checkpoint_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, spec = checkpoint.save, run_spec("sft", checkpoint_every=100)

    def save(*arguments: Any, **settings: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        own(*arguments, **settings)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(Terminated):
        train_once(spec, tmp_path)
    monkeypatch.undo()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    _, report = train_once(spec, tmp_path)  # goes on from there, with nothing left to do
    assert report.steps == len(lines)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines


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
    in_two_processes(__file__, str(tmp_path))
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
        train_case("sft", folder)
    except Terminated as error:
        (folder / rank).write_text(str(error))


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
