"""What a step costs, for every method: memory by the block, not by the batch; linear work.

Nothing is timed. Values and gradients of the streamed step: test_step.py, test_step_methods.py and,
for every method, the check `streaming` in test_conformance.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import pytest
import torch
from counted_allocations import Allocations
from sized_pairs import batch_of, pair_for, step_of, text_of
from torch import Tensor, nn

from ctdbench import registry
from ctdbench.distill.batches import Batch
from ctdbench.distill.step import Balance
from ctdbench.launch.check.method.pair import Pair
from ctdbench.method import Block, Method, MethodOptions, Term, create

METHODS = sorted(registry.methods())
WHOLE_DOCUMENTS = {"dskd"}  # a row attends to all rows of its document
STUDENT, TEACHER = 4096, 5120  # tokens of the vocabularies, many more than channels
BLOCK = 48
FLOAT = 4
every_method = pytest.mark.parametrize("name", METHODS)
blocks_only = pytest.mark.parametrize("name", [n for n in METHODS if n not in WHOLE_DOCUMENTS])


@dataclass(frozen=True)
class Run:
    """A step that was counted: its student rows, and what was seen."""

    rows: int
    seen: Allocations


def pair_of(method: Method) -> Pair:
    return pair_for(method, (STUDENT, TEACHER), width=8)


def documents_of(pair: Pair, documents: int, phrases: int, merge: int = 1) -> Batch:
    """Documents of 10 student tokens a phrase: all alike, so that all blocks are."""
    return batch_of([text_of(pair, 10, repeat=phrases)] * documents, pair, merge=merge)


def run(
    method: Method,
    *,
    documents: int = 4,
    phrases: int = 3,
    merge: int = 1,
    block_rows: int = BLOCK,
) -> Run:
    pair = pair_of(method)
    step = step_of(method, pair, block_rows)
    step.gradients([documents_of(pair, 1, 1)])  # tables of the pair are made when first used
    step.network.zero_grad(set_to_none=True)
    batch = documents_of(pair, documents, phrases, merge)
    with Allocations() as seen:
        step.gradients([batch])
    return Run(len(batch.student.token), seen)


@lru_cache
def counted(name: str, **load: int) -> Run:
    return run(create(name), **load)


# --- what is asserted -----------------------------------------------------------------------------


def assert_in_blocks(found: Run, rows: int) -> None:
    """No storage is larger than so many rows of the larger vocabulary, and one column more."""
    assert found.seen.largest <= rows * (TEACHER + 1), found.seen.maker


def assert_flat(few: Run, many: Run) -> None:
    """A further row takes the states that a body keeps of it, but no row of the vocabulary.

    Rows in longer documents see more of each other: a few rows of the vocabulary's are allowed.
    """
    added = max(many.rows - few.rows, BLOCK)
    assert many.seen.peak - few.seen.peak < added * FLOAT * STUDENT / 2


def assert_linear(few: Run, many: Run) -> None:
    """In the rows, whatever the documents."""
    assert many.seen.written / few.seen.written < 1.05 * max(1, many.rows / few.rows)


# --- every method ---------------------------------------------------------------------------------


def test_the_methods_of_whole_documents_are_those_that_ask_for_them() -> None:
    needs = {name: create(name).needs for name in METHODS}
    asking = {n for n, of in needs.items() if of.whole_documents or of.pairing == "documents"}
    assert asking == WHOLE_DOCUMENTS


@every_method
def test_no_tensor_of_tokens_by_vocabulary_exists(name: str) -> None:
    long = counted(name, documents=2, phrases=6)
    assert_in_blocks(long, long.rows // 2 if name in WHOLE_DOCUMENTS else BLOCK)


@every_method
def test_memory_does_not_grow_with_the_batch(name: str) -> None:
    assert_flat(counted(name), counted(name, documents=8))


@blocks_only
def test_memory_does_not_grow_with_the_document(name: str) -> None:
    assert_flat(counted(name), counted(name, documents=2, phrases=6))


@blocks_only
def test_memory_is_set_by_the_block(name: str) -> None:
    assert counted(name, block_rows=2 * BLOCK).seen.peak > 1.5 * counted(name).seen.peak


@every_method
def test_work_is_linear_in_documents(name: str) -> None:
    assert_linear(counted(name), counted(name, documents=8))


@every_method
def test_work_does_not_grow_with_the_document(name: str) -> None:
    """As many rows in half as many documents."""
    assert_linear(counted(name), counted(name, documents=2, phrases=6))


@every_method
def test_work_is_linear_in_chunks(name: str) -> None:
    """Half as many chunks of the same rows: the rows are paid for once."""
    assert counted(name).seen.written < 1.9 * counted(name, merge=2).seen.written


@pytest.mark.parametrize("balancing", get_args(Balance))
@every_method
def test_each_body_runs_once_a_micro_batch(name: str, balancing: Balance) -> None:
    method = create(name)
    pair = pair_of(method)
    step = step_of(method, pair, BLOCK, balancing)
    calls = [0, 0]

    def counting(side: int) -> Any:
        def hook(*_: Any) -> None:
            calls[side] += 1

        return hook

    hooks = [
        side.model.get_decoder().register_forward_hook(counting(index))
        for index, side in enumerate((pair.student, pair.teacher))
    ]
    step.gradients([documents_of(pair, count, 1) for count in (1, 2)])
    for hook in hooks:
        hook.remove()
    assert calls == [2, 2 * method.needs.teacher]


# --- what they would find -------------------------------------------------------------------------


class WholeBackward(torch.autograd.Function):
    """The sum, and a backward that makes a tensor of all rows of the batch."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: int) -> Tensor:
        ctx.shape, ctx.rows = logits.shape, rows
        return logits.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        whole = gradient.new_zeros(ctx.rows, ctx.shape[1])
        return whole[:1].expand(ctx.shape), None


class Careless(Method):
    """Makes a tensor of all rows in every block, or keeps the logits of all blocks."""

    def __init__(self, fault: Literal["forward", "backward", "keeping"]) -> None:
        super().__init__(MethodOptions())
        self.fault = fault
        self.kept: list[Tensor] = []

    def terms(self, block: Block, modules: Mapping[str, nn.Module]) -> dict[str, Term]:
        logits = block.student.scores()
        rows = 2 * int(block.document_chunks.sum())
        if self.fault == "backward":
            return {"sum": Term(WholeBackward.apply(logits, rows), torch.tensor(1))}
        if self.fault == "keeping":
            self.kept.append(logits.detach().clone())
        else:
            logits.new_zeros(rows, logits.shape[1])
        return {"sum": Term(logits.sum(), torch.tensor(1))}

    def counts(self, block: Block) -> dict[str, Tensor]:
        return {"sum": torch.tensor(1)}


@pytest.mark.parametrize("fault", ["forward", "backward"])
def test_a_tensor_of_all_rows_is_found(fault: Any) -> None:
    few, many = run(Careless(fault)), run(Careless(fault), documents=8)
    with pytest.raises(AssertionError, match=r"new_zeros.* -> \["):
        assert_in_blocks(many, BLOCK)
    with pytest.raises(AssertionError):
        assert_flat(few, many)
    with pytest.raises(AssertionError):
        assert_linear(few, many)


def test_memory_that_is_kept_is_found() -> None:
    few, many = run(Careless("keeping")), run(Careless("keeping"), documents=8)
    assert_in_blocks(many, BLOCK)
    assert_linear(few, many)
    with pytest.raises(AssertionError):
        assert_flat(few, many)
