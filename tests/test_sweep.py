"""Grids as cells: tuning, which cells run, what is left of them, and the command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from example_results import example
from tiny_grids import CORPUS, TASKS, TUNING, lines_of, make_grid, write_corpus
from typer.testing import CliRunner, Result

from ctdbench import request, results
from ctdbench.cli import app
from ctdbench.distill import references
from ctdbench.launch import local, provenance
from ctdbench.launch.local import Ended, Job
from ctdbench.launch.overview import choice
from ctdbench.launch.sweep import Sweep


@pytest.fixture(autouse=True)
def small_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the working folder, so that CORPUS names it."""
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)


# --- a grid as cells -----------------------------------------------------------------------------

Score = Callable[[float, str], float | str]  # learning rate, method -> score, or why it failed


def scored(jobs: Sequence[Job], ended: Ended, *, score: Score, started: list[str]) -> None:
    """A launcher that trains nothing: results as `run` would leave them for the request file."""
    for entry in jobs:
        started.append(entry.title)
        folder = entry.log.parent
        config = entry.command[entry.command.index("--config") + 1]
        spec = request.build_spec({}, Path(config))
        found = score(spec.train.learning_rate or 0.0, spec.method)
        result: Any = example(spec.method, {}, pair="tiny")
        result |= {"id": folder.name, "spec": spec.model_dump(mode="json")}
        if isinstance(found, str):
            result |= {"status": "failed", "notes": [found]}
        else:
            result["scores"] = {"bpb_heldout": {"bpb": found}}
        results.write_json_atomic(folder / "result.json", result)
        ended(entry, 0)


def tuned_sweep(tmp_path: Path, score: Score, **fields: Any) -> tuple[Sweep, list[str]]:
    fields = {"rows": ["sft", "uld"], "seeds": 2, "tuning": TUNING, **fields}
    sweep = Sweep(lines_of(**fields), tmp_path)
    started: list[str] = []
    sweep.run(partial(scored, score=score, started=started))
    return sweep, started


def test_every_row_takes_the_value_that_its_own_trials_chose(tmp_path: Path) -> None:
    best = {"sft": 0.1, "uld": 0.3}
    sweep, started = tuned_sweep(tmp_path, lambda rate, method: abs(rate - best[method]))
    assert [found.value for found in sweep.tuned()] == [0.1, 0.3]
    finals = sweep.finals()
    assert [place.cell.spec.train.learning_rate for place in finals] == [0.1, 0.3, 0.1, 0.3]
    assert [place.cell.spec.seed for place in finals] == [0, 0, 1, 1]
    assert len(started) == 3 * 2 + 2 * 2
    assert {place.cell.spec.seed for place in sweep.trials} == {1000}


def test_trials_are_kept_but_are_in_no_table(tmp_path: Path) -> None:
    tuned_sweep(tmp_path, lambda rate, method: rate)
    assert {result["spec"]["seed"] for result in results.find(tmp_path).values()} == {0, 1}
    assert len(results.find(tmp_path / results.TRIALS)) == 6


def test_a_higher_score_is_better_where_more_is() -> None:
    lower = {"bpb_pydoc.bpb": True, "teacher_jsd.jsd": True, "piqa.acc": False}
    for select, is_lower in lower.items():
        tuning = make_grid(tuning={**TUNING, "select": select}).tuning
        assert tuning is not None
        assert tuning.column.lower_is_better == is_lower


def test_a_trial_that_diverged_loses(tmp_path: Path) -> None:
    def score(rate: float, method: str) -> float | str:
        return "RunError: the loss is not finite" if rate == 0.1 else rate

    sweep, _ = tuned_sweep(tmp_path, score)
    assert [found.value for found in sweep.tuned()] == [0.2, 0.2]


def test_a_trial_that_broke_decides_nothing(tmp_path: Path) -> None:
    def score(rate: float, method: str) -> float | str:
        return "OSError: the disk is gone" if (rate, method) == (0.2, "uld") else rate

    sweep, started = tuned_sweep(tmp_path, score)
    sft, uld = sweep.tuned()
    assert (sft.value, uld.value) == (0.1, None)
    assert "the disk is gone" in uld.why
    assert [title for title in started if "seed" in title] == [
        "tiny, sft, seed 0",
        "tiny, sft, seed 1",
    ]


