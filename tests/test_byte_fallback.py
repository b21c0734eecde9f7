"""SentencePiece's byte tokens beside pieces of the same byte: only the pieces are ever emitted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from wheel_tokenizers import NAMES, real_documents, wheel_token_bytes, wheel_tokenizer

from ctdbench.distill.transplant import transfer_sources
from ctdbench.method import PairTables, Rows, probe_gradient
from ctdbench.text.token_bytes import Encoding
from ctdbench.text.vocabulary import ByteTrie, emitted, ids_by_bytes

BYTES = [bytes([value]) for value in range(256)]
WORDS = [b"ab", b"7a", b" a"]
FALLBACK = [b"", b"", b"", *BYTES, *WORDS, b"7", b"a", b" "]  # byte tokens first, as in Mistral's
PLAIN = [b"", b"", b"", *WORDS, *BYTES[::-1]]
CERTAIN = 30.0  # the logit of what a side is certain of; the others have 0
METHODS = ["bpm", "escd", "gold", "h-kl", "p-kl", "simct", "strict", "uld"]


def certain(vocabulary: list[bytes], text: bytes) -> Rows:
    """One chunk of one token, predicted without a doubt."""
    token = torch.tensor([ids_by_bytes(vocabulary)[text]])
    logits = torch.zeros(1, len(vocabulary)).index_fill(1, token, CERTAIN)
    zero = torch.zeros(1, dtype=torch.long)
    return Rows(logits, token, zero, torch.tensor([True]), zero, zero, zero + len(text))


@pytest.mark.parametrize("text", [b"7", b" ", b"ab", b"z"])
@pytest.mark.parametrize(
    ("student", "teacher"), [(FALLBACK, PLAIN), (PLAIN, FALLBACK)], ids=["student", "teacher"]
)
@pytest.mark.parametrize("name", METHODS)
def test_who_agrees_with_the_teacher_has_no_loss(
    name: str, student: list[bytes], teacher: list[bytes], text: bytes
) -> None:
    tables = PairTables.build(
        student, teacher, [(0, 0), (1, 1)], student_special=[0, 1, 2], teacher_special=[0, 1, 2]
    )
    weight = {} if name == "uld" else {"ce_weight": 0.0}
    pairs = torch.zeros(1, 2, dtype=torch.long)
    rows = certain(student, text), certain(teacher, text)
    found, gradient = probe_gradient(name, *rows, tables, pairs=pairs, **weight)
    assert found["loss"] == pytest.approx(0, abs=1e-4)
    assert np.abs(gradient).max() < 1e-4


def test_equal_tokens_stand_emitted_first() -> None:
    trie = ByteTrie(FALLBACK)
    for text, token in ids_by_bytes(FALLBACK).items():
        low, _ = trie.interval(text)
        assert trie.order[low] == token


def test_what_is_never_emitted_has_no_bytes() -> None:
    left = emitted(FALLBACK)
    assert len(left) == len(FALLBACK)
    assert {text for text in left if text} == {text for text in FALLBACK if text}
    assert [left[3 + value] for value in b"7a z"] == [b"", b"", b"", b"z"]
    assert emitted(PLAIN) == PLAIN


@pytest.mark.parametrize("name", NAMES)
def test_a_real_tokenizer_emits_no_other_ids(name: str) -> None:
    tokens = wheel_token_bytes(name)
    left = emitted(tokens.vocabulary)
    for encoding in tokens.encode_batch(list(real_documents()[::3])):
        if isinstance(encoding, Encoding):
            assert all(left[index] or not tokens.vocabulary[index] for index in encoding.ids)


def test_a_copy_that_is_never_emitted_takes_no_probability_at_the_start() -> None:
    old, new = wheel_tokenizer("smollm2"), wheel_tokenizer("mistral")
    sources = transfer_sources(old, new)
    never, seven = new.convert_tokens_to_ids(["<0x37>", "7"])
    assert sources[never] == []
    assert sources[seven] == old.convert_tokens_to_ids(["7"])
    line_end = new.convert_tokens_to_ids("<0x0A>")  # has no piece beside it
    assert sources[line_end] == old.convert_tokens_to_ids(["Ċ"])
