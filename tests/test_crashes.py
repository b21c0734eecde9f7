"""Killed at any moment, a cell goes on where it stood and ends in the same numbers."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

import pytest
from crash_driver import Driver, Ended

from ctdbench import results
from ctdbench.launch.sweep import LOG
from ctdbench.results import CHECKPOINTS, METRICS, REQUEST, RESULT

SENTENCES = [
    f"The {animal} counts {number} stones, then {number + 3} more, and writes the sum down."
    for animal in ("fox", "hen", "ox", "owl", "cat")
    for number in range(12)
]
Prepare = Callable[[str], tuple[str, ...]]
SETTINGS = (
    "train.corpus=jsonl:corpus.jsonl",
    "train.batch_documents=2",
    "train.checkpoint_every=2",
)
KILLS = 30
PHASES = {"baselines", "training", "evaluation"}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    folder = tmp_path_factory.mktemp("crashes")
    rows = (json.dumps({"text": text}) + "\n" for text in SENTENCES)
    (folder / "corpus.jsonl").write_text("".join(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        driver = Driver(folder)
        yield driver
        driver.close()


def command(store: str, method: str = "bld", *more: str) -> tuple[str, ...]:
    cell = ("run", "--method", method, "--pair", "tiny", "--store", store, "--budget", "1kB")
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    return (*cell, "--tasks", "bpb_pydoc", "--limit", "1", *settings, *more)


@pytest.fixture(scope="module")
def undisturbed(driver: Driver) -> Ended:
    ended = driver.run(*command("undisturbed"))
    assert ended.code == 0, ended.stderr
    return ended


@pytest.fixture
def prepared(undisturbed: Ended) -> Prepare:
    """Makes a store that has the baselines; returns the command that computes the cell there."""

    def prepare(store: str) -> tuple[str, ...]:
        for name in ("start", "teacher"):
            shutil.copytree(Path("undisturbed/tiny") / name, Path(store) / "tiny" / name)
        return command(store)

    return prepare


def numbers(store: str) -> dict[str, Any]:
    """All that a store holds but what depends on the clock or the memory."""
    found = {}
    for folder, result in results.find(Path(store)).items():
        lines = (folder / METRICS).read_text().splitlines() if (folder / METRICS).exists() else []
        steps = [json.loads(line) for line in lines]
        samples = {path.name: path.read_bytes() for path in (folder / "samples").iterdir()}
        kept = {name: result[name] for name in ("id", "spec", "content", "scores", "stderr")}
        counted = {k: v for k, v in result["cost"].items() if k in COUNTED}
        rest = [{k: v for k, v in step.items() if k != "seconds"} for step in steps]
        found[folder.name] = [kept, counted, samples, rest]
    return found


COUNTED = ("steps", "text_bytes", "student_tokens", "teacher_tokens", "flops")


def cell(store: str, method: str = "bld") -> Path:
    (folder,) = Path(store).glob(f"tiny/{method}/*")
    return folder


def finished(store: str) -> dict[Path, tuple[int, int]]:
    """Every result's inode and time: a cell that is evaluated again gets others."""
    found = Path(store).rglob(RESULT)
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def assert_clean(store: str, more: Set[str] = frozenset()) -> None:
    """Results, samples and metrics; no lock, no temporary name, no checkpoint."""
    files = {path.relative_to(store) for path in Path(store).rglob("*") if path.is_file()}
    assert {path.name for path in files} == {RESULT, METRICS, "bpb_pydoc.jsonl", *more}


def sweep(store: str) -> tuple[str, ...]:
    """The same cell, as the only one of a grid: the sweep is killed together with its cell."""
    return ("sweep", *command(store)[1:])


@pytest.mark.parametrize("make", [command, sweep])
def test_kills_at_chosen_points_change_no_number(
    make: Prepare, driver: Driver, undisturbed: Ended
) -> None:
    store = f"points-of-{make.__name__}"
    states, known = [], {}
    for point in (
        ("bar", 1),
        ("evaluation", 2),  # of the second baseline
        ("training", 4),
        ("checkpoint", 2),
        ("evaluation", 1),  # of the cell, which is trained
        ("result", 1),
        ("rename", 3 if make is command else 4),  # of the result, after metrics and samples
        ("tidying", 2),  # after an old model, with the result in its place
    ):
        ended = driver.run(*make(store), at=point)
        assert ended.signal == 9, (point, ended.stderr)
        assert known.items() <= finished(store).items()
        known = finished(store)
        folders = list(Path(store).glob("tiny/bld/*"))
        states.append(results.state(folders[0]) if folders else "absent")
    assert states == ["absent", "absent", *["resumable"] * 5, "done"]
    assert driver.run(*make(store)).code == 0
    assert known.items() <= finished(store).items()
    assert numbers(store) == numbers("undisturbed")
    assert_clean(store, {REQUEST, LOG} if make is sweep else set())


