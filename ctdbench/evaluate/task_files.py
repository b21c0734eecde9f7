"""Task files: where they are, their form, their YAML with all includes, what else they name.

A task file's `!function` entries run Python when the task is evaluated, so it is trusted like a
plugin. Everything here is safe: such entries are read as the text behind them.
extra_tasks: files of tasks that are not the project's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ctdbench import registry
from ctdbench.errors import PreflightError, UserError
from ctdbench.spec import check_name

Config = dict[str, Any]
Source = tuple[str, ...]
LOCAL_BUILDERS = {"json", "csv", "parquet", "arrow", "text"}
# Tasks of the engine's own, and those that read the same texts.
WITHOUT_FILE = {"teacher_jsd": "bpb_heldout", "teacher_jsd_pydoc": "bpb_pydoc"}


# What lm-eval computes from all items at once, where a task has no process_results of its own.
CORPUS_METRICS = {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "f1", "mcc"}
CORPUS_METRICS |= {"brier_score", "bleu", "chrf", "chrf++", "ter"}


class _Open(BaseModel):
    """What the engine reads of a mapping; the rest is lm-eval's."""

    model_config = ConfigDict(extra="allow")


class Metric(_Open):
    """An entry of `metric_list`."""

    metric: str


class Metadata(_Open):
    """A task's `metadata`.

    files: original files, split -> path, under --data-dir; of an embedded task beside its file.
    revision: of the data set `hub`: a branch, tag or commit; default: its main branch.
    needs: "heldout" hands the corpus's held-out documents over. primary: the metric to look at.
    """

    version: str | int | float | None = None
    description: str = ""
    primary: str | None = None
    hub: str | None = None
    revision: str | None = None
    embedded: bool = False
    files: dict[str, str] = Field(default_factory=dict)
    needs: Literal["data", "heldout", "nothing"] | None = None


class Member(_Open):
    """A task that stands within its group's file."""

    task: str
    metric_list: list[Metric] = Field(default_factory=list)
    metadata: Metadata = Field(default_factory=Metadata)


class TaskForm(_Open):
    """A task file with what it includes: a task, or a group of tasks."""

    group: str | None = None
    task: str | list[str | Member]
    output_type: Literal[
        "generate_until", "multiple_choice", "loglikelihood", "loglikelihood_rolling"
    ] = "generate_until"
    metric_list: list[Metric] = Field(default_factory=list)
    metadata: Metadata = Field(default_factory=Metadata)

    @model_validator(mode="after")
    def _check(self) -> TaskForm:
        if self.group is None and not isinstance(self.task, str):
            raise ValueError("task: must be a name; a list of tasks has a `group: NAME`")
        if self.group is not None and isinstance(self.task, str):
            raise ValueError("task: a group has a list of tasks")
        return self

    @property
    def name(self) -> str:
        """Of the group, else of the task."""
        return self.group or str(self.task)


def task_dir() -> Path:
    """The project's folder of task files."""
    spec = find_spec("ctdbench_tasks")
    clone = Path(__file__).resolve().parents[2] / "tasks"
    own = Path(spec.origin).parent if spec is not None and spec.origin else clone
    if not (own / "__init__.py").is_file():
        raise PreflightError(
            "the task files (package ctdbench_tasks) are missing", "pip install -e ."
        )
    return own


def task_files(extra_tasks: Iterable[Path] = ()) -> dict[str, Path]:
    """Name of every task and group -> its file.

    Raises UserError for an extra task that is malformed or has the name of another one.
    """
    files = {}
    for path in sorted(task_dir().rglob("*.yaml")):
        config = _read(path)
        name = config.get("group") or config.get("task")
        if isinstance(name, str):
            files[name] = path
    for path in extra_tasks:
        name = task_name(path)
        if name in WITHOUT_FILE or files.get(name, path).resolve() != path.resolve():
            raise UserError(
                f"task file {path}: there is a task {name} already", "give it another name"
            )
        files[name] = path
    return files


def task_name(path: Path) -> str:
    """The name of the task or group in a file; raises UserError for a malformed one."""
    form = read_form(path)
    return check_name(form.name, f"task file {path}: task")


def read_form(path: Path) -> TaskForm:
    """What the engine reads of a task file; raises UserError naming the first field at fault."""
    form = registry.validate(TaskForm, _read(path), f"task file {path}")
    for name in form.metadata.files.values() if form.metadata.embedded else ():
        if not (path.parent / name).is_file():
            raise UserError(
                f"task file {path}: {path.parent / name} does not exist",
                "the files of an embedded task lie beside it",
            )
    return form


def task_configs(extra_tasks: Iterable[Path] = ()) -> dict[str, Config]:
    """Name of every task and group -> its YAML, includes merged, functions as plain text."""
    return {name: _read(path) for name, path in task_files(extra_tasks).items()}