def test_trials_change_what_tuning_says_and_nothing_else(tmp_path: Path) -> None:
    tuning = {**TUNING, "train": {"budget": "3kB"}, "eval": {"limit": 1}}
    (line,) = lines_of(tuning=tuning, train={"clip": 2.0})
    for cell, rate in zip(line.trials, TUNING["values"], strict=True):  # type: ignore[call-overload]
        assert (cell.spec.train.budget, cell.spec.eval.limit) == (3000, 1)
        assert (cell.spec.train.clip, cell.spec.train.learning_rate) == (2.0, rate)
        assert cell.spec.eval.tasks == ("bpb_heldout",)
        assert cell.spec.options == line.spec.options


def test_a_done_cell_without_the_weights_it_is_to_keep_is_due(tmp_path: Path) -> None:
    sweep, _ = tuned_sweep(tmp_path, lambda rate, method: rate, tuning=None, seeds=1, rows=["sft"])
    assert states(sweep) == ["done"]
    (line,) = lines_of(tuning=None, seeds=1, rows=["sft"], train={"keep_model": True})
    keeping = Sweep([line], tmp_path)
    assert states(keeping) == ["absent"]
    (place,) = keeping.finals()
    (place.cell.folder / results.MODEL).mkdir()
    assert states(keeping) == ["done"]


def test_a_killed_search_for_weights_leaves_the_result(tmp_path: Path) -> None:
    sweep, _ = tuned_sweep(tmp_path, lambda rate, method: rate, tuning=None, seeds=1, rows=["sft"])
    (line,) = lines_of(tuning=None, seeds=1, rows=["sft"], train={"keep_model": True})
    told = []

    def launch(jobs: Sequence[Job], ended: Ended) -> None:
        told.extend(ended(job, -signal.SIGKILL) for job in jobs)

    keeping = Sweep([line], tmp_path)
    keeping.run(launch)
    assert len(told) == 1
    assert (states(sweep), states(keeping)) == (["done"], ["absent"])


def states(sweep: Sweep) -> list[str]:
    return [place.state for place in sweep.finals()]


@pytest.mark.parametrize(
    ("when", "runs"),
    [("always", 4), ("never", 0), ("only-missing", 2), ("only-failed", 1)],
)
def test_which_cells_run(tmp_path: Path, when: Any, runs: int) -> None:
    sweep = Sweep(lines_of(seeds=4), tmp_path, when)
    done, failed, resumable, _ = sweep.finals()
    begun = resumable.cell.folder / "checkpoints/step-0000001"
    begun.mkdir(parents=True)
    scored([entry_of(done)], lambda *_: "", score=lambda *_: 1.0, started=[])
    scored([entry_of(failed)], lambda *_: "", score=lambda *_: "ValueError: x", started=[])
    assert states(sweep) == ["done", "failed", "resumable", "absent"]
    started: list[str] = []
    sweep.run(partial(scored, score=lambda *_: 2.0, started=started))
    assert len(started) == runs


def entry_of(place: Any) -> Job:
    folder = place.cell.folder
    folder.mkdir(parents=True, exist_ok=True)
    raw = place.cell.spec.model_dump(mode="json", exclude={"trust_remote_code"})
    (folder / "spec.yaml").write_text(yaml.safe_dump(raw))
    return Job(place.title, ("--config", str(folder / "spec.yaml")), folder / "log.txt")


def test_a_cell_that_a_signal_ended_is_recorded_as_failed(tmp_path: Path) -> None:
    sweep = Sweep(lines_of(seeds=3), tmp_path)
    codes = {0: -signal.SIGKILL, 1: -signal.SIGTERM, 2: 143}
    told = []

    def launch(jobs: Sequence[Job], ended: Ended) -> None:
        told.extend(ended(job, codes[number]) for number, job in enumerate(jobs))

    killed, *asked = sweep.run(launch)
    assert killed.state == "failed"
    assert killed.result is not None
    assert killed.result["notes"] == ["ChildProcessError: killed by SIGKILL (out of memory?)"]
    assert [place.state for place in asked] == ["absent", "absent"]
    assert told[1] == told[2] == "stopped; the same command resumes it"


def test_a_cell_that_refused_tells_why(tmp_path: Path) -> None:
    told = []

    def launch(jobs: Sequence[Job], ended: Ended) -> None:
        jobs[0].log.write_text("loading\nerror: model hub:a/b could not be had\n")
        told.append(ended(jobs[0], 3))

    (place,) = Sweep(lines_of(), tmp_path).run(launch)
    assert told[0].startswith("error: model hub:a/b could not be had (")
    assert place.state == "absent"


