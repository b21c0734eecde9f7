"""What text costs: alignment, examples and byte distributions are linear in a document's length.

Nothing is timed: NumPy's and torch's memory is counted, and the bytecodes that Python runs, which
do not grow at all where nothing loops over tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pytest
import torch
from counted_allocations import Allocations, bytecodes
from harness_setup import llama_side
from sized_pairs import tokens

from ctdbench import ops
from ctdbench.distill.corpus import Document, Segment
from ctdbench.distill.examples import build_example
from ctdbench.distill.models import Side
from ctdbench.text.alignment import align
from ctdbench.text.vocabulary import ByteTrie

SENTENCE = "The fox jumps over 42 zwölf Häuschen, again and again. "
Work = Callable[[int], Callable[[], object]]


def alignment(size: int) -> Callable[[], object]:
    chance = np.random.default_rng(0)
    student, teacher = (np.cumsum(chance.integers(1, 9, 1000 * size)) for _ in range(2))
    return lambda: align(student, teacher)


@lru_cache
def sides() -> tuple[Side, Side]:
    return llama_side("student"), llama_side("teacher")


def one_document(size: int) -> Callable[[], object]:
    document = Document((Segment(40 * size * SENTENCE),))
    return lambda: build_example(document, *sides())


def byte_rows(estimator: str) -> Work:
    def work(size: int) -> Callable[[], object]:
        words = tokens(400, 0)
        trie = ByteTrie(words.vocabulary)
        token = torch.tensor(words.encode(20 * size * " tea stone heater").ids)
        rows = torch.rand(len(token), trie.size).softmax(-1)
        width, document = ops.token_lengths(trie, token), torch.zeros_like(token)
        return lambda: ops.byte_distributions(
            trie, rows, token, width, document, estimator=estimator, end_bin=estimator == "path"
        )

    return work


LONG = {
    "align": alignment,
    "build_example": one_document,
    "path": byte_rows("path"),
    "mixed": byte_rows("mixed"),
}


def looping(work: Work) -> bool:
    """Whether Python runs more for twice the size."""
    few, many = work(10), work(20)
    few()  # what is made at the first call and kept
    return bytecodes(many) > bytecodes(few) + 50


def growth(work: Work) -> float:
    """Memory and elements written for twice the size, the larger of the two multiples."""
    few, many = work(10), work(20)
    few()
    found = []
    for call in (few, many):
        with Allocations() as seen:
            call()
        found.append(seen)
    return max(found[1].peak / found[0].peak, found[1].written / max(1, found[0].written))


@pytest.mark.parametrize("name", LONG)
def test_nothing_loops_over_tokens(name: str) -> None:
    assert not looping(LONG[name])


@pytest.mark.parametrize("name", LONG)
def test_memory_and_work_are_linear(name: str) -> None:
    assert growth(LONG[name]) < 2.1


def test_examples_are_linear_in_segments() -> None:
    few, many = (
        Document(tuple(Segment(SENTENCE, "user", i % 2 == 1) for i in range(count)))
        for count in (20, 40)
    )
    counts = [bytecodes(lambda made=made: build_example(made, *sides())) for made in (few, many)]
    assert counts[1] < 2.1 * counts[0]


def test_a_loop_and_a_square_are_found() -> None:
    assert looping(lambda size: lambda: sum(end for end in range(1000 * size)))
    assert growth(lambda size: lambda: np.zeros((100 * size, 100 * size))) > 3
    assert growth(lambda size: lambda: torch.zeros(100 * size, 100 * size)) > 3
