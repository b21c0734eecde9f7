"""A space that one side's SentencePiece puts before a text: which chunks are compared by token."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import pytest
import torch
from harness_setup import batch_of, gradients, make_step
from tiny_models import tiny_model
from torch import nn
from wheel_tokenizers import wheel_tokenizer

from ctdbench.distill.corpus import Document, Segment
from ctdbench.distill.examples import Example, build_examples
from ctdbench.distill.models import Side
from ctdbench.distill.step import Step
from ctdbench.method import Block, Method, MethodOptions, Needs, Rows, Term, create

TEXTS = ("Start with seven apples.", "我们应选择", "\nTwo lines", "The fox", " spaced")
BY_TOKEN = ("gold", "strict", "simct", "p-kl", "h-kl", "bpm", "escd", "kd")
BY_SIDE = ("alm", "bld", "uld", "sft", "dskd", "mined")


@lru_cache
def side(name: str, role: str = "student") -> Side:
    """A model of its own in each role: a teacher's is frozen."""
    tokenizer = wheel_tokenizer(name)
    return Side.of(tiny_model(tokenizer).eval(), tokenizer)


def found_in(*texts: str, complete: bool = True) -> list[Example]:
    documents = [Document((Segment(text),), complete) for text in texts]
    found, skipped = build_examples(documents, side("mistral"), side("smollm2", "teacher"))
    assert not skipped
    return found


def step_of(method: Method) -> Step:
    return make_step(
        method,
        student=side("mistral"),
        teacher=side("smollm2", "teacher"),
        balancing="fixed",
        block_rows=8,
    )


class Recorder(Method):
    """Keeps what every chunk of its blocks spells, on both sides."""

    def __init__(self, needs: Needs) -> None:
        super().__init__(MethodOptions(ce_weight=0.0))
        self.asked = needs
        self.spelled: list[tuple[bytes, bytes]] = []
        self.document_chunks: list[int] = []

    @property
    def needs(self) -> Needs:
        return self.asked

    def terms(self, block: Block, modules: Mapping[str, nn.Module]) -> dict[str, Term]:
        pair, count = block.pair, torch.tensor(block.chunks)
        for chunk in range(block.chunks):
            own = spelled(block.student, chunk, pair.student_vocabulary)
            self.spelled.append((own, spelled(block.taught(), chunk, pair.teacher_vocabulary)))
        self.document_chunks = block.document_chunks.tolist()
        return {"all": Term(block.student.scores().sum() * 0, count)}

    def counts(self, block: Block) -> Mapping[str, torch.Tensor]:
        return {"all": torch.tensor(block.chunks)}


def spelled(rows: Rows, chunk: int, vocabulary: object) -> bytes:
    return b"".join(vocabulary[token] for token in rows.token[rows.chunk == chunk].tolist())  # type: ignore[index]


@pytest.mark.parametrize("whole_documents", [False, True])
def test_both_sides_of_every_chunk_spell_the_same_bytes(whole_documents: bool) -> None:
    found = found_in(*TEXTS)
    method = Recorder(Needs(whole_documents=whole_documents))
    step_of(method).gradients([batch_of(found)])
    assert all(own == taught for own, taught in method.spelled)
    chunks = [example.chunks for example in found]
    assert method.document_chunks == [count - 1 for count in chunks]  # each one's first
    assert len(method.spelled) == sum(chunks) - len(chunks)
    assert (b" with", b" with") in method.spelled


def test_without_a_prefix_every_chunk_stays() -> None:
    documents = [Document((Segment(text),)) for text in TEXTS]
    found, _ = build_examples(documents, side("smollm2"), side("llama3", "teacher"))
    method = Recorder(Needs())
    make_step(method, student=side("smollm2"), teacher=side("llama3", "teacher")).gradients(
        [batch_of(found)]
    )
    assert method.document_chunks == [example.chunks for example in found]


@pytest.mark.parametrize("name", ["gold", "strict", "simct", "p-kl", "h-kl"])
def test_a_token_is_not_held_against_itself_without_the_space(name: str) -> None:
    """The text's only token is " Start" on one side and "Start" on the other: nothing to learn."""
    found = found_in("Start", complete=False)
    assert [example.chunks for example in found] == [1]
    report, grads = gradients(step_of(create(name, {"ce_weight": 0.0})), [batch_of(found)])
    assert report.loss == 0
    assert all(not gradient.any() for gradient in grads.values())


@pytest.mark.parametrize("name", BY_TOKEN)
def test_methods_that_compare_tokens_get_such_chunks_alone(name: str) -> None:
    assert create(name).needs.same_bytes


@pytest.mark.parametrize("name", BY_SIDE)
def test_methods_that_read_each_side_by_itself_get_all_chunks(name: str) -> None:
    assert not create(name).needs.same_bytes


def test_mined_does_not_pair_the_row_before_the_space() -> None:
    step = step_of(create("mined"))
    (view,) = step._views(batch_of(found_in("Start with seven apples.")), idle=False)
    student, teacher = view.bare(), view._bare_teacher()
    named = step.method.pairs(student, teacher, step.tables)
    assert [0, 0] in named.tolist()
    assert student.byte_start[0] == teacher.byte_start[0] == 0
    kept = torch.cat(
        [torch.stack([b.student, b.teacher], 1) for b in view.blocks if len(b.teacher)]
    )
    assert kept.tolist() == [pair for pair in named.tolist() if pair != [0, 0]]
