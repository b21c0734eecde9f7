"""Chunks: reference cases of TRL and tokenkit, and what must hold for any two tokenizations."""

from __future__ import annotations

import json
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctdbench.text.alignment import align

GOLDEN = json.loads((Path(__file__).parent / "golden" / "alignment.json").read_text("utf-8"))
ENDS = st.lists(st.integers(1, 60), unique=True, max_size=40).map(sorted)


def token_ends(side: dict) -> tuple[list[int], int]:
    """Ends of a golden side, and how many zero-width tokens (a lone prefix) come before them."""
    ends = [end for _, end in side["byte_offsets"]]
    zero = sum(end == 0 for end in ends)
    return ends[zero:], zero


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_reference_cases(case: dict) -> None:
    (student, student_zero), (teacher, teacher_zero) = (
        token_ends(case[side]) for side in ("student", "teacher")
    )
    alignment = align(student, teacher)
    assert alignment.chunks == len(case["chunks"])
    # A lone prefix token belongs to the first chunk.
    assert [0] * student_zero + alignment.student_chunk.tolist() == case["student_token_chunk"]
    assert [0] * teacher_zero + alignment.teacher_chunk.tolist() == case["teacher_token_chunk"]


def test_golden_has_all_cases() -> None:
    assert len(GOLDEN["cases"]) == 68


def obvious_chunks(own: list[int], other: list[int]) -> tuple[list[int], int]:
    """Restatement: cut where both have an end; a token lies in the cell that contains its end."""
    cuts = sorted(set(own) & set(other))
    cells = [-1 if not cuts or end > cuts[-1] else sum(cut < end for cut in cuts) for end in own]
    return cells, len(cuts)


@given(ENDS, ENDS)
def test_equals_set_intersection(student: list[int], teacher: list[int]) -> None:
    alignment = align(np.array(student, np.int64), np.array(teacher, np.int64))
    expected_student, chunks = obvious_chunks(student, teacher)
    expected_teacher, _ = obvious_chunks(teacher, student)
    assert alignment.chunks == chunks
    assert alignment.student_chunk.tolist() == expected_student
    assert alignment.teacher_chunk.tolist() == expected_teacher
    assert alignment.student_chunk.dtype == alignment.teacher_chunk.dtype == np.int64


@given(ENDS, ENDS)
def test_transposes(first: list[int], second: list[int]) -> None:
    forward, backward = align(first, second), align(second, first)
    assert forward.chunks == backward.chunks
    np.testing.assert_array_equal(forward.student_chunk, backward.teacher_chunk)
    np.testing.assert_array_equal(forward.teacher_chunk, backward.student_chunk)


@given(ENDS)
def test_a_tokenization_aligns_one_to_one_with_itself(ends: list[int]) -> None:
    alignment = align(ends, ends)
    assert alignment.student_chunk.tolist() == list(range(len(ends)))
    assert alignment.teacher_chunk.tolist() == list(range(len(ends)))


@given(ENDS.filter(bool), ENDS)
def test_no_chunk_can_be_split(student: list[int], teacher: list[int]) -> None:
    """The finest partition: no inner offset of a chunk is an end on both sides."""
    alignment = align(student, teacher)
    bounds = [0] + [
        max(end for end, chunk in zip(student, alignment.student_chunk, strict=True) if chunk == c)
        for c in range(alignment.chunks)
    ]
    for low, high in pairwise(bounds):
        assert high in set(student) & set(teacher)
        assert not {cut for cut in set(student) & set(teacher) if low < cut < high}


def test_tail_of_one_side_is_in_no_chunk() -> None:
    alignment = align([2, 5, 7, 9], [5, 8])
    assert alignment.student_chunk.tolist() == [0, 0, -1, -1]
    assert alignment.teacher_chunk.tolist() == [0, -1]
    assert alignment.chunks == 1


@pytest.mark.parametrize("bad", [[0, 3], [3, 3], [4, 2], [1.0, 2.0], [[1, 2]]])
def test_refuses_what_are_no_token_ends(bad: list) -> None:
    with pytest.raises(ValueError, match="teacher_end must be"):
        align([1, 2], bad)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_long_documents_agree_with_numpy(seed: int) -> None:
    """Same partition as numpy's own intersection on a megabyte of text."""
    random = np.random.default_rng(seed)
    student, teacher = (np.cumsum(random.integers(1, 9, 200_000)) for _ in range(2))
    alignment = align(student, teacher)
    cuts = np.intersect1d(student, teacher)
    inside = student <= cuts[-1]
    np.testing.assert_array_equal(
        alignment.student_chunk, np.where(inside, np.searchsorted(cuts, student), -1)
    )
    assert alignment.chunks == len(cuts)


def test_memory_grows_with_the_text_alone() -> None:
    """Eight times the text takes eight times the memory, whatever the tokens."""
    peaks = []
    for size in (10**5, 8 * 10**5):
        ends = np.arange(4, size + 1, 4), np.arange(5, size + 1, 5)
        tracemalloc.start()
        align(*ends)
        peaks.append(tracemalloc.get_traced_memory()[1] / size)
        tracemalloc.stop()
    assert peaks[1] < 1.05 * peaks[0] < 30
