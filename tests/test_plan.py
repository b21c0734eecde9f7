"""What a plan says before anything runs: states, and everything that would fail, at once."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from test_cli import apart
from typer.testing import CliRunner, Result

from ctdbench import registry, request
from ctdbench.cli import app
from ctdbench.errors import UserError
from ctdbench.launch import devices, preflight
from ctdbench.launch.devices import Gpu
from ctdbench.spec import RunSpec

GIB = 2**30


# --- what would fail -----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with memory and without a GPU, whatever this one has."""
    monkeypatch.setattr(devices, "free_memory", lambda: 64 * GIB)
    monkeypatch.setattr(devices, "gpus", tuple)


def problems(spec: RunSpec, store: Path, **fields: Any) -> list[str]:
    return [str(problem) for problem in preflight.preflight([spec], store, **fields)]


def tiny(**fields: Any) -> RunSpec:
    return request.build_spec({"method": "sft", "pair": "tiny", **fields})


def test_nothing_is_wrong_with_the_tiny_pair(tmp_path: Path) -> None:
    assert problems(tiny(), tmp_path / "runs") == []


def test_everything_that_is_missing_is_told_at_once(tmp_path: Path) -> None:
    pair = {
        "name": "nowhere",
        "student": {"model": "dir:nowhere", "tokenizer": "wheel:no-such-thing/file"},
        "teachers": [{"model": "dir:nowhere-either"}],
    }
    spec = tiny(
        method="bld",
        pair=pair,
        options={"byte_weigt": 1},
        train={"corpus": "jsonl:gone.jsonl"},
        eval={"tasks": ["gsm9k", "piqa"], "data_dir": str(tmp_path)},
    )
    found = problems(spec, tmp_path)
    for culprit in (
        "gsm9k", "piqa/validation.jsonl", "gone.jsonl", "dir:nowhere ", "no-such-thing",
        "dir:nowhere-either", "did you mean byte_weight",
    ):  # fmt: skip
        assert sum(culprit in line for line in found) == 1
    assert len(found) == 7
    assert not any("\n" in line for line in found)


def test_a_folder_that_is_none_is_told_instead_of_its_files(tmp_path: Path) -> None:
    eval_spec = {"tasks": ["piqa", "gsm8k"], "data_dir": str(tmp_path / "no")}
    (line,) = problems(tiny(eval=eval_spec, train={"corpus": "gsm8k"}), tmp_path)
    assert f"--data-dir {tmp_path / 'no'} is no folder" in line


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"method": "gold", "train": {"balance": "ratio"}}, "train.balance: ratio"),
        ({"train": {"budget": "1GB"}}, "ask for at most --budget"),
        ({"method": "bld", "options": {"bytes": "guess"}}, "bytes"),
        (
            {"method": "bld", "options": {"bytes": "beam"}, "train": {"template": "chat"}},
            "beam reads plain text",
        ),
    ],
)
def test_what_no_cell_can_have(tmp_path: Path, fields: dict[str, Any], complaint: str) -> None:
    (line,) = problems(tiny(**fields), tmp_path)
    assert complaint in line


