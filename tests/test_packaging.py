"""What is shipped and what imports what."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "ctdbench": "ctdbench",
    "methods": "ctdbench_methods",
    "tasks": "ctdbench_tasks",
    "results/papers": "ctdbench_results/papers",
}
DEFINITIONS = (ast.FunctionDef, ast.ClassDef)
FOREIGN = {"_version", "_supports_default_dynamic_cache"}  # names of torch and transformers
SHIPPED = (".py", ".yaml", ".jsonl", ".gz", ".typed", ".csv", ".css", ".js")


def run_python(code: str, *, path: Path | None = None, cwd: Path | None = None) -> str:
    environment = dict(os.environ) | ({"PYTHONPATH": str(path)} if path else {})
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_contracts_hold() -> None:
    """The contracts are in pyproject.toml."""
    from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

    outcome = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert outcome == EXIT_STATUS_SUCCESS


def own_names(tree: ast.AST) -> set[str]:
    """Names with an underscore that a module gives to something: functions, classes, fields."""
    nodes = list(ast.walk(tree))
    found = {node.name for node in nodes if isinstance(node, DEFINITIONS)}
    found |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    found |= {
        n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
    }
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def test_no_module_uses_what_another_keeps_for_itself() -> None:
    paths = [path for name in ("ctdbench", "methods") for path in (ROOT / name).rglob("*.py")]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    owned = {path: own_names(tree) for path, tree in trees.items()}
    everything = set().union(*owned.values()) - FOREIGN
    assert {"_job", "_flops"} <= everything
    used: dict[Path, set[str]] = {}
    for path, tree in trees.items():
        nodes = list(ast.walk(tree))
        names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        names |= {alias.name for node in imports for alias in node.names}
        used[path] = names & (everything - owned[path])
    found = {path.name: names for path, names in used.items() if names}
    assert found == {}


@pytest.mark.parametrize(
    "module",
    ["cli", "spec", "registry", "request", "results", "report", "distill.references"],
)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    heavy = ["torch", "transformers", "pandas", "lm_eval", "datasets", "matplotlib"]
    code = f"import sys, json, ctdbench.{module}; print(json.dumps([*sys.modules]))"
    assert not set(json.loads(run_python(code))) & set(heavy)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built in a copy, unpacked into a folder."""
    copy = tmp_path_factory.mktemp("copy")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "results/__init__.py"):
        shutil.copy(ROOT / name, copy / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(copy / "dist"), str(copy)], check=True, timeout=120)
    (built,) = (copy / "dist").glob("*.whl")
    unpacked = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(built).extractall(unpacked)
    return unpacked


def test_the_wheel_holds_every_file_of_the_tree(wheel: Path) -> None:
    for folder, package in FOLDERS.items():
        own = {
            path.relative_to(ROOT / folder)
            for path in (ROOT / folder).rglob("*")
            if path.name.endswith(SHIPPED) and "__pycache__" not in path.parts
        }
        packed = {path.relative_to(wheel / package) for path in (wheel / package).rglob("*")}
        assert own
        assert own <= packed
    assert not [path for path in wheel.rglob("*") if path.name == "__pycache__"]
    assert not (wheel / "tests").exists()


def test_the_wheel_works_without_the_tree(wheel: Path, tmp_path: Path) -> None:
    code = (
        "import ctdbench, json; from ctdbench import request; "
        "print(json.dumps([ctdbench.__file__, request.listing()]))"
    )
    where, listed = json.loads(run_python(code, path=wheel, cwd=tmp_path))
    assert Path(where).is_relative_to(wheel)
    here = json.loads(
        run_python(
            "import json; from ctdbench import request; print(json.dumps(request.listing()))"
        )
    )
    assert listed == here


def test_constraints_pin_what_the_project_asks_for() -> None:
    """Every direct dependency has a tested version, and torch the one this project is built on."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["embedded"], *extras["dev"]]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    names = {name.lower().replace("_", "-") for name in pinned}
    wanted = {requirement.partition(">=")[0].strip().lower() for requirement in asked}
    assert wanted <= names
    assert pinned["torch"] == "2.13.0"
