"""A store as a sweep would leave it: results, samples, metrics; with items' and seeds' noise.

Every number follows from the names of task, method, seed and document, so stores of other sizes
hold the same cells. All is made up; none of it is a measurement.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

from example_results import example, store_example

from ctdbench import results
from ctdbench.evaluate.outcomes import metric_names, score, standard_error

# Task -> metric -> what the start and the teacher score.
TASKS: dict[str, dict[str, tuple[float, float]]] = {
    "bpb_heldout": {"bpb": (1.40, 0.97)},
    "teacher_jsd": {"jsd": (0.05, 0.0)},
    "piqa": {"acc": (0.56, 0.70), "acc_bytes": (0.57, 0.72), "bpb": (1.6, 1.2)},
    "everyday_physics": {"acc": (0.48, 0.53), "acc_bytes": (0.48, 0.54)},  # at chance
    "arithmetic_word": {"exact_match": (0.03, 0.40), "bpb": (1.5, 0.9)},
}
HEADLINE = {"piqa": "acc_bytes", "everyday_physics": "acc_bytes"}
BY_BYTES = ("bpb_heldout", "teacher_jsd")
# How far from the start (0) to the teacher (1); methods that are not named lie in between.
SKILLS = {"start": 0.0, "teacher": 1.0, "sft": 0.45, "bld": 0.7, "uld": 0.43}
OPTIONS: dict[str, dict[str, Any]] = {
    "bld": {"ce_weight": 1.0, "byte_weight": 1.0, "kl_weight": 0.1, "bytes": "mixed"},
    "uld": {"ce_weight": 0.5},
}
BUDGET, STEPS = 200_000, 20
GOLDEN = (1 + math.sqrt(5)) / 2


def write_store(
    path: Path,
    methods: Sequence[str] = ("sft", "bld", "uld"),
    seeds: int = 3,
    tasks: Sequence[str] = tuple(TASKS),
    documents: int = 60,
    *,
    one_seed: Sequence[str] = ("alm",),
    failed: Sequence[str] = ("gold",),
    pair: str = "smol-mistral",
    budget: int = BUDGET,
) -> list[Path]:
    """Write start, teacher, the methods with all seeds, those with one, and failed cells.

    Scores are the weighted means of the samples. Returns the cells' folders, failed ones last.
    """
    cells = [("start", 0), ("teacher", 0)]
    cells += [(method, seed) for method in methods for seed in range(seeds)]
    cells += [(method, 0) for method in one_seed]
    folders = [
        _write_cell(path, method, seed, tasks, documents, pair, budget) for method, seed in cells
    ]
    for method in failed:
        broken = example(method, {}, pair=pair, status="failed", limit=documents, budget=budget)
        broken["spec"]["eval"]["tasks"] = list(tasks)
        folders.append(store_example(path, broken))
    return folders


def samples(task: str, method: str, seed: int, documents: int) -> list[dict[str, Any]]:
    """What is stored of a task: one row a document."""
    trained = method not in ("start", "teacher")
    luck = _draw("seed", task, method, seed).gauss(0, 1) if trained else 0.0
    return [_sample(task, method, seed, luck, index) for index in range(documents)]


def _sample(task: str, method: str, seed: int, luck: float, index: int) -> dict[str, Any]:
    item = _draw("item", task, index)
    size = float(item.randint(300, 2000))
    hardness = (index / GOLDEN + _draw("first", task).random()) % 1  # even: scores are as stated
    noise = _draw("noise", task, method, seed, index)
    digest = sha256(f"{task} {index}".encode()).hexdigest()[:12]
    row = {"id": f"{index}-{digest}", "weight": size if task in BY_BYTES else 1.0}
    for metric, (start, teacher) in TASKS[task].items():
        level = start + _skill(method) * (teacher - start)
        if metric.startswith(("acc", "exact")):
            row[metric] = float(hardness < level + 0.015 * luck + 0.06 * noise.gauss(0, 1))
        else:
            spread = 0.7 * (hardness - 0.5) + 0.004 * luck + 0.03 * noise.gauss(0, 1)
            row[metric] = level * math.exp(spread)
    if "acc" in TASKS[task]:
        row["chance"] = 0.5
    if "exact_match" in TASKS[task]:
        row["output"] = _output(index, bool(row["exact_match"]), method)
    return row


def _output(index: int, right: bool, method: str) -> str:
    """With characters that mean something to HTML, LaTeX and Markdown."""
    total = 2 * index + 7
    told = total if right else total + 10
    return f" {index} & {index + 7} are {told}, so 0 < x.\nThe answer is {told}. _{method}_ <b>|"


def _write_cell(
    store: Path,
    method: str,
    seed: int,
    tasks: Sequence[str],
    documents: int,
    pair: str,
    budget: int,
) -> Path:
    rows = {task: samples(task, method, seed, documents) for task in tasks}
    scores = {task: {m: score(r, m) for m in metric_names(r)} for task, r in rows.items()}
    options = OPTIONS.get(method, {})
    training: dict[str, Any] = {} if method in ("start", "teacher") else {"budget": budget}
    result = example(method, {}, pair=pair, seed=seed, options=options, limit=documents, **training)
    lines = _metrics(method, seed, budget) if training else []
    result |= {
        "scores": scores,  # type: ignore[typeddict-item]
        "stderr": {t: {m: standard_error(r, m) for m in scores[t]} for t, r in rows.items()},
        "cost": _cost(lines),  # type: ignore[typeddict-item]
    }
    if lines:
        result["points"] = _points(scores, budget)
    result["spec"]["eval"]["tasks"] = list(tasks)
    result["provenance"]["hardware"] = {"cores": 2, "threads": 2, "gpus": []}
    folder = store_example(store, result)
    for task, task_rows in rows.items():
        _write_lines(folder / "samples" / f"{task}.jsonl", task_rows)
    if lines:
        _write_lines(folder / "metrics.jsonl", lines)
    return folder


def _points(scores: Mapping[str, Mapping[str, float]], budget: int) -> list[results.Point]:
    """Three on the way, of the tasks on running text: each nearer to the end's score."""
    running = {task: metrics for task, metrics in scores.items() if task in BY_BYTES}
    ends = {f"{task}.{m}": value for task in running for m, value in running[task].items()}
    return [
        {
            "text_bytes": budget * number // 4,
            "scores": {name: end * (1.4 - 0.1 * number) for name, end in ends.items()},
        }
        for number in (1, 2, 3)
    ]


