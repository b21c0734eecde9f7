"""The Slurm launcher: what it submits, and what it makes of the queue; stand-ins for Slurm."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from slurm_stand_ins import job, put_on_path, wait_until
from tiny_grids import CORPUS, write_corpus
from typer.testing import CliRunner, Result

from ctdbench.cli import app
from ctdbench.errors import PreflightError
from ctdbench.launch import slurm, slurm_queue
from ctdbench.launch.local import Job, Stopped
from ctdbench.launch.progress import Display
from ctdbench.launch.slurm import Cluster
from ctdbench.launch.slurm_script import render

SBATCH = 'count=$(grep -c ^sbatch calls); echo "$((count + 6));cluster"'
# Prints queue.1, queue.2, ... in turn and the last of them for ever; fails where one says `down`.
SQUEUE = """
count=$(grep -c ^squeue calls)
while [ ! -e queue.$count ] && [ $count -gt 1 ]; do count=$((count - 1)); done
! grep -q down queue.$count || { echo "squeue: error: no answer" >&2; exit 1; }
cat queue.$count
"""


@pytest.fixture
def arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Stand-ins for Slurm, whose queue is what a test says; arrays get the numbers 7, 8, ..."""
    monkeypatch.setattr(slurm, "ASK_SECONDS", 0.0)
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(slurm, "LATE_SECONDS", 0.0)

    def make(*queues: Sequence[str], **programs: str) -> Path:
        programs = {"sbatch": SBATCH, "squeue": SQUEUE, "scontrol": "", **programs}
        bin = put_on_path(tmp_path / "bin", monkeypatch, **programs)
        for number, entries in enumerate(queues, start=1):
            lines = [entry if entry.count("|") > 2 else f"{entry}|None|x" for entry in entries]
            (bin / f"queue.{number}").write_text("".join(line + "\n" for line in lines))
        return bin

    return make


def launched(jobs: Sequence[Job], folder: Path, **fields: Any) -> tuple[dict[str, int], str]:
    """Statuses by title, in the order of their ends, and what was shown."""
    shown, statuses = io.StringIO(), dict[str, int]()

    def ended(job: Job, status: int) -> str:
        statuses[job.title] = status
        return "ended"

    Cluster(folder / "slurm", **fields).run(jobs, ended, Display(shown))
    return statuses, shown.getvalue()


def leave(jobs: Sequence[Job], folder: Path, codes: dict[int, int]) -> None:
    """Exit codes, as the script leaves them."""
    own = render(jobs, folder / "slurm").folder
    own.mkdir(parents=True, exist_ok=True)
    for index, code in codes.items():
        (own / f"{index}.exit").write_text(f"{code}\n")


def calls_of(bin: Path, name: str) -> list[str]:
    lines = (bin / "calls").read_text().splitlines()
    return [line for line in lines if line.partition(" ")[0] == name]


def test_an_end_is_what_the_script_left_else_what_slurm_says(
    tmp_path: Path, arrays: Callable[..., Path]
) -> None:
    states = {
        "done": ("COMPLETED", "0"),
        "broken": ("FAILED", "1"),
        "killed": ("FAILED", "137"),
        "stopped": ("CANCELLED", "143"),
        "odd": ("FAILED", "255"),
        "cancelled": ("CANCELLED", ""),
        "out of memory": ("OUT_OF_MEMORY", ""),
        "never begun": ("FAILED", ""),
        "gone": ("", ""),
    }
    jobs = [job(tmp_path, name) for name in states]
    own = shlex.quote(str(render(jobs, tmp_path / "slurm").folder))
    left = [f"echo {code} >{own}/{i}.exit" for i, (_, code) in enumerate(states.values()) if code]
    listed = [f"7|{i}|{state}" for i, (state, _) in enumerate(states.values()) if state]
    arrays([], listed, sbatch="\n".join([*left, SBATCH]))
    statuses, shown = launched(jobs, tmp_path)
    assert statuses == {
        "done": 0,
        "broken": 1,
        "killed": -signal.SIGKILL,
        "stopped": -signal.SIGTERM,
        "odd": 255,
        "cancelled": -signal.SIGTERM,
        "out of memory": -signal.SIGKILL,
        "never begun": 1,
        "gone": -signal.SIGTERM,
    }
    assert "[9/9] gone: ended" in shown