@pytest.mark.slow
def test_a_result_survives_kills_while_its_weights_are_computed(
    driver: Driver, undisturbed: Ended
) -> None:
    store = "weights"
    assert driver.run(*command(store)).code == 0
    known, folder = finished(store), cell(store)
    again, checkpoints = (*command(store), "--set", "train.keep_model=true"), list[list[str]]()
    for point in (("training", 4), ("result", 1)):
        ended = driver.run(*again, at=point)
        assert ended.signal == 9, (point, ended.stderr)
        assert finished(store) == known
        results.read_result(folder / RESULT)
        assert driver.run(*command(store)).code == 0  # nobody asks for weights: there is a result
        checkpoints.append(sorted(path.name for path in (folder / CHECKPOINTS).iterdir()))
        assert results.state(folder, keeps_model=True) == "resumable"
    assert checkpoints[0] < checkpoints[1]
    ended = driver.run(*again, at=("weights", 1))
    assert ended.signal == 9, ended.stderr
    assert finished(store).keys() == known.keys()
    assert finished(store)[folder / RESULT] != known[folder / RESULT]
    assert results.state(folder, keeps_model=True) == "resumable"
    assert driver.run(*again).code == 0
    assert results.state(folder, keeps_model=True) == "done"
    assert not (folder / CHECKPOINTS).exists()
    expected = numbers("undisturbed")
    expected[folder.name][0]["spec"]["train"]["keep_model"] = True
    assert numbers(store) == expected


@pytest.mark.slow
def test_kills_at_random_moments_change_no_number(driver: Driver, undisturbed: Ended) -> None:
    phases = kill_often(driver, command, "undisturbed", undisturbed.seconds / 3)
    assert set(phases) - {""} == PHASES  # "": before it said anything


@pytest.mark.slow
def test_kills_of_a_sweep_at_random_moments_change_no_number(driver: Driver) -> None:
    def both(store: str) -> tuple[str, ...]:
        return ("sweep", *command(store, "sft,bld")[1:])

    for method in ("sft", "bld"):
        assert driver.run(*command("by-run", method)).code == 0
    whole = driver.run(*both("whole-sweep"))
    assert numbers("whole-sweep") == numbers("by-run")
    phases = kill_often(driver, both, "by-run", whole.seconds / 3)
    assert set(phases) - {""} == PHASES  # "": before a cell said anything


def kill_often(driver: Driver, make: Prepare, reference: str, longest: float) -> list[str]:
    """Kill the whole process group at random moments and go on, store after store, until enough
    kills have landed; every store is finished, no cell twice, with the numbers of the reference.

    Returns what was going on at every kill.
    """
    draws, landed = random.Random(reference), list[str]()
    while len(landed) < KILLS:
        store, known = f"{reference}-{len(landed)}", {}
        while True:
            moment = draws.uniform(0, longest) if len(landed) < KILLS else None
            ended = driver.run(*make(store), kill_after=moment)
            assert known.items() <= finished(store).items()
            known = finished(store)
            if ended.signal == 0:
                break
            landed.append(phase(said(store) or ended.stderr))
        assert ended.code == 0, ended.stderr
        assert numbers(store) == numbers(reference)
        shutil.rmtree(store)
    return landed


def phase(told: str) -> str:
    """What a killed process was at: the last bar or line that names it; "" for none."""
    signs = {
        "baselines": r"evaluating \S+ of tiny",
        "training": r"\w+ on tiny: ",
        "evaluation": r"evaluating (sft|bld)\n",
    }
    last = {
        name: max((m.end() for m in re.finditer(signs[name], told)), default=0) for name in signs
    }
    name = max(last, key=lambda name: last[name])
    return name if last[name] else ""


def said(store: str) -> str:
    """The log of the cell that a sweep ran last."""
    logs = sorted(Path(store).rglob(LOG), key=lambda path: path.stat().st_mtime_ns)
    return logs[-1].read_text() if logs else ""


