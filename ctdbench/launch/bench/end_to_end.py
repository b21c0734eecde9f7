"""What a training step costs on a pair's own models and documents, beside a bare step.

A step is `Step.gradients` and the optimizer's, as in training. The bare step is the least that
distillation with PyTorch and transformers does: the teachers' logits without gradient, the
student's cross-entropy on its own full logits, one backward, the same optimizer. It is measured on
one padded batch, and once more on the micro-batches that training makes of it. All methods train
one student, at a rate of 0: nothing drifts while it is measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.utils import logging as hf_logging

from ctdbench.distill import references
from ctdbench.distill.batches import Batch, SideBatch, collate, micro_batches
from ctdbench.distill.corpus import Corpus, cut, load_corpus, shuffled
from ctdbench.distill.examples import Example, build_examples
from ctdbench.distill.models import Side
from ctdbench.distill.precision import autocast, resolve
from ctdbench.distill.setting import (
    Setting,
    balancing,
    build_network,
    extra_modules,
    pair_tables,
)
from ctdbench.distill.step import Step
from ctdbench.distill.teacher import Teacher
from ctdbench.distill.teacher_cache import store_states
from ctdbench.distill.view import Guide, Network
from ctdbench.errors import UserError
from ctdbench.launch.bench.costs import BARE, Candidate, Costs, machine, measure
from ctdbench.launch.bench.losses import refusal
from ctdbench.launch.cell import LoadedPair
from ctdbench.method import Method, MethodOptions, Needs, create
from ctdbench.spec import RunSpec, TrainSpec

CACHE_BYTES = 10**9  # more than a few documents take


@dataclass(frozen=True)
class Stage:
    """A loaded pair with documents of its corpus. All methods share the student's one optimizer."""

    spec: RunSpec
    student: Side
    guides: tuple[Guide, ...]
    corpus: Corpus
    examples: list[Example]
    network: Network
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator

    @property
    def device(self) -> torch.device:
        """Where all of it is."""
        return self.accelerator.device

    @property
    def precision(self) -> str:
        """Of both sides' autocast."""
        return resolve(self.spec.train.precision, self.device)

    def batches(self, size: int | None, needs: Needs) -> list[Batch]:
        """The documents as a step of training gets them; size: documents of a micro-batch."""
        sides = (self.student, *(guide.teacher.side for guide in self.guides if guide.teacher))
        pads = [side.specials.pad or 0 for side in sides]
        parts = micro_batches(self.examples, size, self.accelerator, needs)
        return [collate(part, *pads).to(self.device) for part in parts]

    def store(self) -> None:
        """Let the teachers read their states of the documents from disk."""
        for index, guide in enumerate(self.guides):
            laid = [(example, *example.others)[index] for example in self.examples]
            tokens = [example.teacher.sequence.ids for example in laid]
            if guide.teacher:
                store_states(guide.teacher, tokens, Needs(), CACHE_BYTES, self.accelerator)

    @property
    def is_stored(self) -> bool:
        """Whether `store` was called, and had room."""
        return all(guide.teacher.stored is not None for guide in self.guides if guide.teacher)

    def setting(self, method: Method) -> Setting:
        """What a run of the method trains with."""
        return _setting(self.student, self.guides, method, self.corpus)


def bench_steps(
    specs: Mapping[str, RunSpec],
    documents: int,
    repeats: int = 7,
    *,
    cached: bool = False,
    progress: bool = False,
) -> Costs:
    """Costs of the methods' steps with so many documents of the corpus a step.

    cached: the methods read the teachers' states from disk; the bare steps never do. specs: cells
    of one pair with resolved options, alike but for their methods, by what they are called. Raises
    UserError and its kin for a pair that cannot be had.
    """
    stage = set_stage(next(iter(specs.values())), documents)
    if cached:
        stage.store()
    whole, none = len(stage.examples), Needs()
    refused = {}
    candidates = [bare_step(stage, stage.batches(whole, none))]
    candidates.append(bare_step(stage, stage.batches(None, none), f"{BARE}, micro-batches"))
    for name, spec in specs.items():
        method = create(spec.method, spec.options)
        reasons = [refusal(method, guide.tables) for guide in stage.guides]
        if any(reasons):
            refused[name] = next(filter(None, reasons))
        else:
            candidates.append(method_step(stage, spec, name))
    setting = {
        "documents": documents,
        "student tokens": sum(len(example.student.chunk) for example in stage.examples),
        "teacher states": "stored" if stage.is_stored else "live",
        **machine(stage.device, stage.precision),
    }
    costs = measure(candidates, repeats, progress=progress)
    return Costs(f"training steps on {stage.spec.pair.name}", setting, costs, refused)