def test_a_requeued_task_is_not_over(tmp_path: Path, arrays: Callable[..., Path]) -> None:
    """Even though it left an exit code; and a queue that does not answer says nothing."""
    states = ["RUNNING", "COMPLETING", "PENDING", "down", "PENDING", "RUNNING", "COMPLETED"]
    jobs = [job(tmp_path, "a")]
    own = shlex.quote(str(render(jobs, tmp_path / "slurm").folder))
    bin = arrays(
        [], *([f"7|0|{state}"] for state in states), sbatch=f"echo 143 >{own}/0.exit\n{SBATCH}"
    )
    statuses, shown = launched(jobs, tmp_path)
    assert statuses == {"a": -signal.SIGTERM}
    assert len(calls_of(bin, "squeue")) == 1 + len(states)
    assert shown.count("a: started") == 2
    assert shown.count("squeue: error: no answer") == 1


def test_an_exit_code_may_come_late(
    tmp_path: Path, arrays: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another machine; and its result later still."""
    monkeypatch.setattr(slurm, "LATE_SECONDS", 60.0)
    jobs = [job(tmp_path, "a")]
    own = shlex.quote(str(render(jobs, tmp_path / "slurm").folder))
    result = jobs[0].log.parent / "result.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    late = f"[ $(grep -c ^squeue calls) -lt 4 ] || echo 0 >{own}/0.exit\n"
    late += f"[ $(grep -c ^squeue calls) -lt 7 ] || : >{shlex.quote(str(result))}"
    bin = arrays([], ["7|0|COMPLETED"], squeue=f"{SQUEUE}\n{late}")
    assert launched(jobs, tmp_path)[0] == {"a": 0}
    assert result.exists()
    assert len(calls_of(bin, "squeue")) < 20


def test_an_exit_code_of_another_time_counts_for_nothing(
    tmp_path: Path, arrays: Callable[..., Path]
) -> None:
    jobs = [job(tmp_path, "a")]
    leave(jobs, tmp_path, {0: 0})
    arrays([], ["5|0|COMPLETED", "7|0|FAILED"])
    assert launched(jobs, tmp_path)[0] == {"a": 1}


def test_the_first_of_a_group_goes_ahead(tmp_path: Path, arrays: Callable[..., Path]) -> None:
    groups = {"a": "one", "b": "one", "c": "", "d": "two", "e": "two", "f": "one"}
    opened = {name: tmp_path / name / "metrics.jsonl" for name in groups}
    jobs = [job(tmp_path, name, group=g, opened=opened[name]) for name, g in groups.items()]
    waiting = [f"8|{index}|PENDING|Dependency|x" for index in (1, 4, 5)]
    bin = arrays([], [*waiting, "7|0|RUNNING"], waiting, [])
    launched(jobs, tmp_path)
    script = render(jobs, tmp_path / "slurm").path
    assert calls_of(bin, "sbatch") == [
        f"sbatch --parsable --array=0,2,3 {script}",
        f"sbatch --parsable --array=1,4,5 --dependency=afterany:7 {script}",
    ]
    assert not calls_of(bin, "scontrol")


@pytest.mark.parametrize(("at_once", "released"), [(None, 1), (1, 0)])
def test_the_others_begin_once_the_first_trains(
    tmp_path: Path, arrays: Callable[..., Path], at_once: int | None, released: int
) -> None:
    """Unless so few may run at a time that they wait for it to end."""
    opened = tmp_path / "metrics.jsonl"
    opened.touch()
    jobs = [job(tmp_path, name, group="one", opened=opened) for name in "ab"]
    waiting = ["7|0|RUNNING", "8|1|PENDING|Dependency|x"]
    bin = arrays([], waiting, waiting, [])
    launched(jobs, tmp_path, at_once=at_once)
    assert calls_of(bin, "scontrol") == ["scontrol update JobId=8 Dependency="] * released


def test_what_is_in_the_queue_is_not_submitted_again(
    tmp_path: Path, arrays: Callable[..., Path]
) -> None:
    """The sweep's own process may have been gone for a while."""
    earlier = [job(tmp_path, name) for name in "abc"]
    now = [earlier[1], earlier[2], job(tmp_path, "d")]
    name = render(earlier, tmp_path / "slurm").name
    bin = arrays([], [])
    launched(earlier, tmp_path)
    (bin / "calls").unlink()
    of_others = ["3|1|RUNNING|None|x", "3|N/A|RUNNING|None|a|b"]
    listed = [f"7|1|RUNNING|None|{name}", f"7|2|FAILED|None|{name}", *of_others]
    arrays(listed, [])
    statuses, shown = launched(now, tmp_path)
    assert set(statuses) == {"b", "c", "d"}
    assert "1 of 3 cells are in Slurm's queue already" in shown
    (call,) = calls_of(bin, "sbatch")
    script = Path(call.split()[-1])
    assert "--array=0,1" in call
    assert json.loads((script.parent / "cells.json").read_text()) == ["../c", "../d"]


def test_a_refusal_is_one_line(tmp_path: Path, arrays: Callable[..., Path]) -> None:
    arrays([], sbatch="echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    with pytest.raises(PreflightError, match=r"invalid partition specified: x\. --slurm-option"):
        launched([job(tmp_path, "a")], tmp_path)


def test_what_stops_the_launcher_leaves_the_queue(
    tmp_path: Path, arrays: Callable[..., Path]
) -> None:
    bin = arrays([], ["7|0|RUNNING"], scancel="")
    shown = io.StringIO()

    def interrupt() -> None:
        wait_until(lambda: "started" in shown.getvalue())
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    jobs = [job(tmp_path, "a")]
    with pytest.raises(Stopped):
        Cluster(tmp_path / "slurm").run(jobs, lambda *_: "", Display(shown))
    thread.join()
    name = render(jobs, tmp_path / "slurm").name
    assert f"1 cells stay in Slurm's queue; scancel --name={name}" in shown.getvalue()
    assert not calls_of(bin, "scancel")


# --- the command ---------------------------------------------------------------------------------

SIZE = ("--tasks", "bpb_heldout", "--limit", "2", "--budget", "4kB")
FLAGS = ("--pair", "tiny", *SIZE, "--set", f"train.corpus={CORPUS}")


@pytest.fixture
def small_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)


def sweep_command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["sweep", "--method", "sft", *FLAGS, *arguments])


