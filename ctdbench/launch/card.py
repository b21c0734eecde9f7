"""The model card of an exported cell: what it is, what it scored, and how lm-eval repeats that."""

from __future__ import annotations

import json
import re
import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Template
from typing import Any

from ctdbench import registry, report
from ctdbench.distill.licences import licence
from ctdbench.distill.references import parse
from ctdbench.evaluate import TaskInfo, available_tasks
from ctdbench.launch.provenance import without_private
from ctdbench.report.formats.markdown import escape
from ctdbench.results import Result
from ctdbench.spec import ModelSpec, RunSpec, format_bytes

LOCAL = re.compile(r"^(dir|jsonl):.*/(?=.)")  # of a path only the last name is told
HUB_LICENCE = re.compile(r"[a-z0-9.-]+")  # how the hub spells one
TEMPLATE = Template("""\
---
library_name: transformers
pipeline_tag: text-generation
tags: [cross-tokenizer-distillation, ctdbench]
license: $license
$bases---

# $title

A student of cross-tokenizer distillation, trained and evaluated by ctdbench as cell `$id`.

| | |
|---|---|
$facts

## Scores

Measured by ctdbench on these weights in float32, with $precision arithmetic, beside the untrained
student and the teachers.
$dtype

$table
## The same scores from lm-eval

In the folder that holds `$name`, where `tasks` is the folder of that name in a clone of ctdbench:

```bash
$commands
```

These are equal up to rounding. ctdbench puts $begin before every text; before whole documents
lm-eval does so by itself, hence the values of `add_bos_token`. One thing differs: text that spells
a special token is text for ctdbench, and that token for lm-eval.$left_out

## Parents

The weights come from the student's model, the training from the teachers' predictions, the text
from its authors; the terms of all of them apply.

$parents

## Versions

$versions
""")


def card(folder: Path, found: Mapping[Path, Result], name: str, dtype: str, bos: str | None) -> str:
    """The README.md of the cell in `folder`.

    found: the cell and its baselines, by folder. name: what lm-eval is to load. bos: the token that
    the tokenizer begins texts with, if it has one.
    """
    result = found[folder]
    spec = RunSpec.model_validate(result["spec"])
    infos = {info.name: info for info in available_tasks()}  # lm-eval is told of no others
    told = {path: _public(without_private(beside)) for path, beside in found.items()}
    tables = report.comparison(told, {task: info.metric for task, info in infos.items()})
    commands, left_out = _commands(result, infos, name, bos)
    licences = {text: licence(parse(text)) for text in _parents(spec)}
    hub = [parse(text).name for text in licences if parse(text).kind == "hub"]
    return TEMPLATE.substitute(
        license=_common(list(licences.values())),
        bases=f"base_model: {json.dumps(hub)}\n" if hub else "",
        title=escape(f"{spec.method} on {spec.pair.name}"),
        id=result["id"],
        facts="\n".join(f"| {key} | {escape(value)} |" for key, value in _facts(spec)),
        precision=result["provenance"]["evaluation"]["precision"],
        dtype=f"The weights here are rounded to {dtype}.\n" * (dtype != "float32"),
        table=report.render(tables, "markdown"),
        name=name,
        commands="\n".join(commands) or "# none of the tasks runs without ctdbench",
        begin=f"`{bos}`" if bos else "the end token, for want of BOS,",
        left_out=f" Only ctdbench runs {', '.join(left_out)}." if left_out else "",
        parents="\n".join(f"- `{_public(text)}`: {_told(licences[text])}" for text in licences),
        versions="\n".join(_versions(told[folder])),
    )


