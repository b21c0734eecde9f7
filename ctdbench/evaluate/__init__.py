"""Evaluation: lm-eval tasks, bits per byte, divergence from the teacher; outcomes per sample.

    check_tasks(["gsm8k", "piqa", "agi_zh"], data_dir)         # cheap, before any model is loaded
    evaluation = evaluate(EvaluationRequest(student, tokenizer, ("piqa", "bpb_pydoc"), limit=100))

Importing this package imports neither torch nor lm-eval.
"""

from __future__ import annotations

from ctdbench.evaluate.catalog import (
    TaskInfo,
    available_tasks,
    check_tasks,
    on_running_text,
    task_content,
)
from ctdbench.evaluate.overlap import Overlap, shared_ngrams, task_texts
from ctdbench.evaluate.runner import Evaluation, EvaluationRequest, evaluate
from ctdbench.evaluate.task_files import task_name

__all__ = [
    "Evaluation",
    "EvaluationRequest",
    "Overlap",
    "TaskInfo",
    "available_tasks",
    "check_tasks",
    "evaluate",
    "on_running_text",
    "shared_ngrams",
    "task_content",
    "task_name",
    "task_texts",
]
