"""Evaluate a model in memory on named tasks; heavy imports happen inside the functions."""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from ctdbench.errors import UserError
from ctdbench.evaluate import outcomes
from ctdbench.evaluate.answers import require_answers
from ctdbench.evaluate.catalog import (
    TaskInfo,
    available_tasks,
    check_tasks,
)
from ctdbench.evaluate.hub_data import commits
from ctdbench.evaluate.loading import load_tasks, task_rows
from ctdbench.evaluate.shots import require_examples
from ctdbench.evaluate.task_files import task_configs
from ctdbench.spec import EvalSpec

Precision = Literal["float32", "bfloat16"]
FEWSHOT_SEED = 1234  # lm-eval's own default
_RECORDED = ("lm-eval", "transformers", "torch", "datasets", "tokenizers")


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate, on what, and the settings that can change a score.

    student, tokenizer: a causal transformers model and its fast tokenizer, as they are exported.
    teachers: (model, tokenizer) each; the teacher tasks average over them.
    readers: further (model, tokenizer) that are not evaluated here but beside this: the teacher
    tasks leave out what one of them cannot read, so that all rows are on the same documents.
    limit: items per requested task, the first ones; of a group, `ceil(limit / subsets)` per subset.
    limits: the same for single tasks, by name; None for all items.
    heldout: the corpus's held-out documents, for `bpb_heldout` and `teacher_jsd`.
    data_dir: folder of original data files; None takes data sets from the hub.
    batch_size moves log-likelihoods by about 1e-4, so it is part of a result's identity.
    extra_tasks: files of tasks that are not the project's; their Python is run.
    taught: where the teachers' predictions are kept for further requests with the same teachers.
    """

    student: Any
    tokenizer: Any
    tasks: Sequence[str]
    teachers: Sequence[tuple[Any, Any]] = ()
    readers: Sequence[tuple[Any, Any]] = ()
    limit: int | None = None
    limits: Mapping[str, int | None] = field(default_factory=dict)
    batch_size: int = 8
    data_dir: Path | None = None
    heldout: Sequence[str] = ()
    precision: Precision = "float32"
    extra_tasks: Sequence[Path] = ()
    taught: dict[tuple[int, str], Any] | None = None

    @classmethod
    def of(cls, settings: EvalSpec, **given: Any) -> EvaluationRequest:
        """A request by these settings. given: all other fields, and what is to differ."""
        stated = {
            "tasks": settings.tasks,
            "limit": settings.limit,
            "limits": settings.limits,
            "batch_size": settings.batch_size,
            "data_dir": settings.data,
            "precision": settings.precision,
            "extra_tasks": settings.extra_tasks,
        }
        return cls(**{**stated, **given})

    def limit_of(self, task: str) -> int | None:
        """At most how many items of this task; None for all."""
        return self.limits.get(task, self.limit)


@dataclass(frozen=True)
class Evaluation:
    """Scores with what they were made from.

    scores, stderr: task -> metric -> value; a standard error that is not known is left out.
    samples: task -> one row a document; every score is the weighted mean of its rows
        (`outcomes.score`), so methods are compared paired, row by row, on equal ids.
    versions: of the tasks and of the packages. settings: everything else that was pinned.
    """

    scores: dict[str, dict[str, float]]
    stderr: dict[str, dict[str, float]]
    samples: dict[str, list[outcomes.Row]]
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def evaluate(request: EvaluationRequest) -> Evaluation:
    """Run every requested task by itself, so that no score depends on which others were asked for.

    Raises UserError (unknown task, missing file, no teacher, no held-out text) and PreflightError
    (data set out of reach) before the first forward pass.
    """
    infos = _checked(request)
    samples: dict[str, list[outcomes.Row]] = {}
    settings = _settings(request)
    versions = _versions()
    with _quiet():
        for info in infos:
            if info.needs == "teacher":
                rows, details = _run_teacher_task(info, request)
            else:
                rows, details = _run_task(info, request)
                versions[f"task:{info.name}"] = details.pop("version")
            samples[info.name] = rows
            settings["tasks"][info.name] = {**details, "documents": outcomes.digest(rows)}
    names = {task: outcomes.metric_names(rows) for task, rows in samples.items()}
    return Evaluation(
        scores={t: {m: outcomes.score(samples[t], m) for m in names[t]} for t in names},
        stderr={
            t: {m: e for m in names[t] if (e := outcomes.standard_error(samples[t], m)) is not None}
            for t in names
        },
        samples=samples,
        versions=versions,
        settings=settings,
    )


def _checked(request: EvaluationRequest) -> list[TaskInfo]:
    for task in request.tasks:
        if (limit := request.limit_of(task)) is not None and limit < 1:
            raise UserError(f"limit {limit} leaves nothing to evaluate", "give at least 1")
    check_tasks(request.tasks, request.data_dir, request.extra_tasks)
    known = {info.name: info for info in available_tasks(request.extra_tasks)}
    infos = [known[name] for name in dict.fromkeys(request.tasks)]
    for info in infos:
        if info.needs == "teacher" and not request.teachers:
            raise UserError(f"task {info.name} needs a teacher", "leave it out, or evaluate a pair")
        if (info.needs == "heldout" or info.name == "teacher_jsd") and not any(request.heldout):
            hint = "hand over the held-out split, or use bpb_pydoc and teacher_jsd_pydoc"
            raise UserError(f"task {info.name} needs held-out documents of the corpus", hint)
    return infos


def _run_task(
    info: TaskInfo, request: EvaluationRequest
) -> tuple[list[outcomes.Row], dict[str, Any]]:
    from lm_eval.evaluator import evaluate as run_lm_eval

    from ctdbench.distill.precision import casts_kept
    from ctdbench.evaluate.language_model import PinnedLM, undisturbed

    metadata: dict[str, Any] = {"data_dir": request.data_dir and str(request.data_dir)}
    if info.needs == "heldout":
        metadata["heldout"] = [text for text in request.heldout if text]
    loaded = load_tasks(info.name, metadata, request.extra_tasks)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    items = request.limit_of(info.name)
    limit = items and math.ceil(items / max(len(info.subsets), 1))
    for task in loaded["tasks"].values():
        require_answers(info.name, task, limit)
        require_examples(info.name, task)
    with (
        undisturbed(request.student, request.tokenizer),
        casts_kept(request.student, request.precision),
    ):
        model = PinnedLM(
            request.student,
            request.tokenizer,
            batch_size=request.batch_size,
            bfloat16=request.precision == "bfloat16",
        )
        output = run_lm_eval(model, loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    configs = task_configs(request.extra_tasks)
    config = configs[info.name]
    read = commits(info.name, configs, request.data_dir)
    own = config.get("metadata") or {}
    by_leaf = {
        name.removeprefix(f"{info.name}::"): outcomes.collect(logged, own.get("weight") == "bytes")
        for name, logged in output["samples"].items()
    }
    rows = outcomes.group_rows(by_leaf) if info.subsets else next(iter(by_leaf.values()))
    return rows, {
        "version": str(own.get("version", "none")),
        "metric": info.metric,
        "num_fewshot": int(config.get("num_fewshot") or 0),
        "limit_per_subset" if info.subsets else "limit": limit,
        "data": _source(info, request),
        **({"commits": read} if read else {}),
        **({"max_gen_toks": given} if (given := model.max_gen_toks_given) else {}),
    }


def _source(info: TaskInfo, request: EvaluationRequest) -> str:
    if not info.hub:
        return info.needs if info.needs != "nothing" else "embedded"
    return "data-dir" if request.data_dir is not None and info.files else "hub"


def _run_teacher_task(
    info: TaskInfo, request: EvaluationRequest
) -> tuple[list[outcomes.Row], dict[str, Any]]:
    from ctdbench.evaluate.divergence import MAX_BYTES, ByteModel, teacher_divergence
    from ctdbench.evaluate.language_model import undisturbed

    texts: Sequence[str] = request.heldout
    if info.name == "teacher_jsd_pydoc":
        texts = [row["text"] for row in task_rows("bpb_pydoc")]
    limit = request.limit_of(info.name)
    texts = [text for text in texts if text][:limit]
    with undisturbed(request.student, request.tokenizer):
        rows, skipped = teacher_divergence(
            ByteModel(request.student, request.tokenizer, request.precision),
            [
                ByteModel(model, tokenizer, request.precision)
                for model, tokenizer in request.teachers
            ],
            texts,
            [ByteModel(model, tokenizer) for model, tokenizer in request.readers],
            request.taught,
        )
    if not rows:
        raise UserError(
            f"task {info.name}: no document could be tokenized without loss", "use other text"
        )
    return rows, {
        "limit": limit,
        "estimator": "mixed",
        "max_bytes": MAX_BYTES,
        "teachers": len(request.teachers),
        "over_teachers": "mean",
        "skipped_documents": skipped,
    }


def _settings(request: EvaluationRequest) -> dict[str, Any]:
    bos = request.tokenizer.bos_token
    return {
        "batch_size": request.batch_size,
        "precision": request.precision,
        "weights": str(request.student.dtype).removeprefix("torch."),
        "bos": "none" if bos is None else f"{bos} before every context",
        "chat_template": "none",
        "decoding": "greedy",
        "fewshot_seed": FEWSHOT_SEED,
        "tasks": {},
    }


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in _RECORDED}}


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval warns on every call about models in memory and about what we set on purpose."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