def test_sigterm_finishes_the_step_writes_a_checkpoint_and_exits_with_143(
    driver: Driver, prepared: Prepare
) -> None:
    again = prepared("terminated")
    ended = driver.run(*again, at=("training", 4), signal="SIGTERM")
    assert (ended.code, ended.signal) == (143, 0)
    (line,) = ended.errors
    assert "stopped by SIGTERM after step 4 of" in line
    folder = cell("terminated")
    assert results.state(folder) == "resumable"
    assert len((folder / METRICS).read_text().splitlines()) == 4
    assert (folder / CHECKPOINTS / "step-0000004").is_dir()
    assert driver.run(*again).code == 0
    assert numbers("terminated") == numbers("undisturbed")


def test_sigterm_elsewhere_ends_at_once_and_loses_nothing(
    driver: Driver, prepared: Prepare
) -> None:
    again = prepared("late")
    ended = driver.run(*again, at=("evaluation", 1), signal="SIGTERM")
    assert ended.code == 143
    assert results.state(cell("late")) == "resumable"
    untrained = driver.run(*again, at=("training", 1))
    assert (untrained.code, untrained.signal) == (0, 0)
    assert numbers("late") == numbers("undisturbed")


def test_of_two_runs_of_a_cell_one_works_and_the_other_says_so(
    driver: Driver, prepared: Prepare
) -> None:
    both = [driver.start(*prepared("two")), driver.start(*command("two"))]
    first, second = sorted((driver.wait(child) for child in both), key=lambda ended: ended.code)
    assert (first.code, second.code) == (0, 1)
    (line,) = second.errors
    assert line.startswith("error: another process computes the cell two/tiny/bld/")
    assert numbers("two") == numbers("undisturbed")
    assert_clean("two")


def test_cells_of_a_pair_that_start_together_evaluate_each_baseline_once(driver: Driver) -> None:
    both = [driver.start(*command("beside", method)) for method in ("sft", "uld")]
    ended = [driver.wait(child) for child in both]
    assert [each.code for each in ended] == [0, 0], [each.stderr for each in ended]
    told = "".join(each.stderr for each in ended)
    assert told.count("evaluating start") == told.count("evaluating teacher") == 1
    assert_clean("beside")


# --- a disk that is full or read-only ---


def assert_whole(store: str) -> None:
    """Whatever lies under a name that a reader takes is complete."""
    assert not list(Path(store).rglob(".*.tmp"))
    for path in Path(store).rglob(RESULT):
        results.read_result(path)


def test_a_file_that_cannot_grow_ends_in_one_line(driver: Driver, prepared: Prepare) -> None:
    """RLIMIT_FSIZE stands for a full disk: a checkpoint has 600 kB."""
    again = prepared("limited")
    ended = driver.run(*again, file_size=100_000)
    assert ended.code == 1
    (line,) = ended.errors
    assert line.startswith("error: cannot write limited/tiny/bld/")
    assert "File too large" in line
    assert_whole("limited")
    assert results.state(cell("limited")) == "failed"
    assert driver.run(*again).code == 0
    assert numbers("limited") == numbers("undisturbed")


@pytest.fixture
def mounted(driver: Driver) -> Iterator[Any]:
    """Makes a small disk of its own, where that is allowed."""
    made = []

    def mount(name: str, options: str) -> None:
        Path(name).mkdir()
        call = ["mount", "-t", "tmpfs", "-o", options, "none", name]
        if subprocess.run(call, capture_output=True).returncode:
            pytest.skip("this user cannot mount a disk")
        made.append(name)

    yield mount
    for name in made:
        subprocess.run(["umount", name], check=True)


def test_a_full_disk_ends_in_one_line(driver: Driver, prepared: Prepare, mounted: Any) -> None:
    mounted("full", "size=50m,nr_inodes=18")  # room for the preflight, but not for its files
    again = prepared("full")
    ended = driver.run(*again)
    assert ended.code == 1
    (line,) = ended.errors
    assert "error: cannot write full/tiny/bld/" in line
    assert "No space left on device" in line
    assert_whole("full")
    subprocess.run(["mount", "-o", "remount,nr_inodes=1000", "full"], check=True)
    assert driver.run(*again).code == 0
    assert numbers("full") == numbers("undisturbed")


def test_a_read_only_store_is_refused_before_anything_is_computed(
    driver: Driver, mounted: Any
) -> None:
    mounted("frozen", "size=50m,ro")
    ended = driver.run(*command("frozen"), at=("evaluation", 1))
    assert (ended.code, ended.signal) == (3, 0)
    (line,) = ended.errors
    assert line.startswith("error: --store frozen cannot be written to")
