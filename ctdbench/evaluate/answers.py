"""Whether a task's items say which answer is right: lm-eval counts one that does not as wrong."""

from __future__ import annotations

from itertools import islice
from numbers import Real
from typing import Any

from ctdbench.errors import UserError


def require_answers(name: str, task: Any, limit: int | None = None) -> None:
    """Raise UserError for an item whose choices or right answer cannot be scored.

    task: of lm-eval. limit: how many of its items are evaluated; None: all. Where the task has a
    `process_results` of its own, that knows what is right, and only the choices are looked at.
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
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(item)
        if blank := [index for index, choice in enumerate(choices) if not choice]:
            return f"has an empty choice, number {blank[0]} of {len(choices)} (from 0)"
        if own:
            return ""
        found = right_answers(task, item)
        if found and all(_is_among(answer, choices) for answer in found):
            return ""
        told = " or ".join(map(repr, found)) or "nothing"
        return f"has {told} for the right one of {len(choices)} choices"
    if task.OUTPUT_TYPE == "loglikelihood_rolling" or own:
        return ""
    blank_text = not any(str(answer).strip() for answer in right_answers(task, item))
    return "has no right answer, its target is empty" if blank_text else ""


def _is_among(answer: Any, choices: list[str]) -> bool:
    if isinstance(answer, str):
        return answer in choices
    return isinstance(answer, Real) and 0 <= float(answer) < len(choices)
