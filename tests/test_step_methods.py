"""Every method through the streamed step equals its own terms on one block of everything."""

from __future__ import annotations

from dataclasses import replace
from shutil import which
from typing import Any

import pytest
import torch
from harness_setup import (
    batch_of,
    examples,
    float64,
    float64_side,
    gradients,
    llama_side,
    make_step,
)
from torch import Tensor

from ctdbench.distill.batches import Batch, SideBatch
from ctdbench.distill.blocks import all_rows, pairs_per_document
from ctdbench.distill.step import Step
from ctdbench.distill.view import bare_rows
from ctdbench.method import Block, Rows, bare, cross_entropy, total_loss

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("gold", {}),
    ("simct", {}),
    ("simct", {"segmentation": "code"}),
    ("strict", {}),
    ("h-kl", {}),
    ("p-kl", {"vocab_topk": 100}),
    ("p-kl", {"vocab_topk": 100, "projection": "learned"}),
    ("bpm", {}),
    ("escd", {}),
    ("alm", {}),
    ("alm", {"hidden_weight": 1.0}),
    ("dskd", {}),
    ("mined", {}),
]
IDS = ["-".join([name, *map(str, options.values())]) for name, options in METHODS]
every_method = pytest.mark.parametrize(("name", "options"), METHODS, ids=IDS)


def whole(side: SideBatch, chunks: int, states: Tensor, logits: Tensor, model: Any) -> Rows:
    (block,) = all_rows(side, chunks, 10**9)
    rows = bare_rows(side, block.student, block)
    embedding, head = (
        module.weight.detach()
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    return replace(rows, logits=logits, hidden=states, embedding=embedding, head=head)


def plain_loss(step: Step, batch: Batch) -> Tensor:
    """The method's own terms on all rows at once, with full logits and one graph."""
    chunks = int(batch.document_chunks.sum())
    hidden = step.network(batch.student.ids, batch.student.mask)[batch.student.position]
    student = whole(batch.student, chunks, hidden, step.network.logits(hidden), step.network.model)
    assert step.teacher is not None
    states = step.teacher.hidden(batch.teacher)[batch.teacher.position]
    logits = step.teacher.logits(states)
    teacher = whole(batch.teacher, chunks, states, logits, step.teacher.side.model)
    method, tables = step.method, step.tables
    prepared = method.prepare(teacher) if method.needs.prepare else None
    own = method.needs.pairing == "own"
    pairs = method.pairs(bare(student), bare(teacher), tables) if own else None
    counted = batch.document_chunks if pairs is None else pairs_per_document(batch, pairs)
    block = Block(student, teacher, chunks, counted, pairs, None, tables, prepared)
    terms = step.method.terms(block, dict(step.network.extra.items()))
    return total_loss(step.method, cross_entropy(student), terms)


@every_method
def test_streamed_equals_the_terms_on_everything(name: str, options: dict[str, Any]) -> None:
    student, teacher = float64_side("student"), float64_side("teacher")
    with float64():
        for block_rows in (8, 60, 10_000):
            step = make_step(name, options, student=student, teacher=teacher, block_rows=block_rows)
            batch = batch_of(examples(student, teacher))
            loss = plain_loss(step, batch)
            named = dict(step.network.named_parameters())
            expected = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            report, found = gradients(step, [batch])
            assert report.loss == pytest.approx(float(loss.detach()), rel=1e-5)
            for key, gradient in zip(named, expected, strict=True):
                if gradient is not None:
                    torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-7)


@every_method
def test_accumulation_leaves_the_gradient_unchanged(name: str, options: dict[str, Any]) -> None:
    student, teacher = float64_side("student"), float64_side("teacher")
    with float64():
        step = make_step(name, options, student=student, teacher=teacher)
        found = examples(student, teacher)
        report, once = gradients(step, [batch_of(found)])
        split, parts = gradients(step, [batch_of(found[i : i + 2]) for i in range(0, 8, 2)])
    assert split.loss == pytest.approx(report.loss, rel=1e-6)
    for key, gradient in once.items():
        torch.testing.assert_close(parts[key], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@pytest.mark.skipif(not (which("c++") or which("g++")), reason="there is no C++ compiler")
@pytest.mark.parametrize("name", ["p-kl", "simct", "bld"])
def test_compiled_terms_are_those_that_are_not(name: str) -> None:
    """p-kl and simct compile; of bld the compiler takes a part."""
    options = {"p-kl": {"vocab_topk": 100}, "bld": {"bytes": "mixed"}}.get(name, {})
    batches = [batch_of(examples(llama_side("student"), llama_side("teacher")))]
    found = []
    for compiled in (False, True):
        sides = {side: llama_side(side) for side in ("student", "teacher")}
        step = make_step(name, options, **sides, block_rows=48, compiled=compiled)
        found.append(gradients(step, batches))
    (plain, expected), (report, made) = found
    assert report.loss == pytest.approx(plain.loss, rel=1e-5)
    for key, value in made.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-6, msg=key)
    torch._dynamo.reset()
