"""Which tasks there are and whether their data can be had; reads YAML only and runs no task code.

extra_tasks: files of tasks that are not the project's.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from ctdbench.errors import PreflightError, UserError
from ctdbench.evaluate.hub_data import commits
from ctdbench.evaluate.task_files import (
    LOCAL_BUILDERS,
    Config,
    code_files,
    is_mean,
    leaf_configs,
    local_data,
    task_configs,
    task_files,
)

Needs = Literal["data", "heldout", "teacher", "nothing"]
HUB_TIMEOUT_SECONDS = 5
FROM_PYTHON = ("bpb_pydoc", "teacher_jsd_pydoc")  # on Python's own language reference


@dataclass(frozen=True)
class TaskInfo:
    """What a user may know of a task before it runs.

    kind: "generate_until", "multiple_choice", "loglikelihood", "loglikelihood_rolling", or
        "teacher_jsd". metric: the first to look at. subsets: the leaf tasks of a group.
    needs: "data" (hub or --data-dir), "heldout" (the corpus's held-out split), "teacher" (one or
        more teachers, and with `teacher_jsd` the held-out split as well), or "nothing".
    hub: data sets on the hub. files: original files under --data-dir.
    lower_is_better: those of its metrics that are better when smaller.
    """

    name: str
    description: str
    kind: str
    metric: str
    needs: Needs
    hub: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    subsets: tuple[str, ...] = ()
    lower_is_better: tuple[str, ...] = ()


TEACHER_TASKS = {
    "teacher_jsd": TaskInfo(
        "teacher_jsd",
        "Jensen-Shannon divergence from the teacher's next-byte distributions, held-out documents",
        kind="teacher_jsd",
        metric="jsd",
        needs="teacher",
        lower_is_better=("jsd",),
    ),
    "teacher_jsd_pydoc": TaskInfo(
        "teacher_jsd_pydoc",
        "The same on Python's language reference: human text wherever the corpus is the teacher's",
        kind="teacher_jsd",
        metric="jsd",
        needs="teacher",
        lower_is_better=("jsd",),
    ),
}


def available_tasks(extra_tasks: Iterable[Path] = ()) -> list[TaskInfo]:
    """All tasks by name: the project's, the extra ones, and the teacher measures."""
    return _listed(task_configs(extra_tasks))


def _listed(configs: Mapping[str, Config]) -> list[TaskInfo]:
    infos = [_info(name, configs) for name in configs]
    return sorted([*infos, *TEACHER_TASKS.values()], key=lambda info: info.name)


def on_running_text(names: Sequence[str], extra_tasks: Iterable[Path] = ()) -> list[str]:
    """Those of the tasks that measure text as it is: bits per byte, divergence from the teacher."""
    kinds = {info.name: info.kind for info in available_tasks(extra_tasks)}
    return [name for name in names if kinds[name] in ("loglikelihood_rolling", "teacher_jsd")]


def check_tasks(
    names: Sequence[str], data_dir: Path | None = None, extra_tasks: Iterable[Path] = ()
) -> None:
    """Raise, within seconds and without torch, if a task is unknown or its data cannot be had.

    With `data_dir` every file that a task declares must lie there; a task that declares none takes
    its data set from the hub in any case. Raises UserError for an unknown task, a missing file or a
    score that is no mean over items or tasks, PreflightError for a data set that is neither in the
    local cache nor reachable on the hub.
    """
    configs = task_configs(extra_tasks)
    known = {info.name: info for info in _listed(configs)}
    for name in names:
        if name not in known:
            raise _unknown(name, known)
    for info in (known[name] for name in dict.fromkeys(names)):
        _require_means(info.name, configs)
        if data_dir is not None and info.files:
            _require_files(info, data_dir)
        else:
            for dataset in info.hub:
                _require_hub(dataset, info)


def _require_means(name: str, configs: Mapping[str, Config]) -> None:
    stated = configs.get(name, {}).get("aggregate_metric_list") or ()
    for entry in [stated] if isinstance(stated, dict) else stated:
        if entry.get("weight_by_size", True):  # lm-eval's default
            raise UserError(
                f"task {name}: a group's score is the mean of its tasks' scores, and "
                f"aggregate_metric_list weighs {entry['metric']} by the tasks' size",
                "say weight_by_size: false, or make one task of all items",
            )
    for leaf in leaf_configs(name, configs) if name in configs else ():
        for entry in leaf.get("metric_list") or ():
            if not is_mean(leaf, entry):
                raise UserError(
                    f"task {name}: scores are means over items, and {entry['metric']} is none",
                    "take a metric of one item (acc, or bpb by ctdbench_tasks.scoring) and "
                    "aggregation: mean",
                )


