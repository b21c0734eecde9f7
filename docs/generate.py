"""The pages that are made from the code; `hooks.py` gives them to mkdocs. None is committed."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import typer.main
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ctdbench import recipes, registry, spec
from ctdbench.cli import app
from ctdbench.evaluate import available_tasks

ROOT = Path(__file__).resolve().parents[1]
RUN = (spec.RunSpec, spec.TrainSpec, spec.EvalSpec)
PAIR = (spec.PairSpec, spec.ModelSpec, spec.TeacherSpec, spec.Lora)
WIDTH = 96  # of a command's help


def pages() -> dict[str, str]:
    """Markdown of every generated page, by its path in the site."""
    return {
        **{f"methods/{name}.md": method(info) for name, info in shipped().items()},
        "methods/index.md": methods(),
        "commands.md": commands(),
        "pairs.md": pairs(),
        "tasks.md": tasks(),
        "settings.md": settings(),
        "tables.md": tables(),
        "limits.md": limits(),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
    }


def shipped() -> dict[str, registry.MethodInfo]:
    """The methods of this repository, not those that other packages add."""
    here = registry.shipped_methods()
    found = sorted(registry.methods().items())
    return {name: info for name, info in found if info.file and info.file.parent == here}


def commands() -> str:
    """Every command's help."""
    group: Any = typer.main.get_command(app)
    parts = ["# Commands", "What `ctdbench COMMAND --help` prints."]
    with group.make_context("ctdbench", [], resilient_parsing=True) as parent:
        for name, command in sorted(group.commands.items()):
            start = {"parent": parent, "resilient_parsing": True, "terminal_width": WIDTH}
            with command.make_context(name, [], **start) as context:
                parts += [f"## {name}", fenced(command.get_help(context))]
    return joined(parts)


def methods() -> str:
    """What META says of every method."""
    rows = [
        [f"[`{name}`]({name}.md)", info.meta["title"], paper(info.meta), needs(info.meta)]
        for name, info in shipped().items()
    ]
    head = ["method", "loss", "published", "needs"]
    return joined(["# Methods", "A method is one file in `methods/`.", table(head, rows)])


def method(info: registry.MethodInfo) -> str:
    """A method's references, its docstring as it is, and its options."""
    assert info.file is not None
    docstring = ast.get_docstring(ast.parse(info.file.read_text(encoding="utf-8")))
    about = {"Published": paper(info.meta), "Needs": needs(info.meta), "Cost": info.meta["cost"]}
    told = [f"{name}: {value}" for name, value in about.items() if value]
    parts = ["---\nhide: [toc]\n---", f"# {info.name}", info.meta["title"] + ".", bullets(told)]
    parts += ["## Formula", fenced(docstring or "")]
    parts += ["## Options", "Of `--set method.FIELD=VALUE`."]
    return joined([*parts, fields(registry.load_method(info.name).Options)])


def pairs() -> str:
    """Every pair's file as it is."""
    parts = ["# Pairs", "`--pair NAME`, or a file with these [fields](settings.md#pairspec)."]
    for name, path in registry.pair_files().items():
        file = fenced(path.read_text(encoding="utf-8"), "yaml")
        parts += [f"## {name}", registry.load_pair(name).title + ".", file]
    return joined(parts)


def tasks() -> str:
    """What is known of every task before it runs."""
    parts = ["# Tasks", "`--tasks a,b`. Data come from the hub, or from files under `--data-dir`."]
    for info in available_tasks():
        better = "lower" if info.metric in info.lower_is_better else "higher"
        told = [f"{info.kind}; `{info.metric}`, {better} is better; needs: {info.needs}"]
        for place, names in {"Subsets": info.subsets, "Hub": info.hub, "Files": info.files}.items():
            told += [f"{place}: {', '.join(f'`{name}`' for name in names)}"] if names else []
        parts += [f"## {info.name}", info.description + ".", bullets(told)]
    return joined(parts)