def test_a_computed_cell_is_computed_anew_without_what_it_left(tmp_path: Path) -> None:
    sweep = Sweep(lines_of(seeds=1), tmp_path, "always")
    launch = partial(scored, score=lambda *_: 1.0, started=[])
    (place,) = sweep.run(launch)
    stale: list[tuple[Path, ...]] = []
    sweep.run(lambda jobs, ended: stale.extend(entry.stale for entry in jobs))
    assert place.cell.folder / "result.json" in stale[0]


def test_cells_with_the_same_baselines_are_one_group(tmp_path: Path) -> None:
    jobs: list[Job] = []
    sweep = Sweep(lines_of(rows=["sft", "uld"], seeds=2), tmp_path)
    sweep.run(lambda some, ended: jobs.extend(some))
    assert len({entry.group for entry in jobs}) == 1
    assert len({entry.opened for entry in jobs}) == 4
    jobs[0].opened.touch()  # its training has begun, so the baselines are there
    again: list[Job] = []
    sweep.run(lambda some, ended: again.extend(some))
    assert {entry.group for entry in again} == {""}


def test_a_plan_reads_every_file_and_the_commit_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    asked: list[str] = []
    fingerprint, ask = references.fingerprint, subprocess.run

    def noted(path: Path) -> str:
        read.append(path.name)
        return fingerprint(path)

    def git(command: list[str], **options: Any) -> Any:
        asked.append(command[3])
        return ask(command, **options)

    references._fingerprint_as_of.cache_clear()
    provenance._git.cache_clear()
    monkeypatch.setattr(references, "fingerprint", noted)
    monkeypatch.setattr(provenance.subprocess, "run", git)
    sweep = Sweep(lines_of(rows=["sft", "uld"], seeds=3, tuning=TUNING), tmp_path)
    assert len(sweep.trials) == len(sweep.finals()) + 6 == 6
    assert sorted(read) == ["prompts.yaml", "sft.py", "uld.py"]
    assert sorted(asked) in (["rev-parse", "status"], [])  # in a clone, in a wheel


# --- the command ---------------------------------------------------------------------------------


