"""The script of a Slurm job array: what it says, and what its tasks do, with no Slurm."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from slurm_stand_ins import job, put_on_path, wait_until

from ctdbench.errors import UserError
from ctdbench.launch.local import Job
from ctdbench.launch.slurm_script import Script, render
from ctdbench.spec import check_name


def lines_after(text: str, start: str) -> list[str]:
    lines = text.splitlines()
    return lines[lines.index(start) :]


def test_a_script_states_its_options_and_one_case_a_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    jobs = [
        Job("tiny, sft, seed 0", ("run", "a b"), Path("runs/it's/log.txt")),
        Job("x\n rm -rf /", ("run",), Path("log.txt"), stale=(Path("a"), Path("b c"))),
    ]
    script = render(jobs, Path("runs/slurm"), ["gpus=1", "--constraint=a|b", "exclusive"], 4)
    own = tmp_path / "runs/slurm" / script.name
    assert script.path == own / "array.sh"
    directives = [line[8:] for line in script.text.splitlines() if line.startswith("#SBATCH ")]
    assert directives == [
        f"--job-name={script.name}",
        "--array=0-1%4",
        "--requeue",
        "--signal=B:TERM@120",
        f"--chdir={tmp_path}",
        f"--output={own}/%a.txt",
        "--open-mode=append",
        "--gpus=1",
        "--constraint='a|b'",
        "--exclusive",
    ]
    assert lines_after(script.text, "case $SLURM_ARRAY_TASK_ID in") == [
        "case $SLURM_ARRAY_TASK_ID in",
        "  0) # tiny, sft, seed 0",
        "    cell 'runs/it'\"'\"'s/log.txt' run 'a b'",
        "    ;;",
        "  1) # x rm -rf /",
        "    anew a 'b c'",
        "    cell log.txt run",
        "    ;;",
        "esac",
    ]
    checked = subprocess.run(["bash", "-n"], input=script.text, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_a_name_is_a_slug_that_says_what_is_run(tmp_path: Path) -> None:
    jobs = [job(tmp_path, "a"), job(tmp_path, "b")]
    first = render(jobs, tmp_path).name
    assert check_name(first, "array") == first
    assert render(jobs, tmp_path).name == first
    others = render(jobs[:1], tmp_path), render(jobs, tmp_path, ["gpus=1"])
    assert len({first, *(other.name for other in others)}) == 3


def test_the_user_may_give_a_longer_grace_period(tmp_path: Path) -> None:
    text = render([job(tmp_path, "a")], tmp_path, ["signal=B:TERM@600"]).text
    assert [line for line in text.splitlines() if "--signal" in line] == [
        "#SBATCH --signal=B:TERM@600"
    ]


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("array=0-9", "--slurm-option array: the sweep states it itself. --jobs"),
        ("--no-requeue", "--slurm-option no-requeue: the sweep states it itself"),
        ("-p main", "--slurm-option -p main. write NAME=VALUE"),
        ("gpus=", "--slurm-option gpus=. write NAME=VALUE"),
        ("comment=a\nrm -rf /", "write NAME=VALUE"),
    ],
)
def test_an_option_that_cannot_be_is_refused(tmp_path: Path, option: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint.replace(".", r"\.")):
        render([job(tmp_path, "a")], tmp_path, [option])


def start_task(script: Script, index: int, **environment: str) -> subprocess.Popen[bytes]:
    script.folder.mkdir(parents=True, exist_ok=True)
    script.path.write_text(script.text)
    number = str(index)
    slurm_own = {
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": number,
        "SLURM_CPUS_ON_NODE": "3",
    }
    return subprocess.Popen(
        ["bash", str(script.path)], env={**os.environ, **slurm_own, **environment}
    )


def exit_code(script: Script, index: int = 0) -> str | None:
    path = script.folder / f"{index}.exit"
    return path.read_text().strip() if path.exists() else None


def test_a_task_runs_its_own_cell_and_leaves_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "CTDBENCH_WORKERS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    threads = "print(*map(__import__('os').environ.get, ('OMP_NUM_THREADS', 'RAYON_NUM_THREADS')))"
    folder = tmp_path / "it's $(touch hacked) %j"
    codes = [threads, "raise SystemExit(3)", "import os; os.kill(os.getpid(), 9)"]
    jobs = [job(folder, f"`touch hacked` {i}", code) for i, code in enumerate(codes)]
    script = render(jobs, folder / "slurm")
    assert [start_task(script, i).wait() for i in range(3)] == [0, 3, 137]
    assert [exit_code(script, i) for i in range(3)] == ["0", "3", "137"]
    assert jobs[0].log.read_text() == "3 1\n"
    assert not list(tmp_path.rglob("hacked"))


def test_what_is_stale_goes_once(tmp_path: Path) -> None:
    """A task that was requeued has a checkpoint of its own by then."""
    old = tmp_path / "a" / "checkpoints"
    task = job(tmp_path, "a", stale=(old,))
    script = render([task], tmp_path / "slurm")
    old.mkdir()
    start_task(script, 0, SLURM_RESTART_COUNT="1").wait()
    assert old.exists()
    start_task(script, 0).wait()
    assert not old.exists()


TRAINS = """
import pathlib, signal, sys, time
def stop(*_):
    if {gains}:
        pathlib.Path({folder!r}, "checkpoints/step-2").mkdir(parents=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("gains", "state", "requeued"),
    [(True, "RUNNING", True), (False, "RUNNING", False), (True, "COMPLETING", False)],
)
def test_out_of_time_is_back_into_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gains: bool, state: str, requeued: bool
) -> None:
    """Unless it gained nothing; what was stopped otherwise is Slurm's to requeue or to end."""
    bin = put_on_path(tmp_path / "bin", monkeypatch, squeue=f"echo {state}", scontrol="")
    task = job(tmp_path, "a", TRAINS.format(gains=gains, folder=str(tmp_path / "a")))
    script = render([task], tmp_path / "slurm")
    script.folder.mkdir(parents=True)
    (script.folder / "0.exit").write_text("143\n")  # from before another requeue
    process = start_task(script, 0)
    wait_until(lambda: task.log.exists() and "ready" in task.log.read_text())
    process.terminate()
    assert process.wait() == 143
    calls = (bin / "calls").read_text().splitlines() if (bin / "calls").exists() else []
    assert ("scontrol requeue 7_0" in calls) == requeued
    assert exit_code(script) == (None if requeued else "143")
