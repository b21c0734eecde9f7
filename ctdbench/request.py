"""From flags, a config file and `--set` to a checked `RunSpec`; flags win over the file.

Everything but `resolve_options` works without torch, so that a bad request ends at once.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctdbench import registry
from ctdbench.errors import UserError
from ctdbench.launch.grid import parse_row
from ctdbench.spec import EvalSpec, ModelSpec, PairSpec, RunSpec, TrainSpec, parse_bytes

SECTIONS = {"train": "train", "method": "options", "eval": "eval"}  # of --set -> of the file
FIELDS = ("method", "pair", "seed", "options", "train", "eval")
COLUMNS = 100  # of a terminal, for lists
Raw = dict[str, Any]


def build_spec(
    flags: Mapping[str, Any],
    config: Path | None = None,
    settings: Sequence[str] = (),
    *,
    trust_remote_code: bool = False,
) -> RunSpec:
    """The cell asked for; its options are still as the user stated them.

    flags: shaped like the config file; a flag that is None was not given. The method may be a row,
    such as `bld[path]`; options that are stated beside it win. Raises UserError for whatever is
    unknown or malformed.
    """
    file, given = _read_config(config) if config else {}, _given(flags)
    raw: Raw = {}
    for part in (_variant(file), file, _variant(given), _parse_settings(settings), given):
        raw = _merge(raw, part)
    for name in ("method", "pair"):
        if not raw.get(name):
            raise UserError(f"--{name} is missing", f"ctdbench list {name}s shows the names")
    raw["method"], _ = parse_row(str(raw["method"]))
    raw["pair"] = _pair(raw["pair"])
    raw["options"] = _section(raw, "options")
    raw["train"] = registry.validate(TrainSpec, _section(raw, "train"), "train")
    raw["eval"] = registry.validate(EvalSpec, named_tasks(_section(raw, "eval")), "eval")
    return registry.validate(RunSpec, {**raw, "trust_remote_code": trust_remote_code}, "run")


def resolve_options(spec: RunSpec) -> RunSpec:
    """The spec with all of the method's options; imports the method, and with it torch."""
    method = registry.load_method(spec.method)
    options = registry.validate(method.Options, spec.options, f"method {spec.method}")
    return spec.model_copy(update={"options": options.model_dump(mode="json")})


def references_of(pair: PairSpec) -> list[str]:
    """References of all of a pair's models and tokenizers, as the pair states them."""
    sides: tuple[ModelSpec, ...] = (pair.student, *pair.teachers)
    stated = [text for side in sides for text in (side.model, side.tokenizer) if text]
    return list(dict.fromkeys(stated))


def tokenizers_of(pair: PairSpec) -> list[str]:
    """References of all of a pair's tokenizers; a model's own is where the model is."""
    sides: tuple[ModelSpec, ...] = (pair.student, *pair.teachers)
    return list(dict.fromkeys(side.tokenizer or side.model for side in sides))


def listing() -> dict[str, dict[str, str]]:
    """Titles by name of methods, pairs and tasks; imports no method and runs no task code."""
    from ctdbench.evaluate import available_tasks

    methods = {name: str(info.meta.get("title", "")) for name, info in registry.methods().items()}
    pairs = {name: registry.load_pair(name).title for name in registry.pair_files()}
    tasks = {info.name: info.description for info in available_tasks()}
    return {"methods": dict(sorted(methods.items())), "pairs": pairs, "tasks": tasks}


def method_table() -> list[str]:
    """Lines of at most `COLUMNS`: of each method its title, paper (arXiv), year, needs and cost.

    All of it is what the methods' files state in META; no method is imported. Of a method that
    states nothing more (a plugin behind an entry point) there is the title alone.
    """
    known = dict(sorted(registry.methods().items()))
    indent = " " * (4 + max(map(len, known)))
    lines = [indent + _row("arXiv", "year", "needs", "cost")]
    for name, info in known.items():
        rows = (_line(info.meta.get("title")), _told(info.meta))
        told = [part for row in rows for part in textwrap.wrap(row, COLUMNS - len(indent))]
        lines += [f"  {name}".ljust(len(indent)) + "".join(told[:1])]
        lines += [indent + part for part in told[1:]]
    return [line.rstrip() for line in lines]