@pytest.mark.usefixtures("small_corpus")
def test_a_dry_run_shows_the_script_and_writes_nothing(
    tmp_path: Path, arrays: Callable[..., Path]
) -> None:
    bin = arrays([])
    before = set(tmp_path.rglob("*"))
    shown = sweep_command("--launcher", "slurm", "--slurm-option", "partition=gpu", "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert "#SBATCH --partition=gpu\n" in shown.stdout
    assert "  0) # tiny, sft, seed 0\n    cell runs/tiny/sft/" in shown.stdout
    assert set(tmp_path.rglob("*")) == before
    assert not (bin / "calls").exists()


@pytest.mark.usefixtures("small_corpus")
def test_the_script_that_a_dry_run_shows_is_kept(
    tmp_path: Path, arrays: Callable[..., Path]
) -> None:
    arrays([], [])
    shown = sweep_command("--launcher", "slurm", "--dry-run")
    ended = sweep_command("--launcher", "slurm")
    assert ended.exit_code == 1  # it vanished from the queue
    assert "tiny, sft, seed 0: stopped; the same command resumes it" in ended.stderr
    (script,) = tmp_path.glob("runs/slurm/*/array.sh")
    assert shown.stdout.endswith(f"{script}:\n\n{script.read_text()}")


@pytest.mark.usefixtures("small_corpus")
@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (
            ["--slurm-option", "gpus=1"],
            2,
            "--slurm-option is of no use here. give --launcher slurm",
        ),
        (["--launcher", "slurm", "--slurm-option", "x"], 2, "--slurm-option x. write NAME=VALUE"),
        (["--launcher", "slurm"], 3, "--launcher slurm: there is no sbatch on this machine"),
        (["--launcher", "pbs"], 2, "--launcher"),
    ],
)
def test_a_bad_request_is_one_line(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, complaint: str
) -> None:
    monkeypatch.setattr(slurm_queue.shutil, "which", lambda name: None)
    outcome = sweep_command(*arguments)
    assert (outcome.exit_code, outcome.stderr.count("\n")) == (code, 1), outcome.output
    assert complaint in outcome.stderr
