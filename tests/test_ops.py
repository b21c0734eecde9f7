"""Byte masses against direct sums over the vocabulary; sorted distance; merged chunks."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctdbench import ops
from ctdbench.text.vocabulary import ByteTrie

# duplicates (ids 1, 10), specials (0, 7), a dummy-prefix token (8) and multi-byte characters
VOCABULARY = [b"", b"a", b"b", b"ab", b"abc", b"ba", b"\xc3\xa9", b"", b" ab", b" ", b"a", b"\xc3"]

pieces = st.lists(st.sampled_from([b"a", b"b", b"\xff"]), max_size=4).map(b"".join)
vocabularies = st.lists(pieces, min_size=1, max_size=20)


def random_rows(rows: int, columns: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, columns, generator=generator)).softmax(-1)


def slow_mass(vocabulary: list[bytes], row: Tensor, prefix: bytes) -> float:
    scored = zip(row.tolist(), vocabulary, strict=True)
    return float(sum(p for p, piece in scored if _starts(piece, prefix)))


def _starts(piece: bytes, prefix: bytes) -> bool:
    return piece != b"" and piece.startswith(prefix)


@settings(max_examples=60, deadline=None)
@given(vocabularies, pieces, st.integers(0, 3))
def test_masses_are_direct_sums(vocabulary: list[bytes], prefix: bytes, seed: int) -> None:
    trie, rows = ByteTrie(vocabulary), random_rows(2, len(vocabulary), seed).double()
    mass, following = ops.prefix_mass(trie, rows, prefix), ops.next_byte(trie, rows, prefix)
    low, high = trie.interval(prefix)
    sums = ops.sorted_masses(trie, rows)
    assert sums.shape == (2, 1 + sum(piece != b"" for piece in vocabulary))
    for r, row in enumerate(rows):
        expected = slow_mass(vocabulary, row, prefix)
        assert float(mass[r]) == pytest.approx(expected, abs=1e-12)
        assert float(sums[r, high] - sums[r, low]) == pytest.approx(expected, abs=1e-12)
        longer = [slow_mass(vocabulary, row, prefix + bytes([byte])) for byte in range(256)]
        conditional = torch.tensor(longer, dtype=torch.float64) / (sum(longer) or 1.0)
        torch.testing.assert_close(following[r], conditional)


def test_masses_pass_gradients() -> None:
    trie = ByteTrie(VOCABULARY)
    rows = random_rows(2, len(VOCABULARY)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: ops.prefix_mass(trie, p, b"a"), rows)
    assert torch.autograd.gradcheck(lambda p: ops.next_byte(trie, p, b"a"), rows)


def slow_bytes(
    rows: Tensor,
    tokens: list[int],
    widths: list[int],
    documents: list[int],
    estimator: str,
    end: bool,
) -> list[list[float]]:
    """METHODS section 4, byte by byte."""
    result = []
    for r, (token, width) in enumerate(zip(tokens, widths, strict=True)):
        piece = VOCABULARY[token] if token >= 0 else b""
        for k in range(len(piece) - width, len(piece)):
            before = piece[:k]
            masses = [slow_mass(VOCABULARY, rows[r], before + bytes([b])) for b in range(256)]
            last = VOCABULARY[tokens[r - 1]] if r and tokens[r - 1] >= 0 else b""
            if estimator == "mixed" and k == 0 and last and documents[r - 1] == documents[r]:
                ended = sum(rows[r - 1, v].item() for v, w in enumerate(VOCABULARY) if w == last)
                whole = slow_mass(VOCABULARY, rows[r - 1], last)
                longer = [slow_mass(VOCABULARY, rows[r - 1], last + bytes([b])) for b in range(256)]
                row = [(g + ended * m) / whole for g, m in zip(longer, masses, strict=True)]
                result.append([*row, ended * (1 - sum(masses)) / whole])
                continue
            ending = slow_mass(VOCABULARY, rows[r], before) - sum(masses) if end and k else 0.0
            total = sum(masses) + ending
            result.append([*(m / total for m in masses), ending / total])
    return result


CASES: list[tuple[Literal["path", "mixed"], bool]] = [
    ("path", False),
    ("path", True),
    ("mixed", False),
]


TOKENS = [5, 1, 0, 6, 3, 2, 4, 10, 8, 3, -1, 9, 5]
WIDTHS = [2, 1, 0, 2, 2, 1, 3, 1, 2, 2, 0, 0, 2]  # 8 " ab" covers two bytes, 9 " " none
DOCUMENTS = [[0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3], [0] * 13]


@pytest.mark.parametrize(("estimator", "end_bin"), CASES)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_byte_distributions_are_direct_sums(
    estimator: Literal["path", "mixed"], end_bin: bool, documents: list[int]
) -> None:
    tokens, widths = TOKENS, WIDTHS
    rows = random_rows(len(tokens), len(VOCABULARY)).double()
    arguments = (torch.tensor(tokens), torch.tensor(widths), torch.tensor(documents))
    trie = ByteTrie(VOCABULARY)
    found = ops.byte_distributions(trie, rows, *arguments, estimator=estimator, end_bin=end_bin)
    expected = torch.tensor(slow_bytes(rows, tokens, widths, documents, estimator, end_bin))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.sum(1), torch.ones(sum(widths)))
    select = torch.arange(len(tokens)) % 3 == 1  # the row before still counts
    chosen = ops.byte_distributions(
        trie, rows, *arguments, select=select, estimator=estimator, end_bin=end_bin
    )
    owner = torch.repeat_interleave(arguments[1])
    torch.testing.assert_close(chosen, found[select[owner]])


def test_no_rows_give_no_bytes() -> None:
    none = torch.zeros(0, dtype=torch.long)
    rows = torch.zeros(0, len(VOCABULARY))
    for estimator in ("path", "mixed"):
        found = ops.byte_distributions(
            ByteTrie(VOCABULARY), rows, none, none, none, estimator=estimator
        )
        assert found.shape == (0, 257)


@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_end_bin_telescopes_to_the_token_log_likelihood(scale: float) -> None:
    """All bytes and the end: log p(token) without the specials, ids of equal bytes as one."""
    tokens = torch.tensor([v for v, piece in enumerate(VOCABULARY) if piece])
    widths = torch.tensor([len(VOCABULARY[v]) for v in tokens])
    rows = random_rows(len(tokens), len(VOCABULARY), scale=scale).double()
    trie = ByteTrie(VOCABULARY)
    one = torch.zeros_like(tokens)
    found = ops.byte_distributions(trie, rows, tokens, widths, one, estimator="path", end_bin=True)
    true_bytes = torch.tensor([byte for v in tokens for byte in VOCABULARY[v]])
    realised = found.double().gather(1, true_bytes[:, None]).squeeze(1).log()
    owner = torch.repeat_interleave(widths)
    total = ops.segment_sum(realised, owner, len(tokens))
    total += ops.end_probability(trie, rows, tokens).log()
    twins = torch.tensor([[piece == VOCABULARY[v] for piece in VOCABULARY] for v in tokens])
    text = torch.tensor([piece != b"" for piece in VOCABULARY])
    expected = ((rows * twins).sum(1) / (rows * text).sum(1)).log()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


def test_tiny_masses_keep_their_digits() -> None:
    """Inside a token the model all but excludes, the next byte is still a proper ratio."""
    vocabulary = [b"x", b"ab", b"ac"]
    rows = torch.tensor([[1.0, 3e-20, 1e-20]])
    arguments = (torch.tensor([1]), torch.tensor([2]), torch.tensor([0]))
    found = ops.byte_distributions(ByteTrie(vocabulary), rows, *arguments, estimator="path")
    assert float(found[1, ord("b")]) == pytest.approx(0.75, rel=1e-6)


@pytest.mark.parametrize(("student_size", "teacher_size"), [(5, 9), (9, 5), (6, 6)])
def test_sorted_l1_and_its_gradient(student_size: int, teacher_size: int) -> None:
    student = random_rows(4, student_size).double().requires_grad_()
    teacher = random_rows(4, teacher_size, seed=1).double()
    size = max(student_size, teacher_size)
    padded = [
        torch.nn.functional.pad(rows.sort(-1, descending=True).values, (0, size - rows.shape[1]))
        for rows in (student, teacher)
    ]
    expected, found = (padded[0] - padded[1]).abs().sum(1), ops.sorted_l1(student, teacher)
    torch.testing.assert_close(found, expected)
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0])
    gradients = [torch.autograd.grad((d * weight).sum(), student)[0] for d in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # NumPy's sort, torch's
@pytest.mark.parametrize("top", [1, 4, 8, 11])
def test_sorted_l1_of_the_largest_misses_at_most_what_is_left_out(
    dtype: torch.dtype, top: int
) -> None:
    rows = random_rows(6, 11), random_rows(6, 8, seed=1)
    student, teacher = (side.to(dtype).requires_grad_() for side in rows)
    part, whole = ops.sorted_l1(student, teacher, top), ops.sorted_l1(student, teacher)
    largest = [side.topk(min(top, side.shape[1])) for side in (student, teacher)]
    left_out = sum(
        s.sum(1) - kept.values.sum(1) for s, kept in zip((student, teacher), largest, strict=True)
    )
    assert (whole - part >= -1e-6).all()
    assert (whole - part <= left_out + 1e-6).all()
    found, expected = (torch.autograd.grad(d.sum(), student)[0] for d in (part, whole))
    kept = torch.zeros_like(student).scatter(1, largest[0].indices, 1.0)
    torch.testing.assert_close(found, expected * kept)


def test_merged_chunks_follow_the_chain_rule() -> None:
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    logits[1, 2] = -40  # a realised token below the floor of 1e-8
    token = torch.tensor([0, 2, 4, 1, 3, 0, -1])
    chunk = torch.tensor([-1, 0, 0, 1, 3, 3, -1])  # chunk 2 has no rows here
    last = ops.last_rows(chunk, 4)
    assert last.tolist() == [2, 3, -1, 5]
    found = ops.merged_chunks(logits, token, chunk, last[last >= 0], 4, temperature=2.0)
    p = (logits / 2).softmax(-1)
    floor = max(float(p[1, 2]), 1e-8)
    torch.testing.assert_close(found.exp(), torch.stack([p[2] * floor, p[3], p[5] * p[4, 3]]))
    assert ops.merged_chunks(logits, token, chunk, last[:0], 4).shape == (0, 5)