def leaf_configs(name: str, configs: Mapping[str, Config]) -> Iterator[Config]:
    """The leaf tasks under a task or group, each as the mapping that lm-eval builds it from."""
    config = configs[name]
    if "group" not in config:
        yield config
        return
    structure = {"group", "group_alias", "task", "aggregate_metric_list", "metadata"}
    common = {key: value for key, value in config.items() if key not in structure}
    for member in config["task"]:
        if isinstance(member, str) and member in configs:
            yield from leaf_configs(member, configs)
        elif isinstance(member, dict) and "task" in member:
            yield {**common, **configs.get(member["task"], {}), **member}


def is_mean(leaf: Config, entry: Config) -> bool:
    """Whether a metric is a mean over items, as all scores are; entry: of its `metric_list`."""
    of_items = bool(leaf.get("process_results")) or entry["metric"] not in CORPUS_METRICS
    return of_items and entry.get("aggregation", "mean") == "mean"


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """SafeLoader, where it can in C, that reads lm-eval's `!function` as the text behind it."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def _read(path: Path, including: tuple[Path, ...] = ()) -> Config:
    if path in including:
        raise UserError(f"task file {path} includes itself", "remove the include")
    config = parse(path)
    merged: Config = {}
    for included in _includes(path, config):
        merged |= _read(included, (*including, path))
    config.pop("include", None)
    return merged | config


def parse(path: Path) -> Config:
    """A file's YAML without what it includes; raises UserError where it cannot be read."""
    try:
        config = _Loader(path.read_text(encoding="utf-8")).get_single_data()
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read: {reason}", "check its YAML") from error
    if not isinstance(config, dict):
        raise UserError(
            f"{path} is not a mapping", "a task starts with `task: NAME`, a pair with `student:`"
        )
    return config


def _includes(path: Path, config: Config) -> list[Path]:
    """Relative to the file that includes them, as lm-eval reads them."""
    stated = config.get("include") or []
    names = [stated] if isinstance(stated, str) else stated
    return [(path.parent / str(name)).expanduser().resolve() for name in names]


def local_data(leaf: Config) -> Iterator[Path]:
    """The files that lm-eval's own loaders of local data would read, patterns resolved."""
    for path in _data_files(leaf):
        found = map(Path, sorted(glob(str(path), recursive=True)))
        yield from (file for file in ([path] if path.is_file() else found) if file.is_file())


def _data_files(leaf: Config, split: str | None = None) -> Iterator[Path]:
    """As a task states them, all or those of a split."""
    if leaf.get("dataset_path") not in LOCAL_BUILDERS:
        return
    stated = (leaf.get("dataset_kwargs") or {}).get("data_files") or ()
    by_split = stated if isinstance(stated, dict) else {split: stated}
    for entry in by_split.values() if split is None else [by_split.get(split, ())]:
        yield from map(Path, [entry] if isinstance(entry, str) else entry)


def item_sources(extra_tasks: Iterable[Path] = ()) -> dict[str, set[Source]]:
    """Of every task and group where its items come from: tasks with a source in common share items.

    Empty for the corpus's held-out documents: their parts are apart (`EvalSpec.held_out`).
    """
    files, configs = task_files(extra_tasks), task_configs(extra_tasks)
    found = {
        name: {
            source
            for leaf in leaf_configs(name, configs)
            for source in _sources(leaf, files[name].parent)
        }
        for name in configs
    }
    return found | {name: found[text] for name, text in WITHOUT_FILE.items()}


def _sources(leaf: Config, folder: Path) -> Iterator[Source]:
    """folder: where the files of an embedded task lie."""
    metadata = leaf.get("metadata") or {}
    if metadata.get("needs") == "heldout":
        return
    split = str(leaf.get("test_split") or leaf.get("validation_split"))
    stored = [str(path.expanduser().resolve()) for path in _data_files(leaf, split)]
    if name := metadata.get("files", {}).get(split):
        stored.append(str((folder / name).resolve()) if metadata.get("embedded") else str(name))
    yield from (("file", path) for path in stored)
    hub = metadata.get("hub") or leaf.get("dataset_path")
    if hub and hub not in LOCAL_BUILDERS:
        yield "hub", str(hub), str(metadata.get("config") or leaf.get("dataset_name")), split
    elif not stored:
        yield "code", str(leaf.get("custom_dataset")), split


def code_files(path: Path) -> Iterator[Path]:
    """The Python files beside a task file that it names, and those of the files it includes."""
    if path.parent == task_dir():  # the project's functions count by version
        return
    for module in re.findall(r"!function\s+([\w.]+)\.\w+", path.read_text(encoding="utf-8")):
        file = path.parent / f"{module.replace('.', '/')}.py"
        if file.is_file():
            yield file
    for included in _includes(path, parse(path)):
        yield from code_files(included)
