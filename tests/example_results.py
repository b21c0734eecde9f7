"""Results as a run would leave them, for tests of the store, the tables and the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ctdbench import registry, results
from ctdbench.spec import EvalSpec, RunSpec, TrainSpec


def example(
    method: str,
    scores: dict[str, dict[str, float | None]],
    *,
    pair: str = "smol-mistral",
    seed: int = 0,
    stderr: float = 0.01,
    status: str = "done",
    options: dict[str, Any] | None = None,
    limit: int | None = 24,
    created: str = "2026-01-01T00:00:00",
    content: dict[str, str] | None = None,
    tasks: tuple[str, ...] = EvalSpec().tasks,
    **train: Any,
) -> results.Result:
    """A result of that method with these scores, all with one standard error."""
    spec = RunSpec(
        method=method,
        pair=registry.load_pair(pair),
        seed=seed,
        options=options or {},
        train=TrainSpec(**train),
        eval=EvalSpec(limit=limit, tasks=tasks),
    )
    return results.Result(
        version=1,
        id=spec.cell_id(content or {}),
        status=status,  # type: ignore[typeddict-item]
        spec=spec.model_dump(mode="json"),
        content=content or {},
        scores=scores if status == "done" else {},
        stderr={task: dict.fromkeys(metrics, stderr) for task, metrics in scores.items()},
        cost={"train_seconds": 100.0, "text_bytes": spec.train.budget, "flops": None},
        provenance={"created": created, "versions": {"ctdbench": "0.1.0"}},
        notes=[] if status == "done" else ["loss is not finite at step 3"],
    )


def store_example(store: Path, result: results.Result) -> Path:
    """Write a result into a store; returns its folder."""
    spec = result["spec"]
    folder = results.cell_dir(store, spec["pair"]["name"], spec["method"], result["id"])
    results.write_json_atomic(folder / "result.json", result)
    return folder