def settings() -> str:
    """Every field of what can be asked for."""
    parts = [
        "# Settings",
        "A field is **identity** where it can change the result: it is part of the cell's id. Else "
        "it is **runtime**. `--config FILE` has the fields of `RunSpec`; `--set train.FIELD=VALUE` "
        "sets one of `TrainSpec`, `--set eval.FIELD=VALUE` one of `EvalSpec`, and "
        "`--set method.FIELD=VALUE` one of the method's [options](methods/index.md).",
    ]
    for model in (*RUN, *PAIR):
        parts += [f"## {model.__name__}", model.__doc__ or "", fields(model)]
    return joined(parts)


def tables() -> str:
    """Every table of a paper that can be reproduced."""
    told = "The paper's models need `--corpus`; `--scale cpu` takes its design to a small pair."
    return joined(["# Tables of papers", told, *map(reproduced, recipes.names())])


def reproduced(name: str) -> str:
    """How to run a table, what the paper says of it, and what was chosen here."""
    recipe = recipes.load(name)
    run = f"ctdbench reproduce {name}"
    lines = (f"{run} --scale cpu --dry-run", f"{run} --corpus jsonl:corpus.jsonl --dry-run")
    parts = [f"## {name}", f"{recipe.title}: {recipe.table} of {arxiv(recipe.arxiv)}."]
    parts += [fenced("\n".join(lines), "bash")]
    for setting in recipe.settings:
        rows = [": ".join(filter(None, (row, one.missing))) for row, one in setting.rows.items()]
        used = [f"{at}: {setting.pair_at(at) or 'none'}" for at in get_args(recipes.Scale)]
        parts += [f"### {setting.name}", bullets(rows, f"Pair ({', '.join(used)}); rows:")]
        stated = recipe.stated(setting)
        parts += [bullets(recipes.told(stated, "paper", {}), "The paper says:")]
        parts += [bullets(recipes.told(stated, "ours", {}), "Chosen here:")]
    measures = recipe.measures("paper", data=True)
    columns = [f"{one.column.task}: {one.note}" for one in measures if one.column is not None]
    return joined([*parts, bullets(columns, "Columns:"), bullets(recipe.notes, "Notes:")])


def limits() -> str:
    """The README's section."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"^## Limits\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return joined(["# Limits", found.replace("](docs/", "](")])


def fields(model: type[BaseModel]) -> str:
    """A table of a model's fields."""
    rows = [
        [f"`{name}`", f"`{default(field)}`", field.description or "", kind]
        for name, field in model.model_fields.items()
        for kind in ["identity" if spec.is_identity(field) else "runtime"]
    ]
    return table(["field", "default", "meaning", "kind"], rows)


def default(field: FieldInfo) -> str:
    """As JSON, which is YAML; of a nested request its name."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    return json.dumps(value, default=lambda nested: type(nested).__name__)


def paper(meta: Mapping[str, Any]) -> str:
    link = arxiv(meta["paper"]) if meta["paper"] else f"<{meta['url']}>" if "url" in meta else ""
    return f"{link} ({meta['year']})" if link else ""


def arxiv(number: str) -> str:
    return f"[arXiv {number}](https://arxiv.org/abs/{number})"


def needs(meta: Mapping[str, Any]) -> str:
    return ", ".join([*meta["needs"], *["on-policy as published"] * bool(meta.get("on_policy"))])


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    cells = [[" ".join(str(cell).replace("|", "\\|").split()) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *cells])


def bullets(lines: Iterable[str], title: str = "") -> str:
    listed = "\n".join(f"- {line}" for line in lines)
    return f"{title}\n\n{listed}" if listed else ""


def fenced(text: str, language: str = "text") -> str:
    return f"```{language}\n{text.strip()}\n```"


def joined(parts: Iterable[str]) -> str:
    return "\n\n".join(filter(None, map(str.strip, parts))) + "\n"
