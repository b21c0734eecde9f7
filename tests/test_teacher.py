"""The teacher's byte distributions over a batch, and the cache of the beam's."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_setup import batch_of, documents, examples, llama_side, teacher_of
from tiny_models import tiny_model
from tokenizers import pre_tokenizers
from wheel_tokenizers import wheel_tokenizer

from ctdbench import ops
from ctdbench.distill import teacher
from ctdbench.distill.batches import Batch
from ctdbench.distill.byte_beam import beam_distributions
from ctdbench.distill.corpus import Document, Segment
from ctdbench.distill.examples import Example, build_examples
from ctdbench.distill.models import Side
from ctdbench.distill.teacher import Teacher
from ctdbench.errors import UserError
from ctdbench.method import Needs

BEAM = Needs(teacher_logits=False, bytes="beam")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTDBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def taught() -> Teacher:
    return teacher_of(llama_side("teacher"))


def found_of(taught: Teacher, count: int) -> list[Example]:
    return examples(llama_side("student"), taught.side, count)


def distributions(taught: Teacher, batch: Batch, needs: Needs) -> torch.Tensor:
    return taught.byte_distributions(batch, taught.hidden(batch.teacher), needs)


def alone(taught: Teacher, example: Example, needs: Needs) -> torch.Tensor:
    """One document, all of its rows at once, through the model's own forward."""
    sequence = example.teacher.sequence
    with torch.no_grad():
        logits = taught.side.model(input_ids=torch.tensor(sequence.ids)[None]).logits[0, :-1]
    width = torch.tensor(sequence.byte_end - sequence.byte_start)[1:]
    return ops.byte_distributions(
        taught.trie,
        logits[:, : taught.columns].softmax(-1),
        torch.tensor(sequence.ids)[1:],
        width,
        torch.zeros_like(width),
        estimator=needs.bytes,  # type: ignore[arg-type]
        end_bin=needs.end_bin,
    )


@pytest.mark.parametrize("rows_at_a_time", [1, 7, 256])
@pytest.mark.parametrize(
    "needs", [Needs(bytes="path"), Needs(bytes="mixed"), Needs(bytes="path", end_bin=True)]
)
def test_a_batch_gives_what_its_documents_give(
    taught: Teacher, needs: Needs, rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "ROWS_AT_A_TIME", rows_at_a_time)
    found = found_of(taught, 5)
    batch = batch_of(found)
    rows = distributions(taught, batch, needs)
    assert rows.shape == (batch.size, 257)
    expected = torch.cat([alone(taught, example, needs) for example in found])
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rows.sum(1), torch.ones(len(rows)))


def test_bytes_that_nothing_predicts_have_empty_rows() -> None:
    side = llama_side("teacher")
    bare = teacher_of(replace(side, specials=replace(side.specials, bos=None)))
    (example,) = examples(llama_side("student"), bare.side, 1)
    rows = distributions(bare, batch_of([example]), Needs(bytes="mixed"))
    first = int(example.teacher.sequence.byte_end[0])
    assert not rows[:first].any()
    torch.testing.assert_close(rows[first:].sum(1), torch.ones(len(rows) - first))


def test_a_templates_last_token_is_not_made_longer() -> None:
    """The newline before an answer ends for sure: its first byte is the next row's alone."""
    side = llama_side("teacher")
    document = Document((Segment("so", "user", False), Segment("the answer", "assistant")))
    taught = teacher_of(side)
    (example,), _ = build_examples([document], llama_side("student"), side, "chat")
    newline = example.teacher.sequence.ids[example.teacher.sequence.byte_end == 2]
    assert any(side.tokens.vocabulary[index] == b"\n" for index in newline)
    batch = batch_of([example])
    mixed, path = (distributions(taught, batch, Needs(bytes=kind)) for kind in ("mixed", "path"))
    torch.testing.assert_close(mixed[2], path[2])
    assert not torch.allclose(mixed[3:], path[3:], atol=1e-3)


