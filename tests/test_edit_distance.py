"""Edit distances, maps between vocabularies and time warping against plain loops and references."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from golden_rows import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from wheel_tokenizers import wheel_token_bytes

from ctdbench.text import edit_distance
from ctdbench.text.edit_distance import levenshtein, minimum_edit_map, time_warp

GOLDEN = golden("mined")
pieces = st.lists(st.sampled_from([b"a", b"b", b"\x00", b"\xff"]), max_size=10).map(b"".join)
vocabularies = st.lists(pieces, max_size=12)


def slow_distance(first: Sequence[Any], second: Sequence[Any]) -> int:
    above = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        row = [i]
        for j, b in enumerate(second, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
        above = row
    return above[-1]


@settings(max_examples=50, deadline=None)
@given(vocabularies, vocabularies)
def test_distances_are_their_definition(queries: list[bytes], others: list[bytes]) -> None:
    expected = [[slow_distance(query, other) for other in others] for query in queries]
    assert levenshtein(queries, others).tolist() == expected


@pytest.mark.parametrize("longest", [8, 9, 16, 17, 32, 33, 64, 65, 129, 260])
def test_tokens_may_fill_a_word_or_several(longest: int) -> None:
    """Lengths around those of the machine words; distances above 255."""
    chance = random.Random(longest)
    lengths = [longest, longest - 1, longest // 2, 1, 0]
    queries, others = (
        [bytes(chance.choices(b"abc", k=length)) for length in lengths] for _ in range(2)
    )
    others += [b"d" * longest, queries[0][3:] + b"ab", queries[0][::-1]]
    expected = [[slow_distance(query, other) for other in others] for query in queries]
    assert levenshtein(queries, others).tolist() == expected


# --- maps -----------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(vocabularies, vocabularies)
def test_a_map_is_the_lowest_of_the_nearest(queries: list[bytes], candidates: list[bytes]) -> None:
    found = minimum_edit_map(queries, candidates).tolist()
    for index, query in enumerate(queries):
        distances = [(slow_distance(query, c), k) for k, c in enumerate(candidates) if c]
        taking_part = query and distances and query not in queries[:index]
        assert found[index] == (min(distances)[1] if taking_part else -1)


def test_batches_and_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(5)
    words = [bytes(chance.choices(b"abcde", k=chance.randint(1, 9))) for _ in range(40)]
    expected = minimum_edit_map(words[:20], words[20:]).tolist()
    for bits, columns in ((1, 1), (60, 20), (1 << 14, 1 << 20)):
        monkeypatch.setattr(edit_distance, "BITS", bits)
        monkeypatch.setattr(edit_distance, "CACHED", columns)
        assert minimum_edit_map(words[:20], words[20:]).tolist() == expected


def test_specials_map_by_role_and_nothing_maps_to_them() -> None:
    queries = [b"", b"ab", b"", b"", b"c"]
    candidates = [b"", b"", b"abc", b"ab"]
    pairs = [(0, 1), (3, 0), (3, 1), (4, 0)]  # two claims to 3; 4 is no special
    assert minimum_edit_map(queries, candidates, pairs).tolist() == [1, 3, -1, 0, 2]
    assert minimum_edit_map(queries, [b"", b""], pairs).tolist() == [1, -1, -1, 0, -1]


def test_byte_tokens_give_way_to_pieces_on_both_sides() -> None:
    """SentencePiece has the byte token of "A" and the piece "A"; a text is spelled with the piece,
    so the byte token must not take its place because its id is lower."""
    every = [bytes([value]) for value in range(256)]
    pieces = [b"", *every, b"A", b"AB"]
    assert minimum_edit_map(pieces, [b"AB", b"A"])[[66, 257, 258]].tolist() == [-1, 1, 0]
    assert minimum_edit_map([b"A", b"\x80", b"AAA"], pieces).tolist() == [257, 129, 257]


@pytest.mark.parametrize("case", GOLDEN["vocabulary_mapping"])
def test_maps_reproduce_the_references(case: dict[str, Any]) -> None:
    """FuseLLM's map to the student, token by token; tokenkit's to the teacher, where several tokens
    are equally near, only in that it is one of them."""
    sides = [
        [word.replace("Ġ", " ").replace("▁", " ").encode() for word in case[f"{side}_vocab"]]
        for side in ("teacher", "student")
    ]
    names = case["student_vocab"]
    if case["direction"] == "student->teacher":
        sides, names = sides[::-1], case["teacher_vocab"]
    found = minimum_edit_map(*sides)
    distances = levenshtein(*sides)
    for query, (expected, nearest) in enumerate(zip(case["map"], found, strict=True)):
        assert names[nearest] in expected["all_minimal"]
        assert distances[query, nearest] == expected["distance"]
        if expected["unique"] or case["direction"] == "teacher->student":
            assert names[nearest] == expected["match"]


def test_real_vocabularies_map_to_the_nearest() -> None:
    """A sample of SmolLM2's tokens, its longest among them, against all of Mistral's."""
    words, others = (wheel_token_bytes(name).vocabulary for name in ("smollm2", "mistral"))
    sample = random.Random(1).sample([word for word in words if word], 200)
    sample += sorted(words, key=len)[-5:]
    found = minimum_edit_map(sample, others)
    distances = levenshtein(sample, others)
    distances[:, [not other for other in others]] = 10**6
    np.testing.assert_array_equal(
        distances[np.arange(len(sample)), found], distances.min(1), strict=True
    )
    assert slow_distance(sample[0], others[7000]) == distances[0, 7000]


# --- time warping ---------------------------------------------------------------------------------


def slow_time_warp(cost: list[list[int]]) -> list[list[int]]:
    best: dict[tuple[int, int], int] = {(-1, -1): 0}
    far = 10**9
    for i, row in enumerate(cost):
        for j, value in enumerate(row):
            ways = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
            best[i, j] = value + min(best.get(way, far) for way in ways)
    path = [[len(cost) - 1, len(cost[0]) - 1]]
    while path[-1] != [0, 0]:
        i, j = path[-1]
        ways = [[i - 1, j - 1], [i - 1, j], [i, j - 1]]
        path.append(min(ways, key=lambda way: best.get((way[0], way[1]), far)))
    return path[::-1]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 9999), st.sampled_from([1, 2, 9]))
def test_time_warping_is_its_definition(rows: int, columns: int, seed: int, largest: int) -> None:
    """Small costs, so that many paths cost the same."""
    cost = np.random.default_rng(seed).integers(0, largest, (rows, columns), endpoint=True)
    assert time_warp(cost).tolist() == slow_time_warp(cost.tolist())


@pytest.mark.parametrize("case", GOLDEN["dtw"], ids=lambda case: "-".join(case["student"]))
def test_time_warping_reproduces_the_reference(case: dict[str, Any]) -> None:
    words = (
        [word.replace("Ġ", "").replace("▁", "").encode() for word in case[side]]
        for side in ("teacher", "student")
    )
    cost = levenshtein(*words)
    path = time_warp(cost)
    assert path.tolist() == case["path"]
    assert cost[tuple(path.T)].sum() == case["cost"]
    aligned = [path[path[:, 1] == j, 0].tolist() for j in range(len(case["student"]))]
    assert aligned == case["student_to_teacher"]


def test_no_rows_have_no_path() -> None:
    assert time_warp(np.empty((0, 3), np.int64)).shape == (0, 2)
    assert time_warp(np.empty((3, 0), np.int64)).shape == (0, 2)


def test_documents_of_512_tokens_are_quick() -> None:
    """Measured 0.02 s; a loop over cells takes seconds."""
    chance = random.Random(3)
    words = [bytes(chance.choices(b"abcdefgh", k=chance.randint(1, 12))) for _ in range(300)]
    sides = [chance.choices(words, k=512) for _ in range(2)]
    begin = time.process_time()
    time_warp(levenshtein(*sides))
    assert time.process_time() - begin < 0.5
