"""The projection W: the authors' numbers, its rule entry by entry, and cuts without a tokenizer."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from golden_rows import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from ctdbench.method import PairTables
from ctdbench.text.projection import (
    Encoder,
    Projection,
    build_projection,
    common_pairs,
    coverage,
    cut_tokens,
    encoder,
    longest_matches,
)
from ctdbench.text.token_bytes import TokenBytes
from ctdbench.text.vocabulary import ByteTrie

GOLDEN = golden("xtoken_projection")
SPECIAL = re.compile(r"<\|.*\|>|<eos>")
OTHER = {"student": "teacher", "teacher": "student"}


def golden_vocabulary(side: dict[str, Any]) -> list[bytes]:
    return [b"" if SPECIAL.fullmatch(text) else text.encode() for text in side["decoded"]]


def golden_encoder(side: dict[str, Any], name: str) -> Encoder:
    """The given encodings of this side's tokens by the other one."""
    encodings = dict(zip(side["decoded"], side[f"encoded_by_{OTHER[name]}"], strict=True))
    return lambda texts: [encodings.get(text, []) for text in texts]


def golden_tokenizer(side: dict[str, Any]) -> TokenBytes:
    """BPE of these pieces and merges, on the byte alphabet or with byte fallback."""
    fallback = side["kind"] == "metaspace"
    vocabulary = {piece: index for index, piece in enumerate(side["pieces"])}
    merges = [tuple(pair) for pair in side["merges"]]
    tokenizer = Tokenizer(BPE(vocabulary, merges, byte_fallback=fallback))
    if fallback:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(side["special"])
    return TokenBytes(tokenizer)


def golden_exact(inputs: dict[str, Any], rule: str) -> np.ndarray | None:
    """Pairs of equal piece strings, specials among them; None: equal bytes."""
    if rule == "canonical":
        return None
    ids = {piece: index for index, piece in enumerate(inputs["teacher"]["pieces"])}
    own = enumerate(inputs["student"]["pieces"])
    pairs = [(index, ids[piece]) for index, piece in own if piece in ids and rule == "raw"]
    return np.array(pairs, np.int64).reshape(-1, 2)


def golden_settings(inputs: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    return {
        "exact": golden_exact(inputs, options["exact"]),
        "reverse_pass": options["reverse_pass"],
        "tokens_to_cut": options["tokens_to_cut"],
        "top_k": min(options["top_k"], options["prep_top_k"]),
    }


def rows_of(projection: Projection) -> list[dict[int, float]]:
    return [
        {int(t): float(w) for t, w in zip(ids, weights, strict=True) if t >= 0}
        for ids, weights in zip(projection.indices, projection.weights, strict=True)
    ]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_projection_reproduces_the_authors_numbers(case: dict[str, Any]) -> None:
    inputs, expected = GOLDEN["inputs"][case["input"]], case["expected"]
    options = golden_settings(inputs, case["options"])
    words = [golden_vocabulary(inputs[side]) for side in OTHER]
    given_ids = [golden_encoder(inputs[side], side) for side in OTHER]
    tokenizers = [golden_tokenizer(inputs[side]) for side in OTHER]
    assert [tokenizer.vocabulary for tokenizer in tokenizers] == words
    for own, taught in (given_ids[::-1], map(encoder, tokenizers)):
        found = build_projection(*words, encode_student=own, encode_teacher=taught, **options)
        for row, wanted in zip(rows_of(found), expected["rows"], strict=True):
            assert row == pytest.approx(dict(wanted), rel=1e-5)
        assert (np.diff(found.weights, axis=1) <= 0).all()
        for partition in ("strict", "relaxed"):
            pairs = common_pairs(found, partition).tolist()
            assert pairs == expected[f"partition_{partition}"]


def slow_cut(token: bytes, other: Sequence[bytes], count: int) -> list[int]:
    """Greedy longest match, the lowest id of equal tokens."""
    cut: list[int] = []
    while token and len(cut) < count:
        fitting = [index for index, word in enumerate(other) if word and token.startswith(word)]
        if not fitting:
            return []
        cut.append(max(fitting, key=lambda index: (len(other[index]), -index)))
        token = token[len(other[cut[-1]]) :]
    return cut


def slow_projection(
    student: Sequence[bytes], teacher: Sequence[bytes], cuts: list[list[list[int]]], top_k: int
) -> list[dict[int, float]]:
    """The rule, one entry after the other; `cuts` of the student's and the teacher's tokens."""
    counts: dict[tuple[int, int], float] = defaultdict(float)
    for side, tokens in enumerate(cuts):
        for token, cut in enumerate(tokens):
            weights = [0.9 * 0.1**place for place in range(len(cut))]
            for piece, weight in zip(cut, weights, strict=True):
                cell = (token, piece) if side == 0 else (piece, token)
                counts[cell] += weight / sum(weights)
    rows = []
    for index, word in enumerate(student):
        row = {t: weight for (s, t), weight in counts.items() if s == index}
        if word and word in teacher:
            row = {teacher.index(word): 1.0}
        kept = sorted(row, key=lambda t: (-round(row[t], 9), t))[:top_k]
        rows.append({t: row[t] / sum(row[k] for k in kept) for t in kept})
    return rows


words = st.lists(st.binary(max_size=4).map(lambda b: bytes(v % 3 + 97 for v in b)), max_size=9)


@settings(max_examples=30, deadline=None)
@given(student=words, teacher=words, cut=st.integers(1, 4), top_k=st.integers(1, 4))
def test_projection_is_its_rule(
    student: list[bytes], teacher: list[bytes], cut: int, top_k: int
) -> None:
    cuts = [
        [slow_cut(word, other, cut) for word in own]
        for own, other in ((student, teacher), (teacher, student))
    ]
    expected = slow_projection(student, teacher, cuts, top_k)
    found = build_projection(student, teacher, tokens_to_cut=cut, top_k=top_k)
    for row, wanted in zip(rows_of(found), expected, strict=True):
        assert sorted(row.values()) == pytest.approx(sorted(wanted.values()), rel=1e-5)
        if len(set(wanted.values())) == len(wanted) < top_k:  # no ties, nothing cut off
            assert row == pytest.approx(wanted, rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(texts=words, vocabulary=words, count=st.integers(1, 4))
def test_longest_matches_are_greedy(
    texts: list[bytes], vocabulary: list[bytes], count: int
) -> None:
    found = longest_matches(texts, ByteTrie(vocabulary), count)
    for row, text in zip(found.tolist(), texts, strict=True):
        assert [token for token in row if token >= 0] == slow_cut(text, vocabulary, count)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([0.1, 0.25, 0.5, 0.6, 0.75, 1.0]), max_size=2), min_size=1
    ),
    seed=st.integers(0, 9),
)
def test_partitions_are_their_rule(rows: list[list[float]], seed: int) -> None:
    """An exact 0.6 counts (in float32 it is above 0.6); ties go to the lower id."""
    draw = np.random.default_rng(seed)
    indices = np.full((len(rows), 2), -1)
    weights = np.zeros((len(rows), 2), np.float32)
    for index, row in enumerate(rows):
        indices[index, : len(row)] = draw.permutation(4)[: len(row)]
        weights[index, : len(row)] = sorted(row, reverse=True)
    for partition in ("strict", "relaxed"):
        best: dict[int, tuple[float, int]] = {}
        for index, row in enumerate(rows):
            fits = row == [1.0] if partition == "strict" else bool(row) and max(row) >= 0.6
            if fits:
                claim = (-max(row), index)
                teacher = int(indices[index, 0])
                best[teacher] = min(best.get(teacher, claim), claim)
        expected = sorted((index, teacher) for teacher, (_, index) in best.items())
        found = common_pairs(Projection(indices, weights), partition)
        assert [tuple(pair) for pair in found.tolist()] == expected


