"""`ByteTrie` against plain scans of the vocabulary; exact matches; speed at 262k tokens."""

from __future__ import annotations

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from wheel_tokenizers import wheel_token_bytes

from ctdbench.text.vocabulary import ByteTrie, exact_matches

# few letters, so that tokens share prefixes and repeat; bytes above 127 sort as unsigned
pieces = st.lists(st.sampled_from([b"a", b"b", b"\x00", b"\xff"]), max_size=5).map(b"".join)
vocabularies = st.lists(pieces, max_size=30)


@settings(max_examples=100, deadline=None)
@given(vocabularies, pieces)
def test_every_prefix_is_an_interval(vocabulary: list[bytes], prefix: bytes) -> None:
    trie = ByteTrie(vocabulary)
    low, high = trie.interval(prefix)
    starting = [i for i, piece in enumerate(vocabulary) if piece and piece.startswith(prefix)]
    assert sorted(trie.order[low:high].tolist()) == starting
    node = trie.node(prefix)
    assert (node >= 0) == (bool(starting) or prefix == b"")
    if node >= 0:
        equal = [i for i, piece in enumerate(vocabulary) if piece and piece == prefix]
        assert trie.order[trie.low[node] : trie.exact[node]].tolist() == equal
        assert trie.depth[node] == len(prefix)
        following = {vocabulary[i][len(prefix)] for i in starting if vocabulary[i] != prefix}
        children = np.arange(trie.first_child[node], trie.first_child[node + 1])
        assert trie.byte[children].tolist() == sorted(following)
        assert (trie.parent[children] == node).all()
        assert [trie.node(prefix + bytes([byte])) for byte in trie.byte[children]] == [*children]


@settings(max_examples=50, deadline=None)
@given(vocabularies)
def test_a_token_is_a_path_of_nodes(vocabulary: list[bytes]) -> None:
    trie = ByteTrie(vocabulary)
    assert trie.size == len(vocabulary)
    for token, piece in enumerate(vocabulary):
        path = trie.path[trie.path_start[token] : trie.path_start[token + 1]]
        assert path.tolist() == [trie.node(piece[: k + 1]) for k in range(len(piece))]
        assert bytes(trie.byte[path].tolist()) == piece


@settings(max_examples=50, deadline=None)
@given(vocabularies, vocabularies)
def test_exact_matches_are_one_to_one_by_lowest_id(
    student: list[bytes], teacher: list[bytes]
) -> None:
    common = (set(student) & set(teacher)) - {b""}
    expected = sorted([student.index(piece), teacher.index(piece)] for piece in common)
    assert exact_matches(student, teacher).tolist() == expected


def test_a_byte_token_gives_way_to_a_piece_of_the_same_byte() -> None:
    """As in Mistral's vocabulary: the byte tokens come first, and the tokenizer never uses them
    for what it has a piece for."""
    byte_tokens = [bytes([value]) for value in range(256)]
    student = [b"", *byte_tokens, b"the", b"7", b"a"]
    teacher = [b"a", b"7", b"\x07", b"the", b"7"]
    assert exact_matches(student, teacher).tolist() == [[8, 2], [257, 3], [258, 1], [259, 0]]
    assert exact_matches(teacher, student).tolist() == [[0, 259], [1, 258], [2, 8], [3, 257]]


def test_a_match_is_a_token_that_the_tokenizer_emits() -> None:
    tokens = wheel_token_bytes("mistral")
    letters = [bytes([value]) for value in range(33, 127)]
    matched = exact_matches(letters, tokens.vocabulary)
    assert len(matched) == len(letters)
    emitted = set(tokens.encode(" ".join(f"x{chr(letter[0])}x" for letter in letters)).ids)
    emitted |= set(tokens.encode("\n".join(letter.decode() for letter in letters)).ids)
    assert set(matched[:, 1].tolist()) <= emitted


def test_a_large_vocabulary_takes_seconds_at_most() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(0, 13, 262_144)
    letters = generator.integers(97, 123, (262_144, 13), np.uint8)
    vocabulary = [row[:k].tobytes() for row, k in zip(letters, lengths, strict=True)]
    vocabulary += [b" " * k for k in range(1, 300)]
    start = time.process_time()
    trie = ByteTrie(vocabulary)
    assert time.process_time() - start < 10
    assert trie.node(b" " * 299) >= 0
