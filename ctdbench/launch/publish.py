"""Published cells: checked copies of a store's cells, small enough to commit.

`results/` has the layout of any store, so every command reads it (`table --store results`). Samples
are compressed there.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctdbench import atomic, registry, results
from ctdbench.distill import references
from ctdbench.errors import UserError
from ctdbench.evaluate import outcomes
from ctdbench.report import grouping
from ctdbench.report.outcomes import Samples
from ctdbench.results import TRIALS, Result
from ctdbench.spec import RunSpec

LOCAL = ("dir:", "jsonl:")  # references that mean something on one machine only
TOLERANCE = 1e-9


def publish(store: Path, cell: str, target: Path) -> list[Path]:
    """Copy the cell whose id starts with `cell`, and its baselines, into `target`; their folders.

    Raises UserError naming what keeps a cell from being published; then nothing is written.
    """
    found = results.find(store)
    folder = results.named(found, cell, store)
    chosen = {folder: found[folder], **_baselines(found, found[folder])}
    samples = Samples(found)
    for path, result in chosen.items():
        if fault := _fault(result, samples):
            raise UserError(f"{path} cannot be published: {fault[0]}", fault[1])
    return [_copy(path, result, target) for path, result in chosen.items()]


def publish_all(store: Path, target: Path) -> list[Path]:
    """Every finished cell of a method that is not in `target` yet, and trials likewise; see above.

    What was published before one that cannot be stays.
    """
    folders: list[Path] = []
    for own, there in ((store, target), (store / TRIALS, target / TRIALS)):
        known = {result["id"] for result in results.find(there).values()}
        for result in results.find(own).values():
            if result["id"] not in known and not results.is_baseline(result["spec"]["method"]):
                folders += publish(own, result["id"], there)
    return list(dict.fromkeys(folders))


def _baselines(found: Mapping[Path, Result], cell: Result) -> dict[Path, Result]:
    own = {f: result for f, result in found.items() if grouping.is_baseline_of(result, cell)}
    names = {result["spec"]["method"] for result in own.values()}
    absent = set(results.baselines(len(cell["spec"]["pair"]["teachers"]))) - names
    if absent and not results.is_baseline(cell["spec"]["method"]):
        raise UserError(
            f"cell {cell['id']}: its {' and '.join(sorted(absent))} was not evaluated",
            "ctdbench run evaluates it again",
        )
    return own


def _fault(result: Result, samples: Samples) -> tuple[str, str] | None:
    """What is wrong with a cell and what helps."""
    spec = RunSpec.model_validate(result["spec"])
    text = json.dumps(spec.identity())
    if spec.cell_id(result["content"]) != result["id"]:
        return "its id is not the hash of its settings", "run it again with this version"
    if local := [prefix for prefix in LOCAL if f'"{prefix}' in text]:
        return f"a {local[0]} reference means nothing elsewhere", "use hub: or wheel: references"
    told = json.dumps(result["provenance"]) + text + " ".join(result["notes"])
    if len(home := str(Path.home())) > 1 and f"{home}/" in told:
        return "it names a folder of this machine", "remove that path and run it again"
    state = result["provenance"].get("git")
    if not state or state["changed"]:
        return "the code that made it was not committed", "commit, and run it again"
    if spec.eval.task_files:
        return "it has tasks that are not the project's", "add their files to tasks/ first"
    if not _is_shipped(spec.method, result["content"].get("method")):
        return "its method is not the one that is committed here", "run it again with that"
    for task in spec.eval.tasks:
        if not _agrees(samples.rows(result, task), result["scores"].get(task, {})):
            return f"samples/{task}.jsonl does not give its scores", "run it again"
    return None


def _is_shipped(method: str, digest: str | None) -> bool:
    """Whether that code is the one in `methods/`; a baseline has none."""
    if results.is_baseline(method):
        return True
    info = registry.methods().get(method)
    if info is None or info.file is None or info.file.parent != registry.shipped_methods():
        return False
    return references.fingerprint(info.file) == digest


def _agrees(rows: Sequence[dict[str, Any]], metrics: Mapping[str, float | None]) -> bool:
    if not (rows and metrics) or len({row["id"] for row in rows}) < len(rows):
        return False
    return all(
        value is not None
        and all(name in row for row in rows)
        and math.isclose(outcomes.score(rows, name), value, abs_tol=TOLERANCE)
        for name, value in metrics.items()
    )


def _copy(folder: Path, result: Result, target: Path) -> Path:
    """Write a cell below `target`, its result last."""
    spec = result["spec"]
    copy = results.cell_dir(target, spec["pair"]["name"], spec["method"], result["id"])
    for path in sorted((folder / "samples").glob("*.jsonl*")):
        data = path.read_bytes()
        name = path.name.removesuffix(".gz") + ".gz"
        plain = gzip.decompress(data) if path.suffix == ".gz" else data
        atomic.write_bytes(copy / "samples" / name, gzip.compress(plain, mtime=0))
    if (metrics := folder / "metrics.jsonl").is_file():
        atomic.write_bytes(copy / metrics.name, metrics.read_bytes())
    public = {**result, "spec": {**spec, "eval": {**spec["eval"], "data_dir": None}}}
    results.write_json_atomic(copy / "result.json", public)
    return copy