def row_table() -> list[str]:
    """Lines about the rows that `--method` takes beside the methods' names."""
    known = dict(sorted(registry.methods().items()))
    told = {
        f"{name}[VALUE]": f"{option}: {registry.described(info, option)}"
        for name, info in known.items()
        if (option := _line(info.meta.get("row")))
    }
    bare = [name for name, info in known.items() if info.meta.get("ce") is False]
    told["METHOD+ce"] = f"cross-entropy, too, where it was published without: {', '.join(bare)}"
    indent = " " * (4 + max(map(len, told)))
    lines = ["rows beside these:"]
    for row, text in told.items():
        first = f"  {row}".ljust(len(indent))
        lines += textwrap.wrap(text, COLUMNS, initial_indent=first, subsequent_indent=indent)
    return lines


def _told(meta: Mapping[str, Any]) -> str:
    """What META says beside the title; a plugin may leave out or misspell any of it."""
    paper, year, cost = (_line(meta.get(key)) for key in ("paper", "year", "cost"))
    needs = meta.get("needs", "")
    needed = [_line(part) for part in (needs if isinstance(needs, (list, tuple)) else [needs])]
    policy = ["on-policy as published"] if meta.get("on_policy") else []
    told = ", ".join(filter(None, needed + policy)) or ("" if needed else "no teacher")
    return _row(paper or "-", year or "-", told, cost) if any((paper, year, told, cost)) else ""


def _row(paper: str, year: str, needs: str, cost: str) -> str:
    return f"{paper:10}  {year:4}  {needs:41}  {cost}"


def _line(value: Any) -> str:
    """A value of META on one line, "" for none."""
    return " ".join(str(value or "").split())


def bytes_of(text: str, where: str) -> int:
    """`200kB` -> 200000; raises UserError naming `where`."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _variant(part: Raw) -> Raw:
    """The options that a row such as `bld[path]` stands for."""
    method = part.get("method")
    return {"options": parse_row(str(method))[1]} if method else {}


def _pair(stated: Any) -> PairSpec:
    """By name or path; or as the mapping that a result's `spec` holds."""
    if isinstance(stated, dict):
        return registry.validate(PairSpec, stated, "pair")
    return registry.load_pair(str(stated))


def named_tasks(section: Raw) -> Raw:
    """Tasks stated by their file become names, and the files are noted."""
    from ctdbench.evaluate import task_name

    stated = section.get("tasks")
    tasks = [str(task) for task in stated] if isinstance(stated, list | tuple) else []
    files = [task for task in tasks if registry.is_file_name(task)]
    if not files:
        return section
    names = {file: task_name(Path(file).expanduser()) for file in files}
    noted = [*(section.get("task_files") or ()), *files]
    named = [names.get(task, task) for task in tasks]
    return {**section, "tasks": named, "task_files": list(dict.fromkeys(noted))}


def _read_config(path: Path) -> Raw:
    raw = registry.read_yaml(path)
    if raw.pop("trust_remote_code", False):
        raise UserError(
            f"{path}: trust_remote_code", "give --trust-remote-code on the command line"
        )
    for name in raw:
        if name not in FIELDS:
            raise UserError(f"{path}: {name}: no such field", registry.suggestion(name, FIELDS))
    return raw


def _parse_settings(settings: Sequence[str]) -> Raw:
    parsed: Raw = {}
    for setting in settings:
        target, equals, value = setting.partition("=")
        section, dot, field = target.partition(".")
        if not (equals and dot and field):
            raise UserError(f"--set {setting}", "write --set SECTION.FIELD=VALUE")
        name = registry.pick(section, SECTIONS, "section of --set")
        value = registry.parse_yaml(value, f"--set {setting}: the value")
        parsed.setdefault(name, {})[field] = value
    return parsed


def _given(flags: Mapping[str, Any]) -> Raw:
    """The flags that were given: those that are not None."""
    pruned = {
        name: _given(value) if isinstance(value, Mapping) else value
        for name, value in flags.items()
    }
    return {name: value for name, value in pruned.items() if value not in (None, {})}


def _merge(base: Raw, over: Raw) -> Raw:
    """`over` on top of `base`; train, eval and options field by field."""
    sections = {
        name: _section(base, name) | _section(over, name)
        for name in SECTIONS.values()
        if name in over
    }
    return {**base, **over, **sections}


def _section(raw: Raw, name: str) -> Raw:
    section = raw.get(name) or {}
    if not isinstance(section, dict):
        raise UserError(f"{name} must hold a mapping of fields, not {section!r}")
    return section
