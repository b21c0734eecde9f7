"""Documents laid over each other on all sides, many at once, as flat arrays.

The documents stand in a row over joined bytes, each followed by one more place: the slot of its end
tokens, which are so paired like any others. No chunk spans two documents, since the last token of a
document ends where it ends on every side. Nothing here loops over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctdbench.distill.corpus import Document
from ctdbench.distill.rendering import (
    BoolArray,
    IntArray,
    Renderer,
    Spelled,
    Template,
    TokenColumns,
    starts,
    supervised_spans,
)
from ctdbench.text.alignment import align
from ctdbench.text.token_bytes import Refusal


@dataclass(frozen=True, eq=False)
class SideColumns:
    """One side: its tokens, n in all. supervised [n]: text tokens that lie within supervised bytes,
    and end tokens after supervised text."""

    tokens: TokenColumns
    supervised: BoolArray


@dataclass(frozen=True, eq=False)
class PairColumns:
    """The student's chunks with one teacher, numbered within each document.

    student [n], teacher [m]: the chunk of every token, -1 for none. chunks [D]: their number.
    """

    student: IntArray
    teacher: IntArray
    chunks: IntArray


@dataclass(frozen=True, eq=False)
class Encoded:
    """D documents; place [D]: of each among those given, which not all sides may have spelled.

    sides: the student and every teacher. pairs: the student with each of them.
    """

    place: IntArray
    sides: tuple[SideColumns, ...]
    pairs: tuple[PairColumns, ...]


@dataclass(frozen=True, eq=False)
class _Laid:
    """A side over the joined bytes: each document's first token [D], the document and the place
    after its last byte of every token [n], and whether it has bytes, [n]."""

    tokens: TokenColumns
    supervised: BoolArray
    first: IntArray
    document: IntArray
    stop: IntArray
    has_bytes: BoolArray


def encode(documents: Sequence[Document], renderers: Sequence[Renderer]) -> Encoded:
    """The documents on all sides; the first renderer is the student's."""
    place: list[int] = []
    spelled: list[list[Spelled]] = []
    rows = zip(*(renderer.spell(documents) for renderer in renderers), strict=True)
    for index, row in enumerate(rows):
        found = [pieces for pieces in row if not isinstance(pieces, Refusal)]
        if len(found) == len(row):
            place.append(index)
            spelled.append(found)
    kept = [documents[index] for index in place]
    sides = [
        renderer.columns(kept, [row[number] for row in spelled])
        for number, renderer in enumerate(renderers)
    ]
    return overlay(kept, sides, renderers[0].template, place)


def overlay(
    documents: Sequence[Document],
    sides: Sequence[TokenColumns],
    template: Template,
    place: Sequence[int],
) -> Encoded:
    """Documents with their tokens on every side, the student's first."""
    first, unsupervised = _unsupervised(documents, template, _sizes(sides[0]))
    student, *teachers = [_laid(tokens, first, unsupervised) for tokens in sides]
    return Encoded(
        np.array(place, dtype=np.int64),
        tuple(SideColumns(side.tokens, side.supervised) for side in (student, *teachers)),
        tuple(_pair(student, teacher) for teacher in teachers),
    )


def _sizes(tokens: TokenColumns) -> IntArray:
    """Bytes of every document, [D]."""
    last = np.cumsum(tokens.sizes) - 1
    return np.where(tokens.sizes > 0, np.append(tokens.byte_end, 0)[last], 0)


def _unsupervised(
    documents: Sequence[Document], template: Template, sizes: IntArray
) -> tuple[IntArray, IntArray]:
    """Where each document of so many bytes begins, [D]; unsupervised places before each, [N + 1].

    The slot after a document is supervised if its last byte is.
    """
    first = starts(sizes + 1)
    flags = np.ones(int(sizes.sum()) + len(sizes), dtype=bool)
    for document, begin, size in zip(documents, first.tolist(), sizes.tolist(), strict=True):
        for start, end in supervised_spans(document, template):
            flags[begin + start : begin + end + (end == size)] = False
    before = np.zeros(len(flags) + 1, dtype=np.int64)
    np.cumsum(flags, out=before[1:])
    return first, before


def _laid(tokens: TokenColumns, first: IntArray, unsupervised: IntArray) -> _Laid:
    """One side over joined bytes, where the documents begin at `first`."""
    place = np.repeat(first, tokens.sizes)
    start, stop = tokens.byte_start + place, tokens.byte_end + place
    has_bytes = stop > start
    stop[(starts(tokens.sizes) + tokens.end)[tokens.end >= 0]] += 1
    supervised = (unsupervised[stop] == unsupervised[start]) & (stop > start)
    document = np.repeat(np.arange(len(first)), tokens.sizes)
    side = _Laid(tokens, supervised, starts(tokens.sizes), document, stop, has_bytes)
    _with_prefixes(supervised, side)
    return side


def _pair(student: _Laid, teacher: _Laid) -> PairColumns:
    """The chunks of which both sides predict and supervise every token."""
    ends = (student.tokens.end >= 0) & (teacher.tokens.end >= 0)
    masks = [_chunked(side, ends) for side in (student, teacher)]
    found = align(student.stop[masks[0]], teacher.stop[masks[1]])
    own = _per_token(student, masks[0], found.student_chunk)
    taught = _per_token(teacher, masks[1], found.teacher_chunk)
    usable = np.ones(found.chunks, dtype=bool)
    for side, chunk in ((student, own), (teacher, taught)):
        usable[chunk[(chunk >= 0) & ~_learnable(side)]] = False
    document = np.zeros(found.chunks, dtype=np.int64)
    document[found.student_chunk] = student.document[masks[0]]
    counts = np.bincount(document[usable], minlength=len(ends))
    within = np.cumsum(usable) - 1 - starts(counts)[document]
    number = np.append(np.where(usable, within, -1), -1)  # the last is that of chunk -1
    return PairColumns(number[own], number[taught], counts)


def _chunked(side: _Laid, ends: BoolArray) -> BoolArray:
    """The tokens that chunks are made of: those with bytes, and the end tokens of `ends`, [D]."""
    mask = side.has_bytes.copy()
    mask[(side.first + side.tokens.end)[ends]] = True
    return mask


def _per_token(side: _Laid, mask: BoolArray, ids: IntArray) -> IntArray:
    """Chunk ids of the masked tokens -> those of all tokens, -1 for none."""
    chunk = np.full(len(mask), -1, dtype=np.int64)
    chunk[mask] = ids
    return _with_prefixes(chunk, side)


def _learnable(side: _Laid) -> BoolArray:
    """Supervised and predicted: a token at position 0 has no predictor, so without a BOS on both
    sides the first chunk goes."""
    mask = side.supervised.copy()
    mask[side.first[side.tokens.sizes > 0]] = False
    return mask


def _with_prefixes(values: NDArray[Any], side: _Laid) -> NDArray[Any]:
    """The values [n], a lone SentencePiece prefix having that of the token it stands before."""
    lone = np.flatnonzero(side.tokens.is_text & ~side.has_bytes)
    values[lone] = values[lone + 1]
    return values
