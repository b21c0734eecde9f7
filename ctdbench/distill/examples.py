"""A document on both sides: tokens with byte spans, chunks, and what is supervised.

A document that a tokenizer does not spell byte for byte is refused and counted, never mis-paired.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ctdbench.distill.corpus import Document
from ctdbench.distill.encoded import Encoded, encode, overlay
from ctdbench.distill.rendering import (
    BoolArray,
    IntArray,
    Renderer,
    Template,
    TokenSequence,
    content,
    render,
    rendered,
)

if TYPE_CHECKING:
    from ctdbench.distill.models import Side

__all__ = [
    "AlignedSide",
    "Example",
    "Template",
    "TokenSequence",
    "build_example",
    "build_examples",
    "collect",
    "render",
    "shards",
]

SHARD_CHARACTERS = 2**18  # of documents whose arrays are made at once


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
    found, sides = list(documents), (student, teacher, *others)
    renderers = [Renderer.of(side, template, found) for side in sides]
    encoded = (encode(shard, renderers) for shard in shards(found))
    return collect(found, encoded, template, [side.positions for side in sides])


def build_example(
    document: Document, student: Side, teacher: Side, template: Template = "plain"
) -> Example:
    """One document, rendered, aligned; raises NotLossless if a side cannot spell it."""
    sides = [rendered(document, side, template) for side in (student, teacher)]
    (example,) = _cut([document], overlay([document], sides, template, [0]), template)
    return example


def shards(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Consecutive documents, as many as are encoded at once."""
    shard, size = list[Document](), 0
    for document in documents:
        shard.append(document)
        size += sum(len(segment.text) for segment in document.segments)
        if size >= SHARD_CHARACTERS:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def collect(
    documents: Iterable[Document],
    encoded: Iterable[Encoded],
    template: Template,
    positions: Sequence[int | None],
) -> tuple[list[Example], dict[str, int]]:
    """What `build_examples` returns, from the documents' encoded shards.

    positions: how many tokens every side's model reads at once; None for any number.
    """
    examples, skipped = list[Example](), Counter[str]()
    for shard, part in zip(shards(documents), encoded, strict=True):
        skipped["not spelled byte for byte by a tokenizer"] += len(shard) - len(part.place)
        for example in _cut(shard, part, template):
            if not all(one.chunks for one in (example, *example.others)):
                skipped["no chunk that both sides predict"] += 1
            elif not _fits(example, positions):
                skipped["longer than a model's positions (lower train.document_bytes)"] += 1
            else:
                examples.append(example)
    return examples, dict(+skipped)


def _fits(example: Example, positions: Sequence[int | None]) -> bool:
    """Whether every side's tokens are no more than its model reads at once."""
    teachers = (one.teacher for one in (example, *example.others))
    sides = zip((example.student, *teachers), positions, strict=True)
    return all(most is None or len(side.chunk) <= most for side, most in sides)


def _cut(documents: Sequence[Document], part: Encoded, template: Template) -> Iterator[Example]:
    """The examples of a shard; their arrays are views of its columns."""
    cuts = [side.tokens.sequences() for side in part.sides]
    for row, place in enumerate(part.place.tolist()):
        (own, sequence), *taught = map(next, cuts)
        text = content(documents[place], template)
        found = [
            Example(
                AlignedSide(sequence, pair.student[own], part.sides[0].supervised[own]),
                AlignedSide(other, pair.teacher[at], side.supervised[at]),
                int(pair.chunks[row]),
                text,
                documents[place],
            )
            for pair, side, (at, other) in zip(part.pairs, part.sides[1:], taught, strict=True)
        ]
        yield replace(found[0], others=tuple(found[1:])) if found[1:] else found[0]
