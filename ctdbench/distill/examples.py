"""A document on both sides: tokens with byte spans, chunks, and what is supervised.

Special tokens and the tokens of a chat template have no bytes, so both sides lie over the same
bytes whatever template each of them uses. A document that a tokenizer does not spell byte for byte
is refused and counted, never mis-paired.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from ctdbench.distill.corpus import SEPARATOR, Document
from ctdbench.distill.models import Side
from ctdbench.errors import UserError
from ctdbench.text.alignment import align
from ctdbench.text.token_bytes import NotLossless

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
Template = Literal["plain", "chat"]


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """One document on one side, specials included; every array is [n].

    ids, byte_start, byte_end: int64. is_text: bool, the token stands for text of the document.
    end: position of the token that ends the document, -1 where it has none.
    """

    ids: IntArray
    byte_start: IntArray
    byte_end: IntArray
    is_text: BoolArray
    end: int


@dataclass(frozen=True, eq=False)
class AlignedSide:
    """A sequence after alignment: chunk [n] int64 (-1: none), supervised [n] bool."""

    sequence: TokenSequence
    chunk: IntArray
    supervised: BoolArray


@dataclass(frozen=True, eq=False)
class Example:
    """A document on both sides; its chunks are 0..chunks-1, predicted in full by both models.

    text: the bytes that both sides lie over. document: what it was made of. others: the same with
    each further teacher.
    """

    student: AlignedSide
    teacher: AlignedSide
    chunks: int
    text: bytes
    document: Document
    others: tuple[Example, ...] = ()


def build_examples(
    documents: Iterable[Document],
    student: Side,
    teacher: Side,
    template: Template = "plain",
    others: Sequence[Side] = (),
) -> tuple[list[Example], dict[str, int]]:
    """Examples in order, and how many documents were left out, by reason.

    others: further teachers; a document must have chunks with every teacher.
    """
    examples, skipped = [], Counter[str]()
    for document in documents:
        try:
            example, *more = (
                build_example(document, student, side, template) for side in (teacher, *others)
            )
        except NotLossless:
            skipped["not spelled byte for byte by a tokenizer"] += 1
            continue
        if example.chunks == 0 or any(other.chunks == 0 for other in more):
            skipped["no chunk that both sides predict"] += 1
        else:
            examples.append(replace(example, others=tuple(more)))
    return examples, dict(skipped)


def build_example(
    document: Document, student: Side, teacher: Side, template: Template = "plain"
) -> Example:
    """One document, rendered, aligned; raises NotLossless if a side cannot spell it."""
    spans = _content_spans(document) if template == "chat" else document.supervised_spans()
    sequences = [render(document, side, template) for side in (student, teacher)]
    supervised = [_supervised(sequence, spans) for sequence in sequences]
    chunks = _chunks(*sequences)
    kept = _usable(chunks, supervised)
    student_side, teacher_side = (
        AlignedSide(sequence, kept[chunk], flags)
        for sequence, chunk, flags in zip(sequences, chunks, supervised, strict=True)
    )
    contents = (segment.text for segment in document.segments)
    text = "".join(contents) if template == "chat" else document.text
    return Example(student_side, teacher_side, int(kept.max()) + 1, text.encode("utf-8"), document)


def render(document: Document, side: Side, template: Template) -> TokenSequence:
    """The document's tokens on one side.

    plain: BOS, the text, and the end token of a complete document. chat: the side's own chat
    template around each segment; a tokenizer without one separates segments by a newline.
    """
    if template == "chat":
        return _render_chat(document, side)
    encoding = side.tokens.encode(document.text)
    bos = [] if side.specials.bos is None else [side.specials.bos]
    eos = [] if side.specials.eos is None or not document.complete else [side.specials.eos]
    ids = np.array([*bos, *encoding.ids, *eos], dtype=np.int64)
    size = document.size
    zeros, ends = [0] * len(bos), [size] * len(eos)
    return TokenSequence(
        ids,
        np.array([*zeros, *encoding.byte_start, *ends], dtype=np.int64),
        np.array([*zeros, *encoding.byte_end, *ends], dtype=np.int64),
        np.array([False] * len(bos) + [True] * len(encoding.ids) + [False] * len(eos), dtype=bool),
        len(ids) - 1 if eos else -1,
    )


def _render_chat(document: Document, side: Side) -> TokenSequence:
    wrappers = _wrappers(document, side)
    ids: list[int] = []
    start: list[int] = []
    stop: list[int] = []
    text: list[bool] = []
    offset = 0
    for index, wrapper in enumerate(wrappers):
        frame = side.tokenizer(wrapper, add_special_tokens=False)["input_ids"] if wrapper else []
        first = len(ids)
        ids += frame
        start += [offset] * len(frame)
        stop += [offset] * len(frame)
        text += [False] * len(frame)
        if index < len(document.segments):
            encoding = side.tokens.encode(document.segments[index].text)
            ids += encoding.ids.tolist()
            start += (offset + encoding.byte_start).tolist()
            stop += (offset + encoding.byte_end).tolist()
            text += [True] * len(encoding.ids)
            offset = stop[-1] if len(encoding.ids) else offset
    eos = side.specials.eos
    end = next((i for i in range(first, len(ids)) if ids[i] == eos), -1)
    spans = np.array([start, stop], dtype=np.int64)
    return TokenSequence(
        np.array(ids, dtype=np.int64),
        spans[0],
        spans[1],
        np.array(text, dtype=bool),
        end if document.complete else -1,
    )


def _wrappers(document: Document, side: Side) -> list[str]:
    """What the side's template puts before, between and after the segments."""
    tokenizer = side.tokenizer
    if tokenizer.chat_template is None:
        between = [SEPARATOR] * (len(document.segments) - 1)
        return [tokenizer.bos_token or "", *between, tokenizer.eos_token or ""]
    marks = [f"segment{index}marker" for index in range(len(document.segments))]
    roles = [segment.role for segment in document.segments]
    turns = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    try:
        rest = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except TemplateError as error:
        raise _bad_template(roles, str(error)) from error
    wrappers = []
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found:
            raise _bad_template(roles, "it leaves a segment out or moves it")
        wrappers.append(before)
    return [*wrappers, rest]


