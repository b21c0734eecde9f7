"""Every command in the README is one that the command line takes, with names that exist."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from ctdbench import request
from ctdbench.cli import app
from ctdbench.errors import PreflightError
from ctdbench.evaluate import available_tasks

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(program: str) -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line and line[0] == program]


def test_the_readme_has_commands() -> None:
    assert len(commands("ctdbench")) >= 5


@pytest.mark.parametrize("arguments", commands("ctdbench"), ids=" ".join)
def test_a_command_of_the_readme_parses(arguments: list[str]) -> None:
    group: Any = typer.main.get_command(app)
    with group.make_context("ctdbench", list(arguments)) as context:
        name, command, rest = group.resolve_command(context, arguments)
        command.make_context(name, list(rest), parent=context)


runs = [line for line in commands("ctdbench") if line[0] == "run"]


@pytest.mark.parametrize("arguments", runs, ids=" ".join)
def test_a_run_of_the_readme_names_what_exists(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything up to the engine goes through: names, settings, the method's options."""

    def stop(spec: Any, *_: Any, **__: Any) -> None:
        assert set(spec.eval.tasks) <= {info.name for info in available_tasks()}
        raise PreflightError("reached the engine")

    engine = ModuleType("ctdbench.launch.cell")
    engine.run_cell = stop  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ctdbench.launch.cell", engine)
    monkeypatch.setattr(request, "preflight", lambda spec: None)
    outcome = CliRunner().invoke(app, arguments)
    assert (outcome.exit_code, outcome.stderr) == (3, "error: reached the engine\n")


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", TEXT, flags=re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_tree_of_the_readme_exists() -> None:
    (tree,) = re.findall(r"```\n(ctdbench/.*?)```", TEXT, flags=re.DOTALL)
    for name in re.findall(r"(?<![\w/])(\w+\.py|\w+/)(?=\s)", tree):
        assert (ROOT / name).exists() or (ROOT / "ctdbench" / name).exists(), name