def test_a_dummy_space_in_front_is_no_part_of_the_cut() -> None:
    """SentencePiece: "ab" becomes " a", "b"; behind a newline it is "a", "b"."""
    other = [b" ", b"\n", b"a", b"b", b" a"]

    def encode(texts: list[str]) -> list[list[int]]:
        lines = [(" " + text).partition("\n") for text in texts]
        parts = [[part.encode() for part in line if part] for line in lines]
        return [[i for part in line for i in slow_cut(part, other, 9)] for line in parts]

    assert encode(["ab", "\nab"]) == [[4, 3], [0, 1, 2, 3]]
    cuts = cut_tokens([b"ab", b"", b" ab", b"b", b"\n"], other, encode, 2)
    assert cuts.tolist() == [[2, 3], [-1, -1], [4, 3], [3, -1], [1, -1]]


def test_what_a_tokenizer_cannot_spell_is_cut_greedily() -> None:
    """A piece of a character, and text that a normaliser changes; a special in a cut voids it."""
    other = [b"\xe6", b"\x97", b"e", b"\xcc\x81", b"", "é".encode(), b"x"]
    texts = {"e\u0301": [5], "x": [4, 6]}
    cuts = cut_tokens(
        [b"\xe6\x97", b"e\xcc\x81", b"x"], other, lambda t: [texts.get(k, []) for k in t], 3
    )
    assert cuts.tolist() == [[0, 1, -1], [2, 3, -1], [-1, -1, -1]]


def test_specials_of_one_role_are_one_hot_and_the_others_empty() -> None:
    found = build_projection([b"", b"ab", b""], [b"a", b"", b"b"], special_pairs=[(2, 1), (2, 0)])
    assert rows_of(found) == [{}, pytest.approx({0: 0.909090, 2: 0.090909}, rel=1e-4), {1: 1.0}]


def test_coverage_is_the_mass_of_the_columns_with_an_entry() -> None:
    found = build_projection([b"ab", b"a"], [b"a", b"b", b"c", b""])
    assert coverage(found, np.array([4, 3, 2, 1])) == (2, 0.5, 0.7)


def test_tables_build_the_projection_when_it_is_first_asked_for() -> None:
    calls = []

    def build() -> Projection:
        calls.append(1)
        return build_projection([b"a", b"ab"], [b"b", b"a"])

    tables = PairTables.build([b"a", b"ab"], [b"b", b"a"], projection=build)
    assert not calls
    assert tables.strict_pairs.tolist() == [[0, 1]]
    assert tables.relaxed_pairs.tolist() == [[0, 1]]
    plain = PairTables.build([b"a", b"ab"], [b"b", b"a"])
    for first, second in zip(tables.projected, plain.projected, strict=True):
        assert first.tolist() == second.tolist()
    assert len(calls) == 1
