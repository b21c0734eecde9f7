"""Trackers: asked for by a flag, started at the right step, no part of a cell."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import tracking as trackers
from accelerate.utils import LoggerType
from tiny_grids import CORPUS, write_corpus
from typer.testing import CliRunner, Result

from ctdbench import results
from ctdbench.cli import app
from ctdbench.distill import tracking, train
from ctdbench.launch import local

SETTINGS = {"corpus": CORPUS, "budget": "1kB", "checkpoint_every": "1"}
CELL = ("--pair", "tiny", "--tasks", "bpb_heldout", "--limit", "1", "--store", "runs")
TRAIN = tuple(part for item in SETTINGS.items() for part in ("--set", "train.{}={}".format(*item)))


class Notebook(trackers.GeneralTracker):
    """A tracker that writes nothing: it stands in for W&B and keeps what it is told."""

    name = "wandb"
    requires_logging_directory = False
    runs: list[Notebook]
    fails = ""

    def __init__(self, project: str, **arguments: Any) -> None:
        super().__init__()
        self.project, self.arguments = project, arguments
        self.points: dict[int, dict[str, float]] = {}
        self.finished = False

    @property
    def tracker(self) -> Notebook:
        return self

    def start(self) -> None:
        if self.fails:
            raise RuntimeError(self.fails)
        self.runs.append(self)
        print("a tracker's greeting")

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        assert step is not None
        self.points[step] = values

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def notebooks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Notebook]:
    """The runs of the stand-in, in a folder of one's own with a corpus."""
    monkeypatch.setattr(Notebook, "runs", [], raising=False)
    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "wandb", Notebook)
    monkeypatch.setattr(trackers, "_available_trackers", [LoggerType.WANDB])
    monkeypatch.setattr(tracking, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setenv("TRACKIO_DIR", "")  # what a tracked run sets ends with the test
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    return Notebook.runs


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["run", "--method", "sft", *CELL, *TRAIN, *arguments])


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def only_cell() -> Path:
    (folder,) = Path("runs/tiny/sft").iterdir()
    return folder


def test_a_tracker_gets_every_step_and_leaves_the_cell_as_it_is(notebooks: list[Notebook]) -> None:
    plain = run()
    folder = only_cell()
    assert notebooks == []
    assert not (folder / "tracking").exists()
    scores = results.read_result(folder / "result.json")["scores"]
    (folder / "result.json").unlink()

    tracked = run("--track", "wandb")
    assert tracked.exit_code == 0, tracked.output
    assert tracked.stdout.splitlines()[:6] == plain.stdout.splitlines()[:6]  # no greeting
    assert only_cell() == folder  # the same id
    (told,) = notebooks
    assert told.project == "ctdbench"
    assert told.arguments["name"] == f"tiny/sft/{folder.name}"
    assert told.arguments["id"] == folder.name
    assert told.arguments["resume"] is None
    assert told.arguments["dir"] == str(folder / "tracking")
    assert told.arguments["config"]["train"]["corpus"] == "jsonl:"  # no folder of this machine
    steps = metrics(folder)
    assert told.points == {line.pop("step"): line for line in steps}
    assert told.finished
    result = results.read_result(folder / "result.json")
    assert result["scores"] == scores
    assert "wandb" not in json.dumps({**result, "provenance": {}})


def test_a_cell_that_resumes_goes_on_with_its_run(
    notebooks: list[Notebook], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = train._Loop._checkpoint

    def stop_at_two(self: Any, *, stop: bool) -> None:
        own(self, stop=stop or (self.done.step == 2 and len(notebooks) == 1))

    monkeypatch.setattr(train._Loop, "_checkpoint", stop_at_two)
    assert run("--track", "wandb").exit_code == 143
    assert notebooks[0].finished
    assert run("--track", "wandb").exit_code == 0
    first, second = notebooks
    assert second.arguments == {**first.arguments, "resume": "allow"}
    assert [*first.points, *second.points] == [line["step"] for line in metrics(only_cell())]


def test_a_tracker_without_its_package_ends_the_run_before_it_begins(
    notebooks: list[Notebook], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    for command in ("run", "sweep", "plan"):
        arguments = [command, "--method", "sft", *CELL, "--track", "wandb"]
        done = CliRunner().invoke(app, arguments)
        line = "error: --track wandb: its package is not installed. pip install wandb\n"
        assert (done.exit_code, done.stderr, done.stdout) == (3, line, "")
    assert not Path("runs").exists()


def test_a_tracker_that_does_not_start_is_no_failed_cell(
    notebooks: list[Notebook], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Notebook, "fails", "no login\nand more")
    done = run("--track", "wandb")
    assert done.exit_code == 3
    assert done.stderr.splitlines()[-1].startswith("error: --track: the tracker does not start")
    assert "RuntimeError: no login)" in done.stderr
    assert results.state(only_cell()) != "failed"


def test_a_sweep_tracks_its_cells(
    notebooks: list[Notebook], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[local.Job] = []
    monkeypatch.setattr(local, "run", lambda jobs, ended, **_: started.extend(jobs))
    CliRunner().invoke(app, ["sweep", "--method", "sft", *CELL, *TRAIN, "--track", "wandb"])
    (job,) = started
    assert "--track=wandb" in job.command


@pytest.fixture
def lost_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Step 3 is tracked and then lost: the process ends before its checkpoint."""
    monkeypatch.setenv("TRACKIO_DIR", "")  # so that what tracking sets is undone
    monkeypatch.delenv("TRACKIO_DIR")
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    own, stops = train._Loop._checkpoint, list[int]()

    def lose_a_step(self: Any, *, stop: bool) -> None:
        if self.done.step == 3 and not stops:
            stops.append(3)
            raise KeyboardInterrupt
        own(self, stop=stop)

    monkeypatch.setattr(train._Loop, "_checkpoint", lose_a_step)
    return stops


def test_tensorboard_has_one_point_a_step_after_a_resume(lost_step: list[int]) -> None:
    pytest.importorskip("tensorboard", reason="the extra [tensorboard] is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run("--track", "tensorboard")
    assert run("--track", "tensorboard").exit_code == 0
    assert lost_step
    events = EventAccumulator(str(only_cell() / "tracking" / "ctdbench"))
    events.Reload()
    losses = events.Scalars("loss")
    steps = metrics(only_cell())
    assert [event.step for event in losses] == [line["step"] for line in steps]
    assert [event.value for event in losses] == pytest.approx([line["loss"] for line in steps])


# Not imported here: trackio reads TRACKIO_DIR as it is imported.
@pytest.mark.skipif(find_spec("trackio") is None, reason="the extra [trackio] is not installed")
def test_trackio_has_every_step_in_one_run_after_a_resume(lost_step: list[int]) -> None:
    run("--track", "trackio")
    assert run("--track", "trackio").exit_code == 0
    assert lost_step
    with closing(sqlite3.connect(only_cell() / "tracking" / "ctdbench.db")) as database:
        points = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id")
        told = [(name, step, json.loads(values)["loss"]) for name, step, values in points]
    assert {name for name, _, _ in told} == {"/".join(only_cell().parts[-3:])}
    assert len(told) == len(metrics(only_cell())) + len(lost_step)  # that step comes again
    assert {step: loss for _, step, loss in told} == {
        line["step"]: line["loss"] for line in metrics(only_cell())
    }
