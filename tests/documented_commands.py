"""The commands in a Markdown text, and whether the command line takes them."""

from __future__ import annotations

import re
import shlex
from typing import Any

import typer.main

from ctdbench.cli import app


def commands(text: str, program: str) -> list[list[str]]:
    """Arguments of every command of that program, or of `-m` with it, in the text's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [
        line[place + 1 :]
        for line in words
        for place, word in enumerate(line)
        if word == program and line[place - 1 : place] in ([], ["-m"])
    ]


def parse(arguments: list[str]) -> None:
    """Raises what typer does for a command or an option that is not there."""
    group: Any = typer.main.get_command(app)
    with group.make_context("ctdbench", list(arguments)) as context:
        name, command, rest = group.resolve_command(context, arguments)
        command.make_context(name, list(rest), parent=context)
