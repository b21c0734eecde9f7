"""Recipes hold what the papers state; a plan runs, resumes, survives failures, and compares."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from example_results import example
from scipy import stats

from ctdbench import recipes, request
from ctdbench.errors import PreflightError, UserError
from ctdbench.evaluate.catalog import leaf_configs, task_configs
from ctdbench.launch import reproduce
from ctdbench.launch.table_plan import Ask, Plan, plan
from ctdbench.recipes import Scale
from ctdbench.report import papers
from ctdbench.report.reproduction import Comparison, Ours, Reproduction, side_by_side
from ctdbench.report.reproduction_text import render
from ctdbench.results import Result
from ctdbench.spec import RunSpec

TABLES = ["alm-table1", "alm-table3", "bld-table1", "bld-table2", "bld-table3", "xtoken-main"]
SCALES: tuple[Scale, ...] = ("paper", "cpu")


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
    with pytest.raises(UserError, match=r"Tulu-3.*--corpus"):
        reproduce.preflight(plan(recipe, Ask()), lambda _: None)
    with pytest.raises(UserError, match="unknown corpus"):
        reproduce.preflight(plan(recipe, Ask(corpus="tulu")), lambda _: None)


def test_what_a_pair_lacks_is_told_before_anything_runs() -> None:
    def check(spec: RunSpec) -> None:
        raise PreflightError(f"{spec.pair.name}: Gemma is not installed", "pip install it")

    with pytest.raises(PreflightError, match="pip install it"):
        reproduce.preflight(plan(recipes.load("bld-table3"), Ask(scale="cpu")), check)


# Comparisons.


def ours(share: float, stderr: float = 0.02, task: str = "piqa", metric: str = "acc") -> Result:
    return example("bld", {task: {metric: share}}, stderr=stderr)


def compared(name: str, key: tuple[str, str], own: Ours, scale: Scale = "paper") -> Reproduction:
    recipe = recipes.load(name)
    return side_by_side(recipe, scale, recipe.measures(scale, data=True), {key: own})


def cell(found: Reproduction, name: str, task: str) -> Comparison:
    places = [one.column.task if one.column else "" for one in found.measures]
    (line,) = [line for line in found.lines if line.name == name]
    return line.cells[places.index(task)]


def test_noise_is_that_of_both_sides() -> None:
    """Paper: 75.68 on 1,838 items, no error printed; ours: 70 % with 2 points."""
    key = ("Llama-3.2-3B -> Qwen2 tokenizer", "bld")
    found = compared("bld-table1", key, Ours((ours(0.70),)))
    binomial = 100 * math.sqrt(0.7568 * 0.2432 / 1838)
    score = cell(found, "bld", "piqa")
    assert score.difference == pytest.approx(-5.68)
    assert score.margin == pytest.approx(1.96 * math.hypot(2, binomial))
    assert score.within is False
    assert "~" in score.marks
    near = cell(compared("bld-table1", key, Ours((ours(0.72),))), "bld", "piqa")
    assert near.within is True


def test_a_printed_error_is_used_and_another_protocol_is_marked() -> None:
    key = ("OpenMath2-Llama3.1-8B -> Gemma2 2B", "alm")
    own = ours(0.70, 0.01, "gsm8k", "exact_match_flexible")
    score = cell(compared("alm-table3", key, Ours((own,))), "alm", "gsm8k")
    assert score.margin == pytest.approx(1.96 * math.hypot(1, 1.28))
    assert score.marks == "≠"


def test_without_the_papers_error_the_noise_is_ours_and_says_so() -> None:
    key = ("Llama-3.2-3B -> Qwen2 tokenizer", "mined")
    own = Ours((ours(0.33, 0.01, "agi_zh"),))
    found = compared("bld-table1", key, own)
    score = cell(found, "mined", "agieval_cn")
    assert (score.margin, score.marks) == (pytest.approx(1.96), "°")
    assert "34.76?" in render(found)


def test_seeds_are_averaged_and_their_spread_counts() -> None:
    key = ("Llama-3.2-3B -> Qwen2 tokenizer", "bld")
    cells = tuple(ours(share) for share in (0.70, 0.72, 0.74))
    score = cell(compared("bld-table1", key, Ours(cells)), "bld", "piqa").ours
    assert score is not None
    student = stats.t.ppf(0.975, 2) / 1.96  # two degrees of freedom
    assert score[:2] == (pytest.approx(72), pytest.approx(math.sqrt(4 + student**2 * 4 / 3)))


def test_at_cpu_scale_gains_over_the_base_row_are_compared() -> None:
    key = ("Llama-3.2-3B -> Qwen2 tokenizer", "bld")
    own = Ours((ours(0.55),), base=ours(0.60))
    found = compared("bld-table1", key, own, "cpu")
    score = cell(found, "bld", "piqa")
    assert score.difference == pytest.approx(-5 - (75.68 - 75.46))
    assert "cannot be compared" in found.title
    text = render(found)
    assert max(map(len, text.splitlines())) <= 118
    row = next(line.split() for line in text.splitlines() if "75.68" in line)
    assert row[:6] == ["bld", "|", "75.68?", "+0.22", "55.00", "-5.00"]


def test_no_number_of_another_table_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """BLD's and ALM's tables have rows and tasks of the same names; so have ALM's own."""

    def text(name: str) -> str:
        recipe = recipes.load(name)
        return render(side_by_side(recipe, "paper", recipe.measures("paper", data=True), {}))

    before = {name: text(name) for name in TABLES}
    real = papers._tables()
    for name in TABLES:
        recipe = recipes.load(name)
        own = (recipe.paper, recipe.table)
        mixed = {
            table: numbers
            if table == own
            else {key: replace(one, value=99.99) for key, one in {**real[own], **numbers}.items()}
            for table, numbers in real.items()
        }
        monkeypatch.setattr(papers, "_tables", lambda tables=mixed: tables)
        assert text(name) == before[name]
        assert "99.99" not in before[name]


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
    reproduce.preflight(tiny, request.preflight)
    assert "2 cells, 0 done already" in reproduce.describe(tiny, store, request.preflight)
    text = render(reproduce.compare(tiny, reproduce.run(tiny, store, said.append), store))
    lines = {line.split("|")[0].strip(): line for line in text.splitlines() if "|" in line}
    assert lines["bld"].split("|")[1].split()[0] == "75.68?"
    assert " yes ±" in lines["bld"] or " no ±" in lines["bld"]
    assert lines["original"].split("|")[1].split()[0] == "75.46"
    assert "mined (failed)" in lines
    assert "mined: failed: " in text
    assert "left out on purpose" in text
    assert ["failed" in line for line in said] == [True, False]
    planned = reproduce.describe(tiny, store, request.preflight)
    assert "2 cells, 1 done already" in planned
    assert "ours   learning rate 0.0001 (not found)" in planned
    said.clear()
    again = render(reproduce.compare(tiny, reproduce.run(tiny, store, said.append), store))
    assert again == text
    assert said[1].endswith("done already")


def test_a_dry_run_says_what_cannot_run_and_runs_nothing(tiny: Plan, tmp_path: Path) -> None:
    def check(spec: RunSpec) -> None:
        raise PreflightError("no such model", "pip install it")

    text = reproduce.describe(tiny, tmp_path / "runs", check)
    assert text.count("cannot run: no such model. pip install it") == 2
    assert not (tmp_path / "runs").exists()
    no_text = reproduce.describe(replace(tiny, ask=Ask()), tmp_path / "runs", check)
    assert no_text.count("--corpus") == 1


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