def _metrics(method: str, seed: int, budget: int) -> list[dict[str, Any]]:
    """A training's log: cross-entropy in nats a token, falling to where the method's skill is."""
    noise = _draw("metrics", method, seed)
    pace = 1 + _draw("pace", method).random()  # relative to the fastest
    lines = []
    for step in range(1, STEPS + 1):
        seen = budget * step // STEPS
        ce = 2.3 - (0.5 + 0.4 * _skill(method)) * (1 - math.exp(-5 * step / STEPS))
        ce += 0.05 * noise.gauss(0, 1)
        lines.append(
            {
                "step": step,
                "text_bytes": seen,
                "student_tokens": round(seen / 3.6),
                "teacher_tokens": round(seen / 3.97),
                "seconds": pace * seen / 500,
                "loss": ce if method == "sft" else 2 * ce + 0.3,
                "ce": ce,
            }
        )
    return lines


def _cost(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    cost: dict[str, Any] = {"eval_seconds": 60.0, "peak_memory_bytes": 2_510_000_000}
    if not metrics:
        return cost
    last = metrics[-1]
    counted = {name: last[name] for name in ("text_bytes", "student_tokens", "teacher_tokens")}
    trained = {"steps": last["step"], "train_seconds": last["seconds"], "processes": 1}
    flops = 6 * 135e6 * last["student_tokens"] * last["seconds"] / 400
    return {**cost, **counted, **trained, "flops": flops, "peak_memory_bytes": 5_896_425_472}


def _skill(method: str) -> float:
    return SKILLS[method] if method in SKILLS else _draw("skill", method).uniform(0.3, 0.7)


def _draw(*key: object) -> Random:
    return Random(" ".join(map(str, key)))


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
