"""What a plan says of the cache, against what runs put there."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from ctdbench import request
from ctdbench.cli import app
from ctdbench.launch import preflight
from ctdbench.launch.cache_use import CacheUse, cache_use
from ctdbench.launch.grid import changed
from ctdbench.spec import RunSpec


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CTDBENCH_CACHE", str(tmp_path / "cache"))


def asked(method: str = "uld", seed: int = 0, **train: Any) -> RunSpec:
    fields = {"method": method, "pair": "tiny", "seed": seed}
    evaluation = {"tasks": ["bpb_pydoc"], "limit": 1}
    return request.build_spec({**fields, "train": {"budget": "8kB", **train}, "eval": evaluation})


def use(*specs: RunSpec) -> CacheUse:
    return cache_use(specs, {})


def taken(name: str) -> int:
    return sum(path.stat().st_size for path in Path("cache", name).rglob("*") if path.is_file())


def run(spec: RunSpec) -> None:
    Path("run.yaml").write_text(
        json.dumps(spec.model_dump(mode="json", exclude={"trust_remote_code"}))
    )
    done = CliRunner().invoke(app, ["run", "--config", "run.yaml", "--store", "runs"])
    assert done.exit_code == 0, done.stderr


def test_what_cells_put_into_the_cache_is_predicted_within_a_quarter() -> None:
    """Three cells: the first without a teacher, the third with another text than the others."""
    specs = [asked("sft"), asked(), asked(seed=1)]
    for count, spec in enumerate(specs, 1):
        run(spec)
        found = use(*specs[:count])
        assert found.examples == pytest.approx(taken("examples"), rel=0.25)
        assert found.states == pytest.approx(taken("states"), rel=0.25)
    assert use(*specs[:2]).examples == use(specs[0]).examples


def test_states_are_shared_by_methods_and_by_documents() -> None:
    one = use(asked())
    assert one.states > 0
    assert use(asked(), asked("gold"), asked("sft")) == one
    assert use(asked(document_bytes=500)).states == pytest.approx(one.states, rel=0.1)
    both = use(asked(), asked(seed=1))
    assert both.examples == pytest.approx(2 * one.examples, rel=0.05)
    most = use(*(asked(seed=seed, budget="300kB") for seed in range(40)))
    assert most.states < 40 * use(asked(budget="300kB")).states / 2  # the corpus has no more


def test_states_that_are_not_stored_take_nothing() -> None:
    one = use(asked())
    for change in ({"teacher_cache": None}, {"teacher_cache": one.states - 1}, {"on_policy": 0.5}):
        assert use(changed(asked(), {"train": change})) == CacheUse(one.examples, 0)
    assert use(asked(teacher_cache=one.states + 1)) == one
    in_full = use(asked(precision="float32"))
    assert in_full.states == pytest.approx(2 * use(asked(precision="bfloat16")).states, abs=2)


def test_a_plan_tells_of_the_cache() -> None:
    told = "--method", "uld,sft", "--pair", "tiny", "--budget", "8kB", "--tasks", "bpb_pydoc"
    done = CliRunner().invoke(app, ["plan", *told])
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("cache, at most: ")]
    assert "kB of tokenized text" in line
    assert "kB of teacher states" in line


def test_a_cache_without_room_for_the_text_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("cache").mkdir()
    spec = asked()
    needed = use(spec).examples
    for free, told in ((needed, []), (needed - 1, ["the cache"])):

        def usage(path: Path, free: int = free) -> SimpleNamespace:
            return SimpleNamespace(free=free if path.name == "cache" else 2**50)

        monkeypatch.setattr(preflight.shutil, "disk_usage", usage)
        problems = [str(problem) for problem in preflight.preflight([spec], Path("runs"))]
        assert [problem.partition(" /")[0] for problem in problems] == told