def test_the_beam_is_computed_once_a_document(
    taught: Teacher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = found_of(taught, 2)
    batch = batch_of(found)
    first = taught.byte_distributions(batch, None, BEAM)
    bos = [taught.side.specials.bos]
    for example, rows in zip(found, first.split([len(e.text) for e in found]), strict=True):
        (expected,) = beam_distributions(taught.side.model, taught.trie, [example.text], bos)
        torch.testing.assert_close(rows, expected)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was called again")

    monkeypatch.setattr(teacher, "beam_distributions", refuse)
    assert torch.equal(
        taught.byte_distributions(batch_of(found[::-1]), None, BEAM),
        first[
            torch.cat(
                [torch.arange(len(found[0].text), len(first)), torch.arange(len(found[0].text))]
            )
        ],
    )
    other = Teacher(taught.side, taught.trie, "float32", identity="another model")
    with pytest.raises(AssertionError, match="called again"):
        other.byte_distributions(batch, None, BEAM)
    names = [path.suffix for path in (tmp_path / "cache" / "beam").iterdir()]
    assert names == [".safetensors"] * 2


def test_the_beam_is_given_the_space_that_a_tokenizer_puts_before_a_text() -> None:
    """By hand, its first byte: of a token that begins with the space, or of one behind it alone."""
    tokenizer = wheel_tokenizer("mistral")
    side = Side.of(tiny_model(tokenizer), tokenizer)
    taught = teacher_of(side)
    batch = batch_of(examples(llama_side("student"), side, 1))
    first = taught.byte_distributions(batch, None, BEAM)[0]
    bos, space = side.specials.bos, tokenizer.convert_tokens_to_ids("▁")
    with torch.no_grad():
        logits = side.model(input_ids=torch.tensor([[bos, space]])).logits[0]
    begins, follows = logits[:, : taught.columns].softmax(-1)
    expected = torch.zeros(257)
    for token, text in enumerate(side.tokens.vocabulary):
        if len(text) > 1 and text.startswith(b" "):
            expected[text[1]] += begins[token]
        expected[text[0] if text else 256] += begins[space] * follows[token]
    torch.testing.assert_close(first, expected / expected.sum(), rtol=1e-3, atol=1e-3)  # pruned


def test_a_text_with_a_space_of_its_own_gets_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a tokenizer that puts one only before texts without."""
    tokenizer = copy.deepcopy(wheel_tokenizer("mistral"))
    backend = tokenizer.backend_tokenizer
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    taught = teacher_of(Side.of(tiny_model(tokenizer), tokenizer))
    read = []

    def beam(model: Any, trie: Any, texts: list[bytes], *_: Any, **__: Any) -> list[torch.Tensor]:
        read.extend(texts)
        return [torch.arange(len(text))[:, None] for text in texts]

    monkeypatch.setattr(teacher, "beam_distributions", beam)
    rows = taught._new_beam([b"word", b" word"])
    assert read == [b" word", b" word"]
    assert [one[:, 0].tolist() for one in rows] == [[1, 2, 3, 4], [0, 1, 2, 3, 4]]


def test_a_beam_without_bos_is_an_error_of_one_line() -> None:
    side = llama_side("teacher")
    bare = teacher_of(replace(side, specials=replace(side.specials, bos=None)))
    batch = batch_of(examples(llama_side("student"), bare.side, 1))
    with pytest.raises(UserError, match=r"method\.bytes: beam") as caught:
        bare.byte_distributions(batch, None, BEAM)
    assert "\n" not in str(caught.value)


def test_the_teacher_gets_no_gradient(taught: Teacher) -> None:
    batch = batch_of(found_of(taught, 2))
    hidden = taught.hidden(batch.teacher)
    assert not hidden.requires_grad
    assert not taught.logits(hidden[:3]).requires_grad
    assert len(documents(2)) == len(batch.texts)
