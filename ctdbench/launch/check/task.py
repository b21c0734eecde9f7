"""`ctdbench check TASK`: what a run needs of a task, one line a finding.

From the data check on the task file's own Python runs. The scores are those of the untrained pair
`tiny` on a few items: what counts is that they come out, under the names that the file gives them.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, fields
from functools import cached_property, partial
from io import StringIO
from pathlib import Path
from typing import Any

from ctdbench import registry
from ctdbench.errors import UserError
from ctdbench.evaluate import EvaluationRequest, TaskInfo, available_tasks, check_tasks, evaluate
from ctdbench.evaluate.answers import require_answers, right_answers
from ctdbench.evaluate.loading import load_tasks, task_rows
from ctdbench.evaluate.shots import require_examples
from ctdbench.evaluate.task_files import (
    WITHOUT_FILE,
    Config,
    is_mean,
    leaf_configs,
    read_form,
    task_configs,
    task_files,
    task_name,
)
from ctdbench.launch.check.findings import Failed, Finding, Skipped, found_by, tell
from ctdbench.report.tables import Column

ITEMS = 2  # that are scored
SHOWN = 400  # characters of a prompt, from its end
BESIDE = {"group", "group_alias", "aggregate_metric_list", "class"}  # the fields of a TaskConfig


@dataclass(frozen=True)
class TaskCase:
    """A task by name, and its file if it is not the project's."""

    name: str
    extra: tuple[Path, ...] = ()
    data_dir: Path | None = None

    @classmethod
    def of(cls, stated: str, data_dir: Path | None = None) -> TaskCase:
        """A name or a YAML file; raises UserError where the file has no name that can be used."""
        if not registry.is_file_name(stated):
            return cls(stated, (), data_dir)
        path = Path(stated).expanduser()
        return cls(task_name(path), (path,), data_dir)

    @cached_property
    def info(self) -> TaskInfo:
        """What the catalog says of it."""
        known = {info.name: info for info in available_tasks(self.extra)}
        return registry.pick(self.name, known, "task")

    def file(self) -> Path:
        """Its task file; raises Skipped for a task of the engine's own."""
        if self.name in WITHOUT_FILE:
            raise Skipped("a measure of the engine's own, without a file")
        return task_files(self.extra)[self.name]

    def leaves(self) -> list[Config]:
        """The leaf tasks, functions as plain text."""
        return list(leaf_configs(self.name, task_configs(self.extra)))


def run(case: TaskCase, say: Callable[[str], None], *, debug: bool = False) -> bool:
    """Say the report line by line as it comes; whether every check passed."""
    say(f"{case.name}  {case.info.description}".rstrip())
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is set on purpose
    with redirect_stderr(StringIO()):  # bars between the findings
        return tell(check(case), say, debug=debug)


def check(case: TaskCase) -> Iterator[Finding]:
    """Every check, in order."""
    groups: dict[str, dict[str, Callable[[TaskCase], str]]] = {
        "file": {"form": form, "metadata": metadata, "metrics": metrics},
        "data": {"there": there, "rows": rows},
        "one item": {"prompt": prompt, "gold": gold},
        "on the pair tiny": {"scores": scores},
    }
    for group, members in groups.items():
        for name, run_check in members.items():
            yield found_by(group, name, partial(run_check, case))


def form(case: TaskCase) -> str:
    """The fields are those of lm-eval, and a group's members exist."""
    from lm_eval.config.task import TaskConfig

    known = {field.name for field in fields(TaskConfig)} | BESIDE
    configs = task_configs(case.extra)
    stated = read_form(case.file())
    for key in configs[case.name]:
        if key not in known:
            raise Failed(f"{key}: no such field; {registry.suggestion(key, known)}")
    for member in stated.task if isinstance(stated.task, list) else ():
        if isinstance(member, str) and member not in configs:
            raise Failed(f"task: there is no {member}; {registry.suggestion(member, configs)}")
    for leaf in case.leaves():
        if not (leaf.get("test_split") or leaf.get("validation_split")):
            raise Failed("neither test_split nor validation_split says what is evaluated")
    if case.info.subsets:
        return f"a group of {len(case.leaves())} {case.info.kind} tasks"
    return f"a {case.info.kind} task"


def metadata(case: TaskCase) -> str:
    """A version, which is part of a cell's identity, and a line for people."""
    stated = read_form(case.file()).metadata
    lacking = {"version": stated.version is None, "description": not stated.description.strip()}
    if missing := [name for name, lacks in lacking.items() if lacks]:
        raise Failed(f"metadata lacks {', '.join(missing)}")
    return f"version {stated.version}: {stated.description}"


def metrics(case: TaskCase) -> str:
    """Known by name, averaged over items, and better in the direction that tables take them in."""
    primary, told = read_form(case.file()).metadata.primary, dict[str, str]()
    for leaf in case.leaves():
        for entry in leaf.get("metric_list") or ():
            told[entry["metric"]] = _metric(case, leaf, entry)
    if not told:
        raise Failed("metric_list is missing or empty")
    if primary is not None and primary not in told:
        raise Failed(f"metadata.primary: {primary} is none of {', '.join(told)}")
    return ", ".join(f"{name} {direction}" for name, direction in told.items())


