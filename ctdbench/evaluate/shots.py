"""Whether a task has enough few-shot examples, and none is the item that is asked."""

from __future__ import annotations

from typing import Any

from ctdbench.errors import UserError

_HINT = "name a split that is not evaluated, and large enough, in fewshot_split"


def require_examples(name: str, task: Any) -> None:
    """Raise UserError for a task that shows answers to its own items, or has too few examples.

    task: of lm-eval. It leaves the item that is asked out of its examples only where these come
    from `test_split` by name; where no split is named and no other is there, it takes the
    evaluated one all the same.
    """
    shots = task.config.num_fewshot or 0
    if not shots:
        return
    leaves_out = task.fewshot_cfg.split == task.config.test_split
    source = _source(task)
    if source == (task.config.test_split or task.config.validation_split) and not leaves_out:
        raise UserError(
            f"task {name}: its {shots} few-shot examples come from {source!r}, the split that is "
            "evaluated, so that an item may be shown with its answer",
            _HINT,
        )
    if (there := len(task.sampler.df) - leaves_out) < shots:
        raise UserError(
            f"task {name}: num_fewshot is {shots}, with {there} items to take examples from",
            f"lower it, or {_HINT}",
        )


def _source(task: Any) -> str | None:
    """The split that examples come from; None where they are written in the task's file."""
    if task.fewshot_cfg.split is not None:
        return str(task.fewshot_cfg.split)
    if task.config.fewshot_config is not None and task.fewshot_cfg.samples is not None:
        return None
    splits = (task.config.training_split, task.config.validation_split, task.config.test_split)
    return next(split for split in splits if split is not None)
