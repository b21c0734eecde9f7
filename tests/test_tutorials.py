"""The tutorials' steps, taken from their text and run as written in an empty folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main

from ctdbench.cli import app

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "tutorials"
METHOD = FOLDER / "adding-a-method.md"
TUTORIALS = [METHOD, FOLDER / "adding-a-pair-or-a-task.md"]


@dataclass(frozen=True)
class Step:
    """A code block: a file to write, a command to run (`bash`; `sh`: in an environment of its
    own), or what a command prints (`text`)."""

    language: str
    title: str
    body: str


def steps(path: Path) -> list[Step]:
    blocks = r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$'
    found = re.findall(blocks, path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [Step(*block) for block in found]


def commands(path: Path) -> list[list[str]]:
    text = "".join(step.body for step in steps(path) if step.language in ("bash", "sh"))
    lines = [shlex.split(line) for line in text.splitlines()]
    return [line[1:] for line in lines if line and line[0] == "ctdbench"]


def follow(path: Path, folder: Path, language: str = "bash") -> list[str]:
    """Do the steps in order; what each block of commands printed."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": places, "CTDBENCH_CACHE": str(folder / "cache")}
    printed = []
    for step in steps(path):
        if step.title:
            (folder / step.title).write_text(step.body, encoding="utf-8")
        elif step.language == language:
            printed.append(shell(step.body, folder, environment))
    return printed


def shell(text: str, folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_every_command_parses(path: Path) -> None:
    group: Any = typer.main.get_command(app)
    assert len(commands(path)) >= 5
    for arguments in commands(path):
        with group.make_context("ctdbench", list(arguments)) as context:
            name, command, rest = group.resolve_command(context, arguments)
            command.make_context(name, list(rest), parent=context)


def test_the_method_is_short_and_not_in_the_suite() -> None:
    (source,) = [step.body for step in steps(METHOD) if step.title == "skew_kl.py"]
    body = source[source.index("class SkewKL(Method)") :].splitlines()
    assert len(body) <= 20
    assert not [path for path in (ROOT / "methods").glob("*.py") if "skew" in path.name]


def table(text: str) -> tuple[list[str], list[str]]:
    """Heading of the first table in it, and the labels of its rows."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("tiny: "))
    heading = next(line for line in lines[start + 1 :] if line)
    labels = [line.split()[0] for line in lines[start + 1 :] if line and not line[0].isspace()]
    return [lines[start], *heading.split()], labels[:4]


@pytest.mark.slow
def test_adding_a_method(tmp_path: Path) -> None:
    *_, printed = follow(METHOD, tmp_path)
    (shown,) = [step.body for step in steps(METHOD) if step.language == "text"]
    *_, last = printed.split("tiny: ")  # of the last command
    assert table(f"tiny: {last}") == table(shown)
    assert table(shown)[1] == ["teacher", "start", "sft", "skew-kl"]


@pytest.mark.slow
def test_adding_a_pair_or_a_task(tmp_path: Path) -> None:
    pair, task = follow(TUTORIALS[1], tmp_path)
    assert "11 of 11 checks passed" in pair
    assert "8 of 8 checks passed" in task
    assert "capitals" in task.split("8 of 8 checks passed")[1]
    assert "./mine.yaml, bld, seed 0" in task