def _public(data: Any) -> Any:
    """JSON data with `dir:NAME` for `dir:FOLDER/NAME`: where things lay is nobody's business."""
    if isinstance(data, dict):
        return {key: _public(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_public(value) for value in data]
    return LOCAL.sub(r"\1:", data) if isinstance(data, str) else data


def _facts(spec: RunSpec) -> Iterator[tuple[str, str]]:
    info = registry.methods().get(spec.method)
    meta, train = info.meta if info else {}, spec.train
    yield "method", ": ".join(filter(None, (spec.method, str(meta.get("title", "")))))
    if meta.get("paper"):
        yield "paper", f"https://arxiv.org/abs/{meta['paper']}"
    yield "options", ", ".join(f"{name}={value}" for name, value in spec.options.items()) or "none"
    yield "pair", ": ".join(filter(None, (spec.pair.name, spec.pair.title)))
    yield "student", _side(spec.pair.student)
    for teacher in spec.pair.teachers:
        yield "teacher", _side(teacher)
    yield "text", f"{format_bytes(train.budget)} of {_public(train.corpus)}, seed {spec.seed}"
    rate = train.learning_rate or spec.pair.learning_rate
    yield "learning rate", f"{rate:g}, {train.batch_documents} documents a step"
    if lora := spec.pair.lora:
        yield "LoRA", f"rank {lora.rank} on {', '.join(lora.targets)}; merged"


def _side(side: ModelSpec) -> str:
    model, tokenizer = _public(side.model), _public(side.tokenizer)
    return f"{model} under {tokenizer}" if tokenizer else str(model)


def _commands(
    result: Result, infos: Mapping[str, TaskInfo], name: str, bos: str | None
) -> tuple[list[str], list[str]]:
    """A command for all tasks that share its flags, and the tasks that no command can run."""
    recorded = result["provenance"]["evaluation"]
    together: dict[str, list[str]] = defaultdict(list)
    left_out = []
    for task, settings in recorded["tasks"].items():
        info = infos.get(task)
        if info is None or info.needs in ("heldout", "teacher"):
            left_out.append(task)
        else:
            adds_bos = bos is not None and info.kind != "loglikelihood_rolling"
            together[_flags(settings, recorded, name, adds_bos)].append(task)
    commands = [f"lm_eval {flags} --tasks {','.join(tasks)}" for flags, tasks in together.items()]
    return commands, left_out


def _flags(
    settings: Mapping[str, Any], recorded: Mapping[str, Any], name: str, adds_bos: bool
) -> str:
    """What lm-eval is to be told so that it does what was done; both as they were recorded."""
    model = f"pretrained={name},dtype=float32,add_bos_token={adds_bos}"
    if recorded["precision"] == "bfloat16":
        model += ",mixed_precision_dtype=bfloat16"
    limit = settings.get("limit") or settings.get("limit_per_subset")
    flags = {
        "model": "hf",
        "model_args": model,
        "include_path": "tasks",
        "batch_size": recorded["batch_size"],
        "limit": limit,
        "gen_kwargs": f"max_gen_toks={tokens}"
        if (tokens := settings.get("max_gen_toks"))
        else None,
        "metadata": '{"data_dir": "DATA"}' if settings["data"] == "data-dir" else None,
    }
    stated = [(f"--{flag}", str(value)) for flag, value in flags.items() if value is not None]
    return shlex.join(part for pair in stated for part in pair)


def _parents(spec: RunSpec) -> list[str]:
    """References of the models and tokenizers that the student is made of or learned from."""
    sides: tuple[ModelSpec, ...] = (spec.pair.student, *spec.pair.teachers)
    stated = (text for side in sides for text in (side.model, side.tokenizer))
    return list(dict.fromkeys(filter(None, stated)))


def _common(licences: list[str | None]) -> str:
    """The one licence of all parents as the hub spells it, or `other`."""
    (first, *others) = {str(found or "").lower() for found in licences}
    return first if not others and HUB_LICENCE.fullmatch(first) else "other"


def _told(found: str | None) -> str:
    return escape(found) if found else "no licence is stated where it comes from; look there"


def _versions(result: Result) -> Iterator[str]:
    provenance = result["provenance"]
    if git := provenance.get("git"):
        yield f"- ctdbench's commit {git['commit']}{', changed' * bool(git['changed'])}"
    for name, version in provenance.get("versions", {}).items():
        yield f"- {escape(name)} {escape(version)}"
    yield f"- computed {provenance.get('created', '')}"