def set_stage(spec: RunSpec, documents: int) -> Stage:
    """The cell's pair as it starts, and its corpus's first documents, as training cuts them."""
    accelerator = Accelerator(mixed_precision="no")  # autocast is the harness's own
    hf_logging.disable_progress_bar()
    loaded = LoadedPair(spec, accelerator.device)
    student = loaded.student
    guides = tuple(_guides(spec, loaded, resolve(spec.train.precision, accelerator.device)))
    corpus = load_corpus(spec.train.corpus)
    examples = _examples(student, guides, corpus, spec.train, documents)
    none = Method(MethodOptions())  # adds no modules to the student
    network, optimizer = build_network(spec, _setting(student, guides, none, corpus))
    network.to(accelerator.device).eval()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return Stage(spec, student, guides, corpus, examples, network, optimizer, accelerator)


def bare_step(stage: Stage, batches: Sequence[Batch], name: str = BARE) -> Candidate:
    """Teachers' logits, the student's loss by transformers, a backward for every batch."""

    def step() -> None:
        for batch in batches:
            _bare_gradients(stage, batch)
        _update(stage.optimizer)

    return Candidate(name, {"step": step})


def _bare_gradients(stage: Stage, batch: Batch) -> None:
    with autocast(stage.device, stage.precision):
        for guide, laid in zip(stage.guides, (batch, *batch.others), strict=True):
            if guide.teacher:
                with torch.no_grad():
                    _run(guide.teacher.side.model, laid.teacher)
        output = _run(stage.network.model, batch.student, labels=_labels(batch.student))
    output.loss.backward()


def _run(model: Any, side: SideBatch, **given: Tensor) -> Any:
    return model(input_ids=side.ids, attention_mask=side.mask, use_cache=False, **given)


def method_step(stage: Stage, spec: RunSpec, name: str) -> Candidate:
    """A method's step, its modules trained as well."""
    method = create(spec.method, spec.options)
    extras = extra_modules(spec, stage.setting(method))
    modules = {key: extra.module for key, extra in extras.items()}
    network = Network(stage.network.model, stage.network.columns, modules).to(stage.device).eval()
    first, *others = stage.guides
    harness = Step(
        network,
        first.teacher,
        method,
        first.tables,
        accelerator=stage.accelerator,
        others=others,
        weight=first.weight,
        precision=stage.precision,
        block_rows=spec.train.block_rows,
        balancing=balancing(spec, method),
    )
    batches = stage.batches(spec.train.micro_batch, method.needs)
    optimizers = [stage.optimizer]
    if extras:
        optimizers.append(torch.optim.AdamW(network.extra.parameters(), lr=0.0))

    def step() -> None:
        harness.gradients(batches)
        _update(*optimizers)

    return Candidate(name, {"step": step})


def _guides(spec: RunSpec, loaded: LoadedPair, precision: str) -> Iterator[Guide]:
    stated = zip(spec.pair.teachers, loaded.teachers, strict=True)
    for number, (teacher, side) in enumerate(stated, 1):
        tables = pair_tables(loaded.student, side, spec.train.template)
        content = references.content(references.parse(teacher.model))
        identity = json.dumps(["bench", content, teacher.identity()])
        live = Teacher(side, tables.teacher_trie, precision, identity)
        yield Guide(live, tables, f"@{number}" if number > 1 else "", teacher.weight)


def _setting(student: Side, guides: Sequence[Guide], method: Method, corpus: Corpus) -> Setting:
    first, *others = guides
    assert first.teacher is not None
    return Setting(student, first.teacher, method, first.tables, corpus, tuple(others))


def _examples(
    student: Side, guides: Sequence[Guide], corpus: Corpus, train: TrainSpec, documents: int
) -> list[Example]:
    """Raises UserError where the corpus has too few documents that all sides can spell."""
    first, *others = (guide.teacher.side for guide in guides if guide.teacher)
    pieces = (piece for d in shuffled(corpus, 0) for piece in cut(d, train.document_bytes))
    found: list[Example] = []
    while len(found) < documents:
        more = list(islice(pieces, documents - len(found)))
        if not more:
            raise UserError(
                f"corpus {corpus.name} has {len(found)} documents for this pair",
                "ask for fewer --documents",
            )
        found += build_examples(more, student, first, train.template, others)[0]
    return found


def _labels(side: SideBatch) -> Tensor:
    """[B, L] token ids as transformers takes them: -100 where none is supervised."""
    labels = torch.full_like(side.ids, -100)
    place = side.position[side.supervised] + 1
    labels.view(-1)[place] = side.token[side.supervised]
    return labels


def _update(*optimizers: torch.optim.Optimizer) -> None:
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
