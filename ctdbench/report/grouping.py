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

from ctdbench import results
from ctdbench.labels import SHARED, row_label, stored_identity
from ctdbench.registry import MethodInfo
from ctdbench.results import Result
from ctdbench.spec import EvalSpec, PairSpec, without_path


def group_key(result: Result) -> str:
    """Equal for cells that share a table."""
    return _key(_placeless(setting(result)), _content(result))


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
    return agree and _key(_placeless(mine)) == _key(_placeless(theirs))


def setting(result: Result) -> dict[str, Any]:
    """What all cells of a table have in common: text, batches, evaluation, and the pair.

    Files are named as this cell named them, which may be other than its neighbours did.
    """
    spec = result["spec"]
    shared = {name: spec["train"].get(name) for name in SHARED}
    evaluation = evaluation_setting(stored_identity(EvalSpec, spec["eval"]))
    return {**shared, **evaluation, "pair": stored_identity(PairSpec, spec["pair"])}


def evaluation_setting(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluation settings under names that do not meet those of training."""
    names = {"batch_size": "eval_batch_size", "precision": "eval_precision"}
    return {names.get(name, name): value for name, value in fields.items()}


def variants(cells: Sequence[Result], known: Mapping[str, MethodInfo]) -> dict[str, list[Result]]:
    """Cells by row label, by seed, one a seed (the last given); they come oldest first.

    Seeds that an older code of the method trained are no seeds of the row.

    A label names the method, the option that its META calls `row` (`bld[mixed]`), cross-entropy
    where its META says that it was published without (`gold+ce`), the training settings that are
    not the default or the pair's own, and the options in which rows of the method differ, or the
    precision.

    known: `registry.methods()`.
    """
    rows: dict[str, dict[str, dict[int, Result]]] = defaultdict(lambda: defaultdict(dict))
    for result in cells:
        spec = result["spec"]
        by_seed = rows[row_label(spec, known)][_key(_options(result))]
        if by_seed and _code(next(iter(by_seed.values()))) != _code(result):
            by_seed.clear()
        by_seed[spec["seed"]] = result
    labelled = {}
    for label, kin in rows.items():
        options = [_options(next(iter(by_seed.values()))) for by_seed in kin.values()]
        names = dict.fromkeys(name for chosen in options for name in chosen)  # old cells have fewer
        differing = [name for name in names if len({_key(o.get(name)) for o in options}) > 1]
        for chosen, by_seed in zip(options, kin.values(), strict=True):
            told = "".join(f" {name}={chosen.get(name)}" for name in differing)
            labelled[label + told] = [by_seed[seed] for seed in sorted(by_seed)]
    return labelled


def trained_in(result: Result) -> str | None:
    """The precision that training computed in, which `auto` leaves to the machine."""
    precision: str | None = result["provenance"].get("training", {}).get("precision")
    return precision


def weighed(result: Result) -> dict[str, Any]:
    """The options, with the weight that cross-entropy had: 1 where terms were balanced by ratio."""
    rule = result["provenance"].get("training", {}).get("balance")
    return {**result["spec"]["options"], **({"ce_weight": 1.0} if rule == "ratio" else {})}


def _options(result: Result) -> dict[str, Any]:
    spec = result["spec"]
    remote = spec.get("trust_remote_code", False)
    return {**spec["options"], "trust_remote_code": remote, "precision": trained_in(result)}


def _placeless(value: Any) -> Any:
    """A stored value as a cell's id takes it: files by their content's hash, wherever they lay."""
    if isinstance(value, Mapping):
        return {name: _placeless(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_placeless(part) for part in value]
    return without_path(value) if isinstance(value, str) else value


def _content(result: Result) -> dict[str, str]:
    """Hashes of everything but the method's own code."""
    content = result["content"].items()
    return {name: digest for name, digest in content if not name.startswith("method")}


def _code(result: Result) -> str:
    """Hash of the method's own code, and what else of the harness its loss depends on."""
    content = result["content"]
    return _key({name: content[name] for name in content if name.partition(":")[0] == "method"})


def _key(*parts: Any) -> str:
    return json.dumps(parts, sort_keys=True, default=str)