def test_problems_of_many_cells_are_told_once(tmp_path: Path) -> None:
    specs = [tiny(seed=seed, train={"budget": "1GB"}) for seed in range(3)]
    assert len(preflight.preflight(specs, tmp_path)) == 1


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "free_memory", lambda: GIB)
    assert problems(tiny(), tmp_path) == []
    (line,) = problems(tiny(), tmp_path, jobs=2)
    assert "2 at a time" in line
    assert "fewer --jobs" in line
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch` sets it
    assert problems(tiny(), tmp_path, jobs=2) == []


def test_too_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = SimpleNamespace(free=1000)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: full)
    store, cache = problems(tiny(), tmp_path)
    assert store.startswith(f"--store {tmp_path}")
    assert cache.startswith("the cache ")


def test_a_store_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "store").touch()
    (line,) = problems(tiny(), tmp_path / "store")
    assert "cannot be written to" in line


def test_a_gpu_without_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "gpus", lambda: (Gpu("0", 8 * GIB, bfloat16=False),))
    spec = tiny(train={"precision": "bfloat16"}, eval={"precision": "bfloat16"})
    assert "train.precision" in "".join(problems(spec, tmp_path))
    assert problems(tiny(), tmp_path) == []


def test_what_a_method_says_of_its_pair() -> None:
    found = preflight.unfit([tiny(method="kd"), tiny(), tiny(method="simct")])
    assert [spec.method for spec, _ in found] == ["kd"]
    assert isinstance(found[0][1], UserError)


def test_run_tells_all_that_is_missing_before_torch_is_loaded(tmp_path: Path) -> None:
    """As a plan does, and the worst decides the exit code."""
    stated = {"student": {"model": "dir:nowhere"}, "teachers": [{"model": "dir:nowhere-either"}]}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(stated))
    asked = ("run", "--method", "sft", "--pair", str(tmp_path / "p.yaml"))
    done, loaded = apart(*asked)
    told = ["dir:nowhere has", "dir:nowhere-either has"]
    assert done.returncode == 3
    assert [part in line for line, part in zip(lines(done.stderr), told, strict=True)] == [True] * 2
    done, loaded_then = apart(*asked, "--tasks", "gsm9k", "--data-dir", str(tmp_path))
    assert done.returncode == 3
    assert sum("gsm9k" in line for line in lines(done.stderr)) == 1
    assert len(lines(done.stderr)) == 3
    assert not (loaded | loaded_then) & {"torch", "transformers"}


def test_run_refuses_a_machine_with_too_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "free_memory", lambda: 1000)
    store = tmp_path / "runs"
    asked = ("run", "--method", "sft", "--pair", "tiny", "--store", str(store))
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 3
    (line,) = lines(done.stderr)
    assert "sft on tiny: it takes about" in line
    assert not store.exists()


def lines(told: str) -> list[str]:
    found = told.splitlines()
    assert all(line.startswith("error: ") for line in found)
    return found


# --- devices -------------------------------------------------------------------------------------

SMI = """#!/bin/sh
echo '0, GPU-aaaa, 81559, 9.0'
echo '1, GPU-bbbb, 16160, 7.0'
"""


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A driver's tool that reports two GPUs."""
    monkeypatch.undo()  # of `roomy`: the real function is what is tried
    tool = tmp_path / "nvidia-smi"
    tool.write_text(SMI)
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    devices.gpus.cache_clear()
    yield
    devices.gpus.cache_clear()


@pytest.mark.usefixtures("two_gpus")
def test_gpus_are_those_that_the_driver_reports() -> None:
    assert devices.gpus() == (Gpu("0", 81559 * 2**20, True), Gpu("1", 16160 * 2**20, False))


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("visible", "names"), [("1", ["1"]), ("1,0", ["1", "0"]), ("GPU-bbbb", ["GPU-bbbb"]), ("", [])]
)
def test_gpus_that_are_hidden_are_not_used(
    monkeypatch: pytest.MonkeyPatch, visible: str, names: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.name for gpu in devices.gpus()] == names


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_whose_driver_tells_little_is_taken_as_able(tmp_path: Path) -> None:
    told = (tmp_path / "nvidia-smi").read_text().replace("81559", "[N/A]").replace("9.0", "[N/A]")
    (tmp_path / "nvidia-smi").write_text(told)
    assert devices.gpus()[0] == Gpu("0", sys.maxsize, bfloat16=True)


def test_memory_heeds_a_containers_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    whole = devices.free_memory()
    if whole is None:
        pytest.skip("this system does not tell its memory")
    (tmp_path / "limit").write_text("123456\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(devices, "CGROUPS", (str(tmp_path / "none"), str(tmp_path / "limit")))
    assert devices.free_memory() == 123456


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A small corpus, as a setting."""
    rows = [{"text": f"The fox counts {number} stones."} for number in range(400)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


def corpus(text: str) -> tuple[str, str]:
    return "--set", f"train.corpus={text}"


def plan(*arguments: str) -> Result:
    fixed = ("--tasks", "bpb_heldout", "--limit", "1", "--budget", "4kB")
    return CliRunner().invoke(app, ["plan", *fixed, *arguments])


def test_a_plan_shows_cells_and_runs_none(tmp_path: Path, text: str) -> None:
    store = tmp_path / "runs"
    done = plan(
        "--method", "sft,bld[path]", "--pair", "tiny", "--seeds", "2", "--store", str(store)
    )
    assert done.exit_code == 0, done.output
    assert "tiny, bld[path], seed 1  missing" in done.stdout
    assert "4 cells: 4 missing" in done.stdout
    assert "FLOPs" in done.stdout
    assert not store.exists()


def test_a_plan_says_what_would_fail_and_exits_3(tmp_path: Path, text: str) -> None:
    done = plan(
        "--method",
        "sft,kd",
        "--pair",
        "tiny",
        "--seed",
        "0",
        "--store",
        str(tmp_path),
        *corpus(text),
    )
    assert done.exit_code == 3
    assert "tiny, sft, seed 0  ?" in done.stdout
    assert "would fail: kd on tiny: method kd" in done.stdout


def test_too_little_of_something_hides_no_states(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "free_memory", lambda: 1000)
    done = plan("--method", "sft", "--pair", "tiny", "--store", str(tmp_path), *corpus(text))
    assert done.exit_code == 3
    assert "tiny, sft, seed 0  missing" in done.stdout
    assert "would fail: sft on tiny: it takes about" in done.stdout


def test_a_plan_of_a_tuned_grid(tmp_path: Path, text: str) -> None:
    raw = {
        "pairs": ["tiny"],
        "rows": ["sft"],
        "train": {"corpus": text},
        "eval": {"tasks": ["bpb_heldout"], "limit": 1},
        "tuning": {"values": [0.1, 0.2, 0.3], "seed": 7, "select": "bpb_heldout.bpb"},
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(raw))
    done = plan("--grid", str(tmp_path / "grid.yaml"), "--store", str(tmp_path / "runs"))
    assert done.exit_code == 0, done.output
    assert "tiny, sft, trial train.learning_rate=0.2  missing" in done.stdout
    assert "tiny, sft, seed 0                         after its trials" in done.stdout
    assert "4 to run" in done.stdout
    assert "not decided" not in done.stdout


def test_what_cannot_be_had_is_found_without_torch(tmp_path: Path) -> None:
    done, loaded = apart(
        *("plan", "--method", "bld,sft", "--pair", "llama-qwen", "--tasks", "piqa"),
        HF_HOME=str(tmp_path),
        HF_HUB_OFFLINE="0",
        HF_ENDPOINT="http://127.0.0.1:9",
    )
    assert done.returncode == 3, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("would fail")]
    assert len(lines) == 3  # the task, the student, the teacher
    assert not loaded & {"torch", "transformers"}


def test_a_pair_file_of_ones_own(tmp_path: Path, text: str) -> None:
    raw = registry.load_pair("tiny").model_dump(
        mode="json", exclude_defaults=True, exclude={"name"}
    )
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(raw))
    done = plan(
        "--method",
        "sft",
        "--pair",
        str(tmp_path / "mine.yaml"),
        "--store",
        str(tmp_path),
        *corpus(text),
    )
    assert done.exit_code == 0, done.output
    assert "1 cells: 1 missing" in done.stdout
