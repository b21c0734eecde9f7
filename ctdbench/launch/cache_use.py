"""What cells put into the cache, which those with the same documents share.

The documents are those that training will draw; how many tokens they have is estimated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ctdbench.distill.corpus import Corpus, Document, load_corpus, training_order
from ctdbench.launch import devices
from ctdbench.launch.estimate import FLOAT, HALF, bytes_per_token
from ctdbench.launch.sizes import size_of
from ctdbench.spec import RunSpec, TeacherSpec

if TYPE_CHECKING:
    from ctdbench.method import Needs

PER_TOKEN = 34  # bytes of an aligned token: its id, span and chunk as int64, and two flags
Texts = dict[tuple[str, Path | None], Corpus]


@dataclass(frozen=True)
class CacheUse:
    """Bytes. examples: tokenized and aligned text, without which no cell can be trained.

    states: of the teachers; where there is no room for them, the teachers run instead.
    """

    examples: int
    states: int


def cache_use(specs: Iterable[RunSpec], texts: Texts) -> CacheUse:
    """What all of the cells together take. texts: corpora that were loaded, by name and folder."""
    examples: dict[tuple[object, ...], float] = {}
    states: defaultdict[tuple[object, ...], set[Document]] = defaultdict(set)
    widths: dict[tuple[object, ...], float] = {}
    drawn: dict[tuple[object, ...], list[Document]] = {}
    for spec in specs:
        train, needs = spec.train, _needs(spec)
        order = (train.corpus, spec.eval.data, spec.seed, train.budget, train.document_bytes)
        if order not in drawn:
            drawn[order] = _documents(spec, texts)
        text, sides = sum(d.size for d in drawn[order]), (spec.pair.student, *spec.pair.teachers)
        tokens = sum(text / bytes_per_token(side) for side in sides)
        examples[spec.pair, train.template, needs.text, order] = PER_TOKEN * tokens
        for teacher in spec.pair.teachers:
            each = _state_bytes(spec, teacher, needs)
            if train.teacher_cache is not None and 0 < each * text <= train.teacher_cache:
                key = (teacher.model, teacher.tokenizer, train.template, needs.text, each)
                states[key].update(drawn[order])
                widths[key] = each
    stored = (widths[key] * sum(d.size for d in states[key]) for key in states)
    return CacheUse(round(sum(examples.values())), round(sum(stored)))


def _documents(spec: RunSpec, texts: Texts) -> list[Document]:
    key = (spec.train.corpus, spec.eval.data)
    if key not in texts:
        texts[key] = load_corpus(*key)
    return training_order(texts[key], spec.seed, spec.train.budget, spec.train.document_bytes)


def _needs(spec: RunSpec) -> Needs:
    from ctdbench.method import create

    return create(spec.method, spec.options).needs


def _state_bytes(spec: RunSpec, teacher: TeacherSpec, needs: Needs) -> float:
    """Of a teacher's states, by byte of text; 0 where none are stored."""
    size = size_of(teacher)
    if size is None or spec.train.on_policy or not needs.teacher_states:
        return 0.0
    halved = not needs.teacher_hidden and _is_half(spec.train.precision)
    return size.width * (HALF if halved else FLOAT) / bytes_per_token(teacher)


@cache
def _is_half(precision: str) -> bool:
    """Whether training here computes in bfloat16."""
    import torch

    from ctdbench.distill.precision import resolve

    gpus = devices.gpus()
    if precision == "auto" and gpus:  # asked of the driver: a plan holds no GPU
        return all(gpu.bfloat16 for gpu in gpus)
    return resolve(precision, torch.device("cpu")) == "bfloat16"
