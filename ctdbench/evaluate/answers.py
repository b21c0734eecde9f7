"""Whether a task's items say which answer is right: lm-eval counts one that does not as wrong."""

from __future__ import annotations

from itertools import islice
from numbers import Real
from typing import Any

from ctdbench.errors import UserError


def require_answers(name: str, task: Any, limit: int | None = None) -> None:
    """Raise UserError for an item whose right answer is not told.

    task: of lm-eval. limit: how many of its items are evaluated; None: all. Nothing is asked of a
    task with a `process_results` of its own, which knows what is right.
    """
    for number, item in enumerate(islice(iter(task.eval_docs), limit)):
        if fault := _fault(task, item):
            raise UserError(
                f"task {name}: item {number} {fault}",
                "test splits often hide their labels: evaluate one that has them, or leave such "
                "items out",
            )


def right_answers(task: Any, item: Any) -> list[Any]:
    """What an item is to be answered with: texts, or indices of its choices."""
    target = task.doc_to_text(item) if task.multiple_input else task.doc_to_target(item)
    return list(target) if isinstance(target, list | tuple) else [target]


def _fault(task: Any, item: Any) -> str:
    from lm_eval.api.task import ConfigurableTask

    default = ConfigurableTask.process_results
    own = callable(task.config.process_results) or type(task).process_results is not default
    if own or task.OUTPUT_TYPE == "loglikelihood_rolling":
        return ""
    found = right_answers(task, item)
    if task.OUTPUT_TYPE != "multiple_choice" and task.config.doc_to_choice is None:
        return "has no right answer, its target is empty" if all(map(_is_blank, found)) else ""
    choices = task.doc_to_choice(item)
    if found and all(_is_among(answer, choices) for answer in found):
        return ""
    told = " or ".join(map(repr, found)) or "nothing"
    return f"has {told} for the right one of {len(choices)} choices"


def _is_blank(answer: Any) -> bool:
    return answer is None or answer != answer or not str(answer).strip()


def _is_among(answer: Any, choices: list[str]) -> bool:
    if isinstance(answer, str):
        return answer in choices
    return isinstance(answer, Real) and 0 <= float(answer) < len(choices)
