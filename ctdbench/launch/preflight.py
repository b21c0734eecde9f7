"""Everything that can keep cells from running, found before the first expensive second.

What can be had (models, tokenizers, tasks, text) is looked up without torch. Options, memory and
disk come after that: they are checked only where nothing is missing, or where options were stated.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ctdbench.cache import cache_dir
from ctdbench.distill import corpus, references
from ctdbench.errors import PreflightError, UserError
from ctdbench.evaluate import check_tasks
from ctdbench.launch import devices
from ctdbench.launch.cache_use import Texts, cache_use
from ctdbench.launch.estimate import Estimate, conversions, estimate
from ctdbench.spec import PairSpec, RunSpec, format_bytes

if TYPE_CHECKING:
    from ctdbench.distill.rendering import Template
    from ctdbench.method import Method, PairTables

Check = Callable[[], object]  # raises UserError for what is wrong


class Scarce(PreflightError):
    """All is there and valid, but this machine has too little of something."""


def preflight(specs: Sequence[RunSpec], store: Path, *, jobs: int = 1) -> list[UserError]:
    """What would fail, each once, and none of it raised; empty where all can run.

    jobs: cells at a time. Whether a method can serve its pair is for `unfit` to say.
    """
    lookups = {(call.func, call.args): call for spec in specs for call in _reachable(spec)}
    problems = _complaints(lookups.values())  # cells share most of them
    if problems:
        return problems + _complaints(partial(_method, spec) for spec in specs if spec.options)
    texts: Texts = {}
    problems = _complaints(partial(_valid, spec, texts) for spec in specs)
    return problems or _complaints(_enough(specs, store, jobs, texts))


def unfit(specs: Sequence[RunSpec]) -> list[tuple[RunSpec, UserError]]:
    """The cells whose method cannot serve their pair, with the method's reason.

    Loads tokenizers, where a method looks at them: seconds, with a large vocabulary up to a minute.
    """
    from ctdbench.method import Method

    built: dict[tuple[PairSpec, Template], list[PairTables]] = {}
    found = []
    for spec in specs:
        method = _method(spec)
        if type(method).check is Method.check:  # any pair will do
            continue
        key = (spec.pair, spec.train.template)
        if key not in built:
            built[key] = _tables(*key)
        for error in _complaints(partial(method.check, tables) for tables in built[key]):
            told = UserError(f"{spec.method} on {spec.pair.name}: {error.message}", error.hint)
            found.append((spec, told))
    return found


def estimated(spec: RunSpec) -> Estimate | None:
    """What the cell will take here; None where a model's size is not known."""
    return estimate(spec, taught=_method(spec).needs.teacher, on_gpu=bool(devices.gpus()))


def _complaints(checks: Iterable[Check]) -> list[UserError]:
    """Every complaint once, in the order of the checks."""
    found: dict[str, UserError] = {}
    for check in checks:
        try:
            check()
        except UserError as error:
            found.setdefault(str(error), error)
    return list(found.values())


def _reachable(spec: RunSpec) -> Iterator[partial[None]]:
    folder = spec.eval.data
    if folder is None or folder.is_dir():
        own = spec.eval.extra_tasks
        yield from (partial(check_tasks, (task,), folder, own) for task in spec.eval.tasks)
        yield partial(_require_text, spec.train.corpus, folder)
    else:
        yield partial(_no_folder, folder)
    for side in (spec.pair.student, *spec.pair.teachers):
        yield from (partial(_require, text) for text in (side.model, side.tokenizer) if text)


def _no_folder(folder: Path) -> None:
    raise UserError(f"--data-dir {folder} is no folder", "give the folder with the tasks' data")


def _require_text(name: str, folder: Path | None) -> None:
    corpus.require(name, folder)
    if name == "gsm8k" and folder is None:
        check_tasks([name], None)  # of the same data set


def _require(text: str) -> None:
    references.require(references.parse(text))


def _method(spec: RunSpec) -> Method:
    """Imports torch, as every method does; raises UserError for a wrong option."""
    from ctdbench.method import create

    return create(spec.method, spec.options)


def _valid(spec: RunSpec, texts: Texts) -> None:
    """Options, balancing, and text enough for the budget. texts: those that were loaded."""
    from ctdbench.launch import cell

    key = (spec.train.corpus, spec.eval.data)
    if key not in texts:
        texts[key] = corpus.load_corpus(*key)
    cell.check(spec, texts[key])


def _tables(pair: PairSpec, template: Template) -> list[PairTables]:
    from ctdbench.distill.inspection import tokenizer_sides
    from ctdbench.distill.setting import pair_tables

    student, *teachers = tokenizer_sides(pair)
    return [pair_tables(student, teacher, template) for teacher in teachers]


def _enough(specs: Sequence[RunSpec], store: Path, jobs: int, texts: Texts) -> Iterator[Check]:
    """Memory, precision, disk."""
    from huggingface_hub import constants

    gpus = devices.gpus()
    free = min(gpu.memory for gpu in gpus) if gpus else devices.free_memory()
    at_once = -(-jobs // max(len(gpus), 1))  # on one device
    known = [(found, spec) for spec in specs if (found := estimated(spec)) is not None]
    # Under FSDP2 a process holds a share of what is estimated.
    if free is not None and os.environ.get("ACCELERATE_USE_FSDP") != "true":
        neediest = {spec.pair.name: (found.memory, spec) for found, spec in sorted(known, key=_by)}
        for needed, spec in neediest.values():
            yield partial(_memory, spec, needed, free, at_once)
    if not all(gpu.bfloat16 for gpu in gpus):
        yield from (partial(_precision, spec) for spec in specs)
    yield partial(_writable, store)
    running = jobs * max((found.disk for found, _ in known), default=0)
    yield partial(_disk, "--store", store, running + sum(found.kept for found, _ in known))
    made = conversions(specs)
    yield partial(_disk, "the cache", cache_dir(), made.wheel + cache_use(specs, texts).examples)
    yield partial(_disk, "the hub's cache", Path(constants.HF_HUB_CACHE), made.hub)


def _by(known: tuple[Estimate, RunSpec]) -> int:
    return known[0].memory


def _memory(spec: RunSpec, needed: int, free: int, at_once: int) -> None:
    if at_once * needed > free:
        times = f"{at_once} at a time, each" if at_once > 1 else "it"
        raise Scarce(
            f"{spec.method} on {spec.pair.name}: {times} takes about {format_bytes(needed)} of "
            f"memory to train, and {format_bytes(free)} are free",
            "set train.micro_batch=1, a smaller --block-rows" + ", fewer --jobs" * (at_once > 1),
        )


def _precision(spec: RunSpec) -> None:
    for name, section in (("train", spec.train), ("eval", spec.eval)):
        if section.precision == "bfloat16":
            raise Scarce(
                f"{name}.precision: a GPU here does not compute in bfloat16",
                f"set {name}.precision=float32",
            )


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _writable(store: Path) -> None:
    if not (_existing(store).is_dir() and os.access(_existing(store), os.W_OK)):
        raise Scarce(f"--store {store} cannot be written to", "choose another --store")


def _disk(name: str, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(_existing(folder)).free
    if needed > free:
        raise Scarce(
            f"{name} {folder}: about {format_bytes(needed)} are needed and {format_bytes(free)} "
            "are free",
            "make room, or choose another place",
        )