def _metric(case: TaskCase, leaf: Config, entry: Config) -> str:
    """Which way is better."""
    import lm_eval.api.metrics  # noqa: F401  (it fills the registry)
    from lm_eval.api.registry import METRIC_REGISTRY

    name = str(entry["metric"])
    if not leaf.get("process_results") and name not in METRIC_REGISTRY:
        raise Failed(f"{name} is no metric of lm-eval, and there is no process_results to make it")
    if not is_mean(leaf, entry):
        raise Failed(f"{name}: scores are means over items; take one of an item, aggregation: mean")
    lower = Column(case.name, name).lower_is_better
    if entry.get("higher_is_better", not lower) is lower:
        raise Failed(
            f"{name}: higher_is_better is {str(lower).lower()}, and tables go by the name: less is "
            "better for bpb, bits, jsd and perplexity alone"
        )
    return "↓" if lower else "↑"


def there(case: TaskCase) -> str:
    """Files or data sets can be had."""
    check_tasks([case.name], case.data_dir, case.extra)
    info, local = case.info, case.data_dir is not None
    named = info.files if local and info.files else info.hub
    if not named:
        return {"heldout": "the corpus's held-out text", "teacher": "running text"}.get(
            info.needs, "comes with the task"
        )
    return f"{'in --data-dir' if local and info.files else 'on the hub'}: {', '.join(named)}"


def rows(case: TaskCase) -> str:
    """They load, and there are some."""
    if case.info.needs in ("heldout", "teacher"):
        raise Skipped("no items of its own")
    found = len(_loaded(case))
    if not found:
        raise Failed("there is none")
    return f"{found:,} items"


def _loaded(case: TaskCase) -> list[dict[str, Any]]:
    try:
        check_tasks([case.name], case.data_dir, case.extra)
    except UserError:
        raise Skipped("the data cannot be had") from None
    return task_rows(case.name, case.data_dir, case.extra)


def prompt(case: TaskCase) -> str:
    """What a model reads of the first item, few-shot examples included, from its end."""
    tasks = _tasks(case)
    for task in tasks:
        require_examples(case.name, task)
    task = tasks[0]
    task.build_all_requests(limit=1, rank=0, world_size=1)
    text = str(task.instances[0].args[0])
    return ("…" if len(text) > SHOWN else "") + json.dumps(text[-SHOWN:], ensure_ascii=False)


def gold(case: TaskCase) -> str:
    """What the first one is to answer; every one says it."""
    if case.info.kind == "loglikelihood_rolling":
        raise Skipped("the text itself is scored")
    tasks = _tasks(case)
    for task in tasks:
        require_answers(case.name, task)
    item = tasks[0].eval_docs[0]
    choices = tasks[0].doc_to_choice(item) if tasks[0].config.doc_to_choice is not None else None
    found = right_answers(tasks[0], item)
    shown = [choices[one] if choices and isinstance(one, int) else one for one in found]
    return " or ".join(json.dumps(one, ensure_ascii=False, default=str) for one in shown)


def _tasks(case: TaskCase) -> list[Any]:
    """lm-eval's, with their items."""
    from ctdbench.evaluate.runner import FEWSHOT_SEED

    case.file()
    if case.info.needs != "heldout" and not _loaded(case):
        raise Skipped("there are no items")
    given = {"data_dir": case.data_dir and str(case.data_dir), "heldout": _documents()}
    tasks = list(load_tasks(case.name, given, case.extra)["tasks"].values())
    for task in tasks:
        task.set_fewshot_seed(FEWSHOT_SEED)
    return tasks


def _documents() -> list[str]:
    from ctdbench.distill.corpus import load_corpus

    return [document.text for document in load_corpus("embedded").held_out[:ITEMS]]


def scores(case: TaskCase) -> str:
    """Every metric of the file comes out as a number."""
    from ctdbench.distill.models import load_side
    from ctdbench.spec import ModelSpec

    if case.info.needs not in ("heldout", "teacher"):
        _loaded(case)
    student, teacher = (
        load_side(ModelSpec(model=f"tiny:{name}")) for name in ("student", "teacher")
    )
    request = EvaluationRequest(
        student.model,
        student.tokenizer,
        (case.name,),
        teachers=[(teacher.model, teacher.tokenizer)],
        limit=ITEMS,
        data_dir=case.data_dir,
        heldout=_documents(),
        extra_tasks=case.extra,
    )
    found = evaluate(request).scores[case.name]
    if odd := [name for name, value in found.items() if not math.isfinite(value)]:
        raise Failed(f"{', '.join(odd)}: no finite number")
    if case.name not in WITHOUT_FILE:
        entries = [entry for leaf in case.leaves() for entry in leaf.get("metric_list") or ()]
        named = {entry["metric"] for entry in entries}
        if missing := sorted(named - {name.partition(",")[0] for name in found}):
            raise Failed(f"{', '.join(missing)} did not come out, only {', '.join(found)}")
    return ", ".join(f"{name} {value:.3g}" for name, value in found.items())