def task_content(
    names: Sequence[str], data_dir: Path | None = None, extra_tasks: Iterable[Path] = ()
) -> dict[str, str]:
    """Name -> SHA-256 of what the name stands for: the task's YAML, its local or embedded files.

    Part of a cell's identity, and so is the text that comes with this Python. A data set on the hub
    enters by its commit, where that is known. Functions enter by the `version` in the YAML; those
    that lie beside an extra task, by their code, too.
    """
    extra = list(extra_tasks)
    configs, files = task_configs(extra), task_files(extra)
    content = {}
    for name in dict.fromkeys(names):
        state = hashlib.sha256(_canonical(configs.get(name, name)))
        for leaf in leaf_configs(name, configs) if name in configs else ():
            metadata = leaf.get("metadata") or {}
            folder = files[name].parent if metadata.get("embedded") else data_dir
            for file in metadata.get("files", {}).values() if folder is not None else ():
                state.update((folder / file).read_bytes())
            for path in local_data(leaf):
                state.update(path.read_bytes())
        if name in configs:
            state.update("".join(commits(name, configs, data_dir).values()).encode())
        if files.get(name) in extra:
            for path in code_files(files[name]):
                state.update(path.read_bytes())
        if name in FROM_PYTHON and (topics := find_spec("pydoc_data.topics")) is not None:
            state.update(Path(str(topics.origin)).read_bytes())
        content[name] = state.hexdigest()
    return content


def _canonical(config: Any) -> bytes:
    return json.dumps(config, sort_keys=True, default=str).encode()


def _info(name: str, configs: Mapping[str, Config]) -> TaskInfo:
    leaves = list(leaf_configs(name, configs))
    metadata = [leaf.get("metadata") or {} for leaf in leaves]
    own = configs[name].get("metadata") or {}
    hub = [
        source for leaf, data in zip(leaves, metadata, strict=True) for source in _hub(leaf, data)
    ]
    embedded = any(data.get("embedded") for data in metadata)
    files = (
        [] if embedded else [file for data in metadata for file in data.get("files", {}).values()]
    )
    entries = [entry for leaf in leaves for entry in leaf.get("metric_list") or ()]
    lower = [entry["metric"] for entry in entries if entry.get("higher_is_better") is False]
    return TaskInfo(
        name,
        description=str(own.get("description", "")),
        kind=str(leaves[0].get("output_type", "generate_until")) if leaves else "",
        metric=str(own.get("primary") or next((entry["metric"] for entry in entries), "")),
        needs=own.get("needs") or ("data" if hub else "nothing"),
        hub=tuple(dict.fromkeys(hub)),
        files=tuple(files),
        subsets=tuple(str(leaf["task"]) for leaf in leaves) if "group" in configs[name] else (),
        lower_is_better=tuple(dict.fromkeys(lower)),
    )


def _hub(leaf: Config, metadata: Config) -> list[str]:
    source = metadata.get("hub") or leaf.get("dataset_path")
    return [source] if source and source not in LOCAL_BUILDERS else []


def _unknown(name: str, known: Mapping[str, TaskInfo]) -> UserError:
    close = difflib.get_close_matches(name, known, n=3)
    tried = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
    return UserError(f"unknown task {name!r}", tried)


def _require_files(info: TaskInfo, data_dir: Path) -> None:
    for name in info.files:
        if not (data_dir / name).is_file():
            hint = "put the original file there, or leave --data-dir out to use the hub"
            raise UserError(f"task {info.name}: {data_dir / name} does not exist", hint)


def _require_hub(dataset: str, info: TaskInfo) -> None:
    from huggingface_hub import HfApi, constants

    downloaded = (
        Path(constants.HF_HUB_CACHE) / f"datasets--{dataset.replace('/', '--')}" / "snapshots"
    )
    prepared = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets"
    if downloaded.is_dir() or (Path(prepared) / dataset.replace("/", "___").lower()).is_dir():
        return
    files = f" with {info.files[0]}{' and so on' * (len(info.files) > 1)}" if info.files else ""
    try:
        HfApi().dataset_info(dataset, timeout=HUB_TIMEOUT_SECONDS)
    except Exception as error:  # any network or authorisation failure means the same to the user
        raise PreflightError(
            f"task {info.name}: data set {dataset} is not in the local cache and the hub cannot be "
            f"had ({type(error).__name__})",
            f"check your network, or give a folder{files} by --data-dir",
        ) from error