def sweep_command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["sweep", *arguments])


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the processes; the titles of the cells that it was given."""
    started: list[str] = []

    def run(jobs: Sequence[Job], ended: Ended, **_: Any) -> None:
        def score(rate: float, method: str) -> float | str:
            return "ValueError: broken" if method == "uld" else 1.0

        scored(jobs, ended, score=score, started=started)

    monkeypatch.setattr(local, "run", run)
    return started


SIZE = ("--tasks", "bpb_heldout", "--limit", "2", "--budget", "4kB")
FLAGS = ("--pair", "tiny", *SIZE, "--set", f"train.corpus={CORPUS}")


def test_a_sweep_ends_in_the_table(launcher: list[str]) -> None:
    done = sweep_command("--method", "sft,gold+ce", "--seeds", "2", *FLAGS)
    assert done.exit_code == 0, done.output
    assert len(launcher) == 4
    assert f"tiny: 4kB of {CORPUS} text, 2 items a task" in done.stdout
    assert "sft (2 seeds)" in done.stdout
    again = sweep_command("--method", "sft,gold+ce", "--seeds", "2", *FLAGS)
    assert (again.exit_code, len(launcher)) == (0, 4)
    assert again.stdout == done.stdout


def test_a_sweep_with_a_failed_cell_shows_the_rest(launcher: list[str]) -> None:
    done = sweep_command("--method", "uld,sft", *FLAGS)
    assert done.exit_code == 1
    assert "tiny, uld, seed 0: failed: ValueError: broken" in done.stderr
    assert "sft" in done.stdout
    assert sweep_command("--method", "uld,sft", *FLAGS).exit_code == 1
    assert len(launcher) == 2  # a failure is not tried again unless asked for
    sweep_command("--method", "uld,sft", "--when", "only-failed", *FLAGS)
    assert launcher[2:] == ["tiny, uld, seed 0"]


def test_all_is_what_can_serve_the_pair(launcher: list[str]) -> None:
    done = sweep_command("--method", "all", "--dry-run", *FLAGS)
    assert done.exit_code == 0, done.output
    assert "left out: kd on tiny" in done.stderr
    assert "tiny, sft, seed 0" in done.stdout
    assert "tiny, kd" not in done.stdout
    assert not launcher


@pytest.mark.parametrize(
    ("value", "tried", "expected"),
    [
        (2e-4, (1e-4, 2e-4, 3e-4), "0.0002"),
        (1e-4, (1e-4, 2e-4, 3e-4), "0.0001, the smallest that was tried"),
        (8, (2, 8, 4), "8, the largest that was tried"),
        ("fixed", ("fixed", "learned"), "fixed"),
        (True, (True, False), "True"),
    ],
)
def test_a_choice_at_the_end_of_what_was_tried_is_said(
    value: Any, tried: tuple[Any, ...], expected: str
) -> None:
    assert choice(value, tried) == expected


def test_a_grid_in_a_file(launcher: list[str], tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    raw = {"pairs": ["tiny"], "rows": ["sft", "gold"], "eval": TASKS, "tuning": TUNING}
    raw["train"] = {"corpus": CORPUS}
    path.write_text(yaml.safe_dump(raw))
    done = sweep_command("--grid", str(path), "--budget", "4kB")
    assert done.exit_code == 0, done.output
    told = "0.1, the smallest that was tried (bpb_heldout.bpb: 1 at 0.1, 1 at 0.2"
    assert f"tiny, sft: train.learning_rate {told}" in done.stderr
    assert len(launcher) == 8
    assert "sft learning_rate=0.1" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--pair", "tiny"], "--method is missing"),
        (["--method", "sft"], "--pair is missing"),
        (["--method", "sft,blt", "--pair", "tiny"], "did you mean bld"),
        (["--method", "sft", "--pair", "tiny,tinny"], "did you mean tiny"),
        (["--method", "sft", "--pair", "tiny", "--seeds", "few"], "seeds"),
        (["--method", "sft,sft", "--pair", "tiny"], "sft stands there twice"),
        (["--method", "sft", "--pair", "tiny", "--jobs", "0"], "--jobs"),
        (["--grid", "no.yaml"], "cannot read no.yaml"),
        (["--grid", "no.yaml", "--pair", "tiny"], "--pair: the grid's file says this"),
        (["--grid", "no.yaml", "--set", "train.clip=1"], "--set: the grid's file says this"),
    ],
)
def test_a_bad_request_is_one_line(
    launcher: list[str], arguments: list[str], complaint: str
) -> None:
    outcome = sweep_command(*arguments)
    assert outcome.exit_code == 2
    assert complaint in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert not launcher


# --- real processes ------------------------------------------------------------------------------


def command(store: Path, *arguments: str) -> list[str]:
    fixed = ("--pair", "tiny", "--tasks", "bpb_heldout", "--limit", "2", "--store", str(store))
    return [sys.executable, "-m", "ctdbench", *arguments, *fixed, "--set", f"train.corpus={CORPUS}"]


def run_command(store: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(store, *arguments), capture_output=True, text=True, timeout=600)


def children(number: int) -> list[int]:
    path = Path(f"/proc/{number}/task/{number}/children")
    if not path.exists():
        pytest.skip("this system does not tell a process's children")
    return [int(child) for child in path.read_text().split()]


@pytest.mark.slow
def test_a_killed_cell_does_not_take_the_others(tmp_path: Path) -> None:
    """And the sweep's results are those of `run`, cell by cell; baselines are evaluated once."""
    sweep = ("sweep", "--method", "sft,uld", "--budget", "8kB", "--seeds", "2", "--jobs", "2")
    process = subprocess.Popen(command(tmp_path / "a", *sweep), stderr=subprocess.PIPE, text=True)
    killed = None
    while killed is None and process.poll() is None:
        time.sleep(0.05)
        for metrics in (tmp_path / "a").glob("tiny/uld/*/metrics.jsonl"):
            killed = metrics.parent
            for number in children(process.pid):
                if str(killed) in Path(f"/proc/{number}/cmdline").read_text():
                    os.kill(number, signal.SIGKILL)
    _, errors = process.communicate(timeout=600)
    assert killed is not None
    assert process.returncode == 1, errors
    assert "killed by SIGKILL" in errors
    counts = [results.state(path) for path in (tmp_path / "a").glob("tiny/*/*")]
    assert counts.count("failed") == 1
    assert counts.count("done") == 3 + 2  # two of sft, one of uld, and the baselines
    again = run_command(tmp_path / "a", *sweep, "--when", "only-failed")
    assert again.returncode == 0, again.stderr
    for method in ("sft", "uld"):
        for seed in ("0", "1"):
            run = ("run", "--method", method, "--budget", "8kB", "--seed", seed)
            done = run_command(tmp_path / "b", *run)
            assert done.returncode == 0, done.stderr
    found, expected = (
        {result["id"]: result["scores"] for result in results.find(tmp_path / name).values()}
        for name in "ab"
    )
    assert found == expected
    logs = [path.read_text() for path in (tmp_path / "a").rglob("log.txt")]
    assert sum(log.count("evaluating start") for log in logs) == 1