def _bad_template(roles: list[str], reason: str) -> UserError:
    return UserError(
        f"train.template: a chat template cannot render a document of roles {roles}: {reason}",
        "use train.template=plain",
    )


def _content_spans(document: Document) -> list[tuple[int, int]]:
    """Supervised byte spans of the segments joined by nothing."""
    spans, start = [], 0
    for segment in document.segments:
        end = start + len(segment.text.encode("utf-8"))
        if segment.supervised:
            spans.append((start, end))
        start = end
    return spans


def _supervised(sequence: TokenSequence, spans: list[tuple[int, int]]) -> BoolArray:
    """Text tokens that lie within supervised bytes, and the end token after supervised text."""
    size = int(sequence.byte_end.max(initial=0))
    unsupervised = np.ones(size + 1, dtype=np.int64)
    for start, end in spans:
        unsupervised[start:end] = 0
    unsupervised[size] = 0
    before = np.concatenate([[0], np.cumsum(unsupervised)])
    clean = before[sequence.byte_end] == before[sequence.byte_start]
    flags = _with_prefixes(clean & sequence.is_text, sequence)
    if sequence.end >= 0:
        flags[sequence.end] = bool(spans) and spans[-1][1] == size
    return np.asarray(flags, dtype=bool)


def _with_prefixes(values: NDArray[Any], sequence: TokenSequence) -> NDArray[Any]:
    """The values [n], a lone SentencePiece prefix having that of the token it stands before."""
    lone = np.flatnonzero(sequence.is_text & (sequence.byte_end == sequence.byte_start))
    values[lone] = values[lone + 1]
    return values


def _chunks(student: TokenSequence, teacher: TokenSequence) -> list[IntArray]:
    """The chunk of every token on both sides: text by byte offsets, then the two end tokens."""
    spelled = [side.is_text & (side.byte_end > side.byte_start) for side in (student, teacher)]
    alignment = align(student.byte_end[spelled[0]], teacher.byte_end[spelled[1]])
    both_end = student.end >= 0 and teacher.end >= 0
    result = []
    found = (alignment.student_chunk, alignment.teacher_chunk)
    for side, mask, ids in zip((student, teacher), spelled, found, strict=True):
        chunk = np.full(len(side.ids), -1, dtype=np.int64)
        chunk[mask] = ids
        chunk = _with_prefixes(chunk, side)
        if both_end:
            chunk[side.end] = alignment.chunks
        result.append(chunk)
    return result


def _usable(chunks: list[IntArray], supervised: list[BoolArray]) -> IntArray:
    """New id of every chunk, -1 for one with a token that is unsupervised or unpredicted; [C + 1],
    the last entry being that of chunk -1.

    A token at position 0 has no predictor, so without a BOS on both sides the first chunk goes.
    """
    count = 1 + max(int(chunk.max(initial=-1)) for chunk in chunks)
    bad = np.zeros(count, dtype=bool)
    for chunk, flags in zip(chunks, supervised, strict=True):
        excluded = ~flags
        excluded[:1] = True
        bad[chunk[(chunk >= 0) & excluded]] = True
    return np.append(np.where(bad, -1, np.cumsum(~bad) - 1), -1)
