"""What a task's name stands for once its Python has run: lm-eval's tasks, and the rows of its data.

Both run the task files' `!function` entries and load the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ctdbench.errors import UserError
from ctdbench.evaluate.task_files import leaf_configs, task_configs, task_dir, task_files

Row = dict[str, Any]


def load_tasks(
    name: str, metadata: Mapping[str, Any], extra_tasks: Iterable[Path] = ()
) -> dict[str, Any]:
    """What lm-eval's `TaskManager.load` makes of the task or group.

    metadata: what its `custom_dataset` gets beside its own, such as `data_dir`; its file is among
    it as `config_source`. Raises UserError where an extra task's own code or data break.
    """
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    extra = list(extra_tasks)
    file = task_files(extra)[name]
    given = {**metadata, "config_source": str(file)}
    manager = TaskManager(include_path=str(task_dir()), include_defaults=False, metadata=given)
    for path in extra:
        TaskIndex.process_cfg(load_yaml(path, resolve_func=False), path, manager.task_index)
    with _naming(name, file, extra):  # lm-eval renders a first item
        loaded: dict[str, Any] = manager.load([name])
    return loaded


def task_rows(
    task: str, data_dir: Path | None = None, extra_tasks: Iterable[Path] = ()
) -> list[Row]:
    """The rows of the split that a task or group evaluates, in the hub's schema.

    The teacher measures and `bpb_heldout` have no items of their own: []. Raises UserError where an
    extra task's own code or data break.
    """
    extra = list(extra_tasks)
    files, configs = task_files(extra), task_configs(extra)
    if task not in files or (configs[task].get("metadata") or {}).get("needs") == "heldout":
        return []
    with _naming(task, files[task], extra):
        return _rows(task, files, configs, data_dir)


@contextmanager
def _naming(task: str, file: Path, extra: Sequence[Path]) -> Iterator[None]:
    """What breaks in an extra task's file is told with its name; it may raise anything."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or file not in extra:
            raise
        raise UserError(
            f"task {task} ({file}) cannot be loaded: {type(error).__name__}: {error}",
            f"ctdbench check {file} tries every part of it",
        ) from error


def _rows(
    task: str, files: Mapping[str, Path], configs: Mapping[str, Row], data_dir: Path | None
) -> list[Row]:
    from lm_eval.tasks._yaml_loader import load_yaml

    given = {"data_dir": data_dir, "config_source": str(files[task])}
    needed = {task, *(leaf["task"] for leaf in leaf_configs(task, configs))} & files.keys()
    resolved = {**configs, **{name: load_yaml(files[name]) for name in needed}}
    rows: list[Row] = []
    for leaf in leaf_configs(task, resolved):
        splits = _splits(leaf, given)
        rows += splits[leaf.get("test_split") or leaf["validation_split"]]
    return rows


def _splits(leaf: Row, given: Row) -> Any:
    from datasets import load_dataset

    arguments = leaf.get("dataset_kwargs") or {}
    if callable(leaf.get("custom_dataset")):
        return leaf["custom_dataset"](**{**(leaf.get("metadata") or {}), **given}, **arguments)
    return load_dataset(leaf["dataset_path"], leaf.get("dataset_name"), **arguments)
