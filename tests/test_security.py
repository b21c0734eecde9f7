"""What is never run, read, written or told: pickles, foreign code, secrets, the user's folders."""

from __future__ import annotations

import ast
import json
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.ipc
import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner, Result

from ctdbench import registry, results
from ctdbench.cli import app
from ctdbench.distill import models, references
from ctdbench.results import CHECKPOINTS

pytestmark = pytest.mark.usefixtures("own_cache")
ROOT = Path(__file__).resolve().parents[1]
CODE = sorted(
    path for name in ("ctdbench", "methods", "tasks") for path in (ROOT / name).rglob("*.py")
)
TEXT = [f"The fox counts {number} stones and writes the sum down." for number in range(40)]

# --- the code ---

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {
    *("torch.load", "torch.save", "np.save", "numpy.save", "pandas.read_pickle", "to_pickle"),
    *("eval", "exec", "os.system", "os.popen", "tempfile.mktemp"),
}
TRUE = {"allow_pickle", "shell", "trust_remote_code"}  # never given as a constant


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def faults(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (f"imports {name}" for name in names if name.partition(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        if called(node) in CALLS:
            yield f"calls {called(node)}"
        if called(node) in ("yaml.load", "yaml.load_all") and "_Loader" not in ast.unparse(node):
            yield "loads YAML with no safe loader"
        for keyword in node.keywords:
            constant = isinstance(keyword.value, ast.Constant) and keyword.value.value
            if keyword.arg in TRUE and constant is True:
                yield f"sets {keyword.arg}"
            if keyword.arg == "weights_only" and constant is not True:
                yield "sets weights_only"


def test_no_code_pickles_evaluates_or_trusts() -> None:
    found = {str(path.relative_to(ROOT)): list(faults(path)) for path in CODE}
    assert len(found) > 80
    assert {path: told for path, told in found.items() if told} == {}


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text(
        "import pickle\nfrom joblib import load\ntorch.load(x)\neval(x)\nyaml.load(x)\n"
        "f(shell=True)\nf(trust_remote_code=True)\nf(weights_only=False)\nf(trust_remote_code=t)\n"
    )
    assert len(list(faults(bad))) == 8


def test_task_files_are_read_without_running_them(tmp_path: Path) -> None:
    from ctdbench.evaluate.catalog import available_tasks

    (tmp_path / "own.py").write_text("raise SystemExit('was run')")
    (tmp_path / "own.yaml").write_text("task: own\ndoc_to_text: !function own.text\n")
    assert "own" in {info.name for info in available_tasks([tmp_path / "own.yaml"])}


def test_readme_says_whose_code_is_trusted() -> None:
    told = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert "Task files and plugins run Python: use those you trust." in told
    assert "`trust_remote_code` is a flag" in told


# --- what a run writes and reads ---


def run(*more: str, method: str = "sft", pair: str = "tiny") -> Result:
    Path("corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT))
    cell = ("run", "--method", method, "--pair", pair, "--budget", "1kB", "--store", "runs")
    settings = ("train.corpus=jsonl:corpus.jsonl", "train.checkpoint_every=2")
    sets = [word for setting in settings for word in ("--set", setting)]
    return CliRunner().invoke(app, [*cell, *sets, "--tasks", "bpb_pydoc", "--limit", "1", *more])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_plugins", {})
    return tmp_path


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("a pickle")


@pytest.mark.parametrize("method", ["bld", "seqkd", "p-kl"])
def test_no_file_of_a_run_or_of_the_cache_is_a_pickle(
    method: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CTDBENCH_CACHE", str(folder / "cache"))
    options = {"p-kl": ("--set", "method.projection=learned"), "seqkd": ("--budget", "500B")}
    more = options.get(method, ())
    with monkeypatch.context() as patch:
        for module, name in ((pickle, "load"), (pickle, "dump"), (torch, "load"), (torch, "save")):
            patch.setattr(module, name, refuse)
        with monkeypatch.context() as stopped:
            stopped.setattr("ctdbench.launch.cell.evaluate", refuse)
            run(*more, method=method)
        outcome = run(*more, method=method)
    assert outcome.exit_code == 0, outcome.stderr
    with monkeypatch.context() as stopped:  # leaves checkpoints
        stopped.setattr("ctdbench.launch.cell.Cell.evaluate", refuse)
        run(*more, "--seed", "1", method=method)
    files = [path for path in folder.glob("[rc]*/**/*") if path.is_file()]
    assert any(CHECKPOINTS in path.parts for path in files)
    for path in files:
        assert_plain(path)


def assert_plain(path: Path) -> None:
    """Safetensors, Arrow, JSON, JSON Lines, or text in UTF-8, which no pickle is."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            assert list(file.keys())
    elif path.suffix == ".arrow":
        assert pyarrow.ipc.open_stream(path).schema.names
    elif path.suffix == ".jsonl":
        assert all(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    elif path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    else:
        assert "\0" not in path.read_text(encoding="utf-8"), path


# --- code that comes with a model ---

OWN = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({mark!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def foreign(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pair whose student brings Python of its own; returns what that would make."""
    import shutil

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "m"))
    monkeypatch.syspath_prepend(folder / "m")
    models.load_tokenizer("tiny:student")
    shutil.copytree(models._tiny_folder(references.parse("tiny:student")), "own")
    mark = folder / "was-run"
    Path("own/own.py").write_text(OWN.format(mark=str(mark)))
    config = json.loads(Path("own/config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    Path("own/config.json").write_text(json.dumps(config | {"model_type": "own"}))
    stated = {"student": {"model": "dir:own"}, "teachers": [{"model": "tiny:teacher"}]}
    Path("p.yaml").write_text(json.dumps(stated))
    return mark


def test_code_of_a_model_runs_only_where_the_command_line_says_so(foreign: Path) -> None:
    outcome = run(pair="p.yaml")
    assert outcome.exit_code == 3
    assert "--trust-remote-code" in outcome.stderr
    assert not foreign.exists()
    trusted = run("--trust-remote-code", pair="p.yaml")
    assert trusted.exit_code == 0, trusted.stderr
    assert foreign.exists()
    (path,) = Path("runs").glob("p/sft/*/result.json")
    assert results.read_result(path)["spec"]["trust_remote_code"] is True  # type: ignore[typeddict-item]


# --- what results tell ---

TOKEN, PASSWORD = "hf_" + "q7" * 17, "correct horse"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with everything below it, and secrets in the environment."""
    folder = tmp_path / "home" / "ada"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(registry, "_plugins", {})
    for name, value in {"HOME": str(folder), "HF_TOKEN": TOKEN, "DB_PASSWORD": PASSWORD}.items():
        monkeypatch.setenv(name, value)
    return folder


LEAK = """
import os
from ctdbench.method import Method
class Leak(Method):
    def terms(self, block, modules):
        raise OSError(f"{os.environ['HF_TOKEN']} {os.environ['DB_PASSWORD']} {os.getcwd()}/x")
METHOD = Leak
"""


def test_no_secret_and_no_home_reaches_a_result(home: Path) -> None:
    from ctdbench.distill import tiny

    (home / "models").mkdir()
    tiny.make("student", home / "models")
    stated = {"student": {"model": f"dir:{home}/models"}, "teachers": [{"model": "tiny:teacher"}]}
    Path("p.yaml").write_text(json.dumps(stated))
    Path("leak.py").write_text(LEAK)
    Path("data").mkdir()
    absolute = (
        "--set",
        f"train.corpus=jsonl:{home}/corpus.jsonl",
        "--data-dir",
        str(home / "data"),
    )
    done = run(*absolute, pair="p.yaml")
    assert done.exit_code == 0, done.stderr
    failed = run(*absolute, "--plugin", "leak.py", method="leak", pair="p.yaml")
    assert failed.exit_code == 1
    for path in Path("runs").rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        for secret in (str(home), TOKEN, PASSWORD):
            assert secret.encode() not in data, path
    (path,) = Path("runs").glob("p/leak/*/result.json")
    (note,) = results.read_result(path)["notes"]
    assert "OSError: *** *** ~/x" in note
    (path,) = Path("runs").glob("p/sft/*/result.json")
    spec = results.read_result(path)["spec"]
    assert spec["train"]["corpus"] == "jsonl:~/corpus.jsonl"
    # The spec of a result is a config file, and `~` is read as the home.
    Path("again.yaml").write_text(json.dumps(spec))
    again = CliRunner().invoke(app, ["run", "--config", "again.yaml", "--store", "runs"])
    assert again.exit_code == 0, again.stderr
    assert "done already" in again.stderr


def test_a_sweep_writes_no_home_into_its_requests(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it writes asks for the same cell: `~` is read as the home."""
    from ctdbench import request
    from ctdbench.distill import tiny
    from ctdbench.launch import sweep
    from ctdbench.launch.grid import GridCell
    from ctdbench.launch.local import Ended, Job

    for name in ("models", "data/piqa"):
        (home / name).mkdir(parents=True)
    tiny.make("student", home / "models")
    (home / "data/piqa/validation.jsonl").write_text("")
    (home / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT))
    sides = {"student": {"model": f"dir:{home}/models"}, "teachers": [{"model": "tiny:teacher"}]}
    evaluation = {"tasks": ["piqa", "bpb_pydoc"], "data_dir": f"{home}/data"}
    asked = request.resolve_options(
        request.build_spec(
            {
                "method": "sft",
                "pair": {"name": "p", **sides},
                "train": {"corpus": f"jsonl:{home}/text.jsonl"},
                "eval": evaluation,
            }
        )
    )
    (place,) = sweep.places([GridCell("one", asked)], Path("runs"))
    started: list[Job] = []

    def launch(jobs: Sequence[Job], ended: Ended) -> None:
        started.extend(jobs)

    sweep.run_places([place], launch)
    (path,) = Path("runs").rglob(results.REQUEST)
    assert str(path) in started[0].command
    assert str(home) not in path.read_text()
    again = request.build_spec({}, path)
    assert again.train.corpus == "jsonl:~/text.jsonl"
    assert again.eval.data == home / "data"
    (same,) = sweep.places([GridCell("again", again)], Path("runs"))
    assert same.cell.id == place.cell.id


def test_what_only_looks_like_a_home_or_a_secret_stays(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ctdbench.launch.provenance import without_private

    monkeypatch.setenv("SHORT_KEY", "a")
    texts = [f"{home}s/x", f"/mnt{home}/x", "a banana", "keys"]
    assert without_private({"notes": texts, "n": 1.5}) == {"notes": texts, "n": 1.5}
    assert without_private([f"in {home}: x", str(home), (f"{home}/",)]) == ["in ~: x", "~", ["~/"]]
