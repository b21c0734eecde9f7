"""Two tokenizations of one text -> chunks.

A chunk is one cell of the finest partition of the bytes that both tokenizations refine: the text
is cut exactly at the byte offsets where a token ends on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Int64Array = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Alignment:
    """Which chunk each token lies in.

    student_chunk [n], teacher_chunk [m]: int64 in 0..chunks-1, non-decreasing; -1 for the tokens
    after the last common end, a tail that the two sides do not share.
    chunks: their number. Each one holds at least one token of either side.
    """

    student_chunk: Int64Array
    teacher_chunk: Int64Array
    chunks: int


def align(student_end: ArrayLike, teacher_end: ArrayLike) -> Alignment:
    """Align two tokenizations by the byte offsets at which their tokens end.

    student_end [n], teacher_end [m]: integers, positive and strictly increasing. Tokens of zero
    width (specials, a lone SentencePiece prefix) are left out by the caller. Takes time and memory
    (one byte for each of the text's) in proportion to the text.

    Raises ValueError for anything else.
    """
    student = _checked(student_end, "student_end")
    teacher = _checked(teacher_end, "teacher_end")
    last = max(int(ends[-1]) if len(ends) else 0 for ends in (student, teacher))
    sides = np.zeros(last + 1, dtype=np.uint8)  # of how many sides a token ends at each byte
    sides[student] = 1
    sides[teacher] += 1
    student_cut, teacher_cut = sides[student] == 2, sides[teacher] == 2
    chunks = int(np.count_nonzero(student_cut))
    return Alignment(_chunk_ids(student_cut, chunks), _chunk_ids(teacher_cut, chunks), chunks)


def _checked(ends: ArrayLike, name: str) -> Int64Array:
    array = np.asarray(ends)
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be a 1-D array of integers, got {array.dtype} {array.shape}")
    if array[0] <= 0 or not (array[1:] > array[:-1]).all():
        raise ValueError(f"{name} must be positive and strictly increasing (no zero-width tokens)")
    return array.astype(np.int64, copy=False)


def _chunk_ids(cut: NDArray[np.bool_], chunks: int) -> Int64Array:
    """A token's chunk is the number of cuts before its own end."""
    ids = np.zeros(len(cut), dtype=np.int64)
    np.cumsum(cut[:-1], out=ids[1:])
    ids[np.searchsorted(ids, chunks) :] = -1
    return ids
