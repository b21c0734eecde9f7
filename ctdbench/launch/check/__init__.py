"""`ctdbench check NAME`: what it finds of a method, a pair or a task, one line a finding."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ctdbench import registry
from ctdbench.errors import UserError
from ctdbench.evaluate import available_tasks
from ctdbench.evaluate.task_files import parse

Kind = Literal["method", "pair", "task"]


def kind_of(name: str) -> Kind:
    """What a name stands for, or what is in a YAML file.

    Raises UserError for a name that stands for nothing, or for several things.
    """
    if registry.is_file_name(name):
        stated = parse(Path(name).expanduser())
        return "pair" if {"student", "teachers"} & stated.keys() else "task"
    known: dict[Kind, list[str]] = {
        "method": list(registry.methods()),
        "pair": list(registry.pair_files()),
        "task": [info.name for info in available_tasks()],
    }
    kinds = [kind for kind, names in known.items() if name in names]
    if not kinds:
        names = [name for some in known.values() for name in some]
        raise UserError(
            f"there is no method, pair or task {name!r}", registry.suggestion(name, names)
        )
    if len(kinds) > 1:
        raise UserError(f"{name!r} is a {' and a '.join(kinds)}", f"add --kind {kinds[0]}")
    return kinds[0]
