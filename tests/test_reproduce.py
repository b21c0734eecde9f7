"""Recipes hold what the papers state; a plan runs, resumes, survives failures, and compares."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ctdbench import recipes, request
from ctdbench.cli import app
from ctdbench.errors import PreflightError, RunError, Terminated, UserError
from ctdbench.evaluate.catalog import leaf_configs, task_configs
from ctdbench.launch import reproduce
from ctdbench.launch.preflight import preflight
from ctdbench.launch.table_plan import Ask, Plan, plan
from ctdbench.recipes import Scale
from ctdbench.report import papers
from ctdbench.report.reproduction_text import render
from ctdbench.spec import RunSpec

TABLES = ["alm-table1", "alm-table3", "bld-table1", "bld-table2", "bld-table3", "xtoken-main"]
SCALES: tuple[Scale, ...] = ("paper", "cpu")
CHECK = partial(preflight, store=Path("none"))


def test_the_tables_are_those_six() -> None:
    assert recipes.names() == TABLES
    with pytest.raises(UserError, match="did you mean bld-table"):
        recipes.load("bld-tabel1")


@pytest.mark.parametrize("name", TABLES)
def test_a_recipe_shows_every_number_of_its_table(name: str) -> None:
    recipe = recipes.load(name)
    table = papers.read(recipe.paper, recipe.table)
    shown = {
        (setting.name, method, column.task, column.metric)
        for setting in recipe.settings
        for method in setting.rows
        for column in recipe.columns
    }
    assert set(table.numbers) <= shown
    settings = {key.setting for key in table.numbers}
    assert {setting.name for setting in recipe.settings} == settings


@pytest.mark.parametrize("name", TABLES)
def test_a_recipe_asks_for_what_there_is(name: str) -> None:
    """Methods with valid options, pairs, and tasks with that metric and that many shots."""
    recipe, configs = recipes.load(name), task_configs()
    for column in recipe.columns:
        for task in filter(None, (column.runs, column.stand_in)):
            (leaf, *_) = leaf_configs(task.task, configs)
            assert leaf["num_fewshot"] == task.shots
            assert task.metric in [entry["metric"] for entry in leaf["metric_list"]]
    for scale in SCALES:
        planned = plan(recipe, Ask(scale=scale)).resolved(request.resolve_options)
        assert planned.cells
        for row in planned.rows:
            assert row.specs or row.absent or row.row.baseline


def stated(name: str, label: str) -> dict[str, tuple[Any, str]]:
    recipe = recipes.load(name)
    (setting,) = [one for one in recipe.settings if one.label == label]
    told = recipe.training_of(setting).stated()
    return {field: (setting.value, setting.source) for field, setting in told.items()}


def test_what_the_papers_do_not_say_is_ours() -> None:
    bld = stated("bld-table1", "new tokenizer")
    unknown = ("learning_rate", "steps", "batch_documents", "document_tokens", "bytes_per_token")
    assert {bld[field][1] for field in unknown} == {"ours"}
    assert bld["lora_targets"] == (("q_proj", "v_proj"), "paper")
    alm = stated("alm-table3", "maths")
    known = {"learning_rate": 5e-6, "steps": 5000, "batch_documents": 64, "document_tokens": 1024}
    assert {field: alm[field] for field in known} == {
        field: (value, "paper") for field, value in known.items()
    }
    assert alm["bytes_per_token"][1] == "ours"
    xtoken = stated("xtoken-main", "Qwen3-4B")
    assert xtoken["steps"] == (30_000, "paper")
    assert {xtoken[field][1] for field in ("learning_rate", "batch_documents")} == {"ours"}


def first_spec(name: str, label: str, scale: Scale, **ask: Any) -> RunSpec:
    rows = plan(recipes.load(name), Ask(scale=scale, **ask)).rows
    return next(row.specs[0] for row in rows if row.setting.label == label and row.specs)


def test_cells_at_the_papers_scale_train_as_the_paper_did() -> None:
    maths = first_spec("alm-table3", "maths", "paper")
    assert maths.train.budget == 5000 * 64 * 1024 * 3
    assert (maths.train.learning_rate, maths.pair.lora) == (5e-6, None)
    moved = first_spec("alm-table1", "Gemma2 to Qwen2", "paper")
    assert moved.pair.lora is not None
    assert len(moved.pair.lora.targets) == 7
    assert moved.train.learning_rate == 1e-5
    to_bytes = first_spec("bld-table2", "bytes", "paper")
    assert to_bytes.pair.lora is not None  # though the pair itself trains everything
    assert (to_bytes.pair.lora.rank, to_bytes.pair.lora.targets) == (64, ("q_proj", "v_proj"))
    assert to_bytes.train.document_bytes == 2048
    assert first_spec("bld-table2", "bytes", "paper", budget=1000).train.budget == 1000


def test_cells_at_cpu_scale_are_ordinary_cells_of_the_embedded_pair() -> None:
    spec = first_spec("bld-table1", "new tokenizer", "cpu", budget=20_000, limit=20)
    flags = {
        "method": "sft",
        "pair": "smol-mistral",
        "train": {"budget": 20_000},
        "eval": {"tasks": spec.eval.tasks, "limit": 20},
    }
    assert spec == request.build_spec(flags)
    pairs = {
        name: {one.pair.name for one in plan(recipes.load(name), Ask(scale="cpu")).cells.values()}
        for name in TABLES
    }
    assert pairs == {
        "alm-table1": {"smol-mistral", "smol-bytes"},
        "alm-table3": {"smol-gemma"},
        "bld-table1": {"smol-mistral"},
        "bld-table2": {"smol-bytes"},
        "bld-table3": {"smol-gemma"},
        "xtoken-main": {"smol-gemma"},
    }


def test_columns_need_their_data() -> None:
    recipe = recipes.load("bld-table1")
    without = recipe.measures("cpu", data=False)
    tasks = [measure.runs.task for measure in without if measure.runs]
    assert tasks == ["everyday_physics", "teacher_jsd", "bpb_heldout"]
    assert "--data-dir" in without[0].note
    with_data = recipe.measures("cpu", data=True)
    assert [measure.runs.task for measure in with_data if measure.runs] == ["piqa", "agi_zh"]
    assert len(with_data) == len(recipe.columns)


def test_the_papers_text_has_to_be_given() -> None:
    recipe = recipes.load("bld-table1")
    (problem,) = reproduce.problems(plan(recipe, Ask()), lambda _: [])
    assert re.search(r"Tulu-3.*--corpus", str(problem))
    found = reproduce.problems(plan(recipe, Ask(corpus="tulu")), CHECK)
    assert sum("unknown corpus" in str(problem) for problem in found) == 1


def test_what_a_pair_lacks_is_told_before_anything_runs() -> None:
    asked: list[str] = []

    def check(specs: Sequence[RunSpec]) -> list[UserError]:
        asked.extend(spec.method for spec in specs)
        return [PreflightError("Gemma is not installed", "pip install it")]

    planned = plan(recipes.load("bld-table3"), Ask(scale="cpu"))
    (problem,) = reproduce.problems(planned, check)
    assert "pip install it" in str(problem)
    assert asked == [spec.method for spec in planned.cells.values()]


# What is run in place of what the recipe states.


def no_model(specs: Sequence[RunSpec]) -> list[UserError]:
    return [PreflightError("no such model", "pip install it")]


def settings(**ask: Any) -> list[str]:
    """What a dry run of Table 1 of BLD tells of its settings, where its models are missing."""

    planned = plan(recipes.load("bld-table1"), Ask(**ask)).resolved(request.resolve_options)
    text, _ = reproduce.describe(planned, Path("none"), no_model)
    return [line.strip() for line in text.partition("Settings")[2].splitlines()]


def test_flags_stand_beside_what_they_override(tmp_path: Path) -> None:
    corpus = tmp_path / "own.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"Line {n}."}) + "\n" for n in range(90)))
    lines = settings(corpus=f"jsonl:{corpus}")
    assert [line for line in lines if "here:" in line][1:] == [  # the first explains the word
        f"paper  data Tulu-3 (here: jsonl:{corpus})"
    ]
    lines = settings(corpus=f"jsonl:{corpus}", budget=20_000, limit=7)
    assert "ours   steps 20000 (not found; here: 20kB of text)" in lines
    assert any("at most 7 items a task" in line for line in lines)


def test_at_cpu_scale_everything_that_differs_is_marked() -> None:
    lines = settings(scale="cpu")
    assert {
        "paper  data Tulu-3 (here: embedded)",
        "paper  trained lora (here: all)",
        "paper  bld bytes beam (here: mixed)",
        "paper  bld kl_weight 0.1",
        "ours   batch documents 64 (not found; here: 4)",
        "ours   document tokens 512 (not found; here: 768 bytes)",
        "ours   template plain (the beam reads plain text)",
    } <= set(lines)


# From a recipe to the side by side, on the tiny pair.

TINY: dict[str, Any] = {
    "title": "Nothing in particular",
    "paper": "bld",
    "arxiv": "2604.07466",
    "table": "Table 1",
    "training": {
        "data": {"value": "Tulu-3", "source": "paper"},
        "learning_rate": {"value": 1e-4, "source": "ours", "note": "not found"},
        "steps": {"value": 10, "source": "ours"},
        "batch_documents": {"value": 2, "source": "ours"},
        "document_tokens": {"value": 16, "source": "ours"},
        "bytes_per_token": {"value": 2.0, "source": "ours"},
    },
    "columns": [
        {
            "task": "piqa",
            "items": 1838,
            "runs": {"task": "piqa", "metric": "acc", "shots": 0},
            "stand_in": {"task": "everyday_physics", "metric": "acc", "shots": 0},
        },
        {"task": "ifeval"},
    ],
    "settings": [
        {
            "name": "Llama-3.2-3B, original tokenizer",
            "label": "own tokenizer",
            "cpu": "tiny",
            "base": {"setting": "Llama-3.2-3B, original tokenizer", "method": "original"},
            "rows": {"original": {"baseline": "teacher"}},
        },
        {
            "name": "Llama-3.2-3B -> Qwen2 tokenizer",
            "label": "new tokenizer",
            "pair": {"value": "tiny", "source": "ours"},
            "cpu": "tiny",
            "base": {"setting": "Llama-3.2-3B, original tokenizer", "method": "original"},
            "rows": {
                "mined": {"method": "kd"},  # fails: tiny's two tokenizers differ
                "bld": {"method": "sft"},
                "dskd": {"missing": "left out on purpose"},
            },
        },
    ],
}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    path = tmp_path / "tiny-table.yaml"
    path.write_text(yaml.safe_dump(TINY, sort_keys=False))
    corpus = tmp_path / "corpus.jsonl"
    lines = [f"The fox counts {n} stones, then {n + 3} more, and writes down." for n in range(90)]
    corpus.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    ask = Ask(scale="cpu", budget=3000, limit=2, corpus=f"jsonl:{corpus}")
    return plan(recipes.read(path), ask).resolved(request.resolve_options)


def test_from_nothing_to_the_side_by_side_and_again(tiny: Plan, tmp_path: Path) -> None:
    store, said = tmp_path / "runs", list[str]()
    assert reproduce.problems(tiny, CHECK) == []
    before, failing = reproduce.describe(tiny, store, CHECK)
    assert "2 cells, 0 done already" in before
    assert not failing
    text = render(reproduce.compare(tiny, reproduce.run(tiny, store, said.append), store))
    lines = {line.split("|")[0].strip(): line for line in text.splitlines() if "|" in line}
    assert lines["bld"].split("|")[1].split()[0] == "75.68?"
    assert " yes ±" in lines["bld"] or " no ±" in lines["bld"]
    assert lines["original"].split("|")[1].split()[0] == "75.46"
    assert "mined (failed)" in lines
    assert "mined: failed: " in text
    assert "left out on purpose" in text
    assert ["failed" in line for line in said] == [True, False]
    planned, _ = reproduce.describe(tiny, store, CHECK)
    assert "2 cells, 1 done already" in planned
    assert "ours   learning rate 0.0001 (not found; here: " in planned
    said.clear()
    again = render(reproduce.compare(tiny, reproduce.run(tiny, store, said.append), store))
    assert again == text
    assert said[1].endswith("done already")


def test_a_dry_run_says_what_cannot_run_and_runs_nothing(tiny: Plan, tmp_path: Path) -> None:
    text, failing = reproduce.describe(tiny, tmp_path / "runs", no_model)
    assert text.count(": cannot run\n") == 2
    assert text.count("would fail: no such model. pip install it") == len(failing) == 1
    assert not (tmp_path / "runs").exists()
    no_text, failing = reproduce.describe(replace(tiny, ask=Ask()), tmp_path / "runs", no_model)
    assert no_text.count("--corpus") == len(failing) == 1


def test_a_dry_run_of_what_cannot_run_exits_as_plan_does() -> None:
    done = CliRunner().invoke(app, ["reproduce", "bld-table1", "--dry-run"])  # no text is given
    assert done.exit_code == 3
    assert "would fail: bld-table1 trains on" in done.stdout


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda raw: raw["training"].pop("steps"), "training has no steps"),
        (lambda raw: raw["settings"][0]["rows"].pop("original"), "is no baseline"),
        (lambda raw: raw["settings"][0]["rows"].update(sft={}), "the reason why it is missing"),
        (lambda raw: raw["training"]["steps"].update(source="guess"), "training.steps.source"),
        (lambda raw: raw.update(colums=[]), "did you mean columns"),
    ],
)
def test_a_recipe_that_says_too_little_is_refused(
    change: Callable[[dict[str, Any]], Any], culprit: str, tmp_path: Path
) -> None:
    raw = json.loads(json.dumps(TINY))
    change(raw)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match=culprit):
        recipes.read(path)


def test_planning_loads_nothing_heavy() -> None:
    code = (
        "import sys, json; from ctdbench import recipes; from ctdbench.launch import reproduce;"
        "from ctdbench.launch.table_plan import Ask, plan;"
        "plan(recipes.load('alm-table1'), Ask(scale='cpu')); print(json.dumps([*sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(json.loads(done.stdout)) & {"torch", "transformers", "pandas", "lm_eval"}


def test_a_signal_to_stop_ends_the_table_and_a_broken_cell_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ctdbench.launch import cell

    planned = plan(recipes.load("bld-table1"), Ask(scale="cpu"))
    planned = planned.resolved(request.resolve_options)
    asked: list[str] = []

    def run_cell(spec: RunSpec, *_: Any, error: Exception, **__: Any) -> Any:
        asked.append(spec.method)
        raise error

    monkeypatch.setattr(cell, "run_cell", partial(run_cell, error=RunError("broken")))
    assert set(reproduce.run(planned, tmp_path).values()) == {"broken"}
    assert len(asked) == len(planned.cells) > 1
    monkeypatch.setattr(cell, "run_cell", partial(run_cell, error=Terminated("stopped")))
    asked.clear()
    with pytest.raises(Terminated):
        reproduce.run(planned, tmp_path)
    assert len(asked) == 1
