"""How fast two tokenizations of a text are laid over each other, by the length of its documents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from ctdbench.distill.corpus import Document, Segment, cut, load_corpus
from ctdbench.distill.encoded import overlay
from ctdbench.distill.examples import Template
from ctdbench.distill.inspection import tokenizer_sides
from ctdbench.distill.models import Side
from ctdbench.distill.rendering import Renderer, Spelled
from ctdbench.launch.bench.measure import interleaved
from ctdbench.spec import PairSpec
from ctdbench.text.alignment import align
from ctdbench.text.token_bytes import Refusal

SIZES = (1_000, 10_000, 100_000, 1_000_000)
PLAIN: Template = "plain"
MB = 10**6


@dataclass(frozen=True)
class Throughput:
    """MB of text a second on one core, in documents of at most so many bytes, once tokenized.

    aligned: by `align`, one document after the other. examples: all that training makes of the
    tokens of both sides, their frames and supervision included.
    """

    document_bytes: int
    aligned: float
    examples: float


@dataclass(frozen=True)
class _Text:
    """A text's documents with the pieces that both sides spell, the student's first."""

    documents: list[Document]
    renderers: list[Renderer]
    spelled: list[list[Spelled]]

    @property
    def size(self) -> float:
        return sum(document.size for document in self.documents) / MB

    @cached_property
    def ends(self) -> list[tuple[Any, ...]]:
        """Of both sides' tokens with bytes (a lone prefix has none), document by document."""
        found = [[part[0].byte_end for part in side] for side in self.spelled]
        kept = ([end[int(end[0] == 0) :] for end in side] for side in found)
        return list(zip(*kept, strict=True))

    def align(self) -> None:
        """Every document by itself."""
        for student, teacher in self.ends:
            align(student, teacher)

    def lay(self) -> None:
        """As in training, without tokenizing."""
        columns = [
            renderer.columns(self.documents, spelled)
            for renderer, spelled in zip(self.renderers, self.spelled, strict=True)
        ]
        overlay(self.documents, columns, PLAIN, range(len(self.documents)))


def bench_alignment(
    pair: PairSpec, repeats: int = 7, *, progress: bool = False
) -> list[Throughput]:
    """`alignment_throughput` of a pair's tokenizers on the text of the embedded corpus."""
    student, teacher, *_ = tokenizer_sides(pair)
    text = "\n".join(document.text for document in load_corpus("embedded").train)
    return alignment_throughput(student, teacher, text, repeats=repeats, progress=progress)


def alignment_throughput(
    student: Side,
    teacher: Side,
    text: str,
    sizes: Sequence[int] = SIZES,
    repeats: int = 7,
    *,
    progress: bool = False,
) -> list[Throughput]:
    """The text in documents of every size, timed in turns. Sides need no model."""
    texts = {size: _spelled([student, teacher], text, size) for size in sizes}
    functions = {f"{size} aligned": found.align for size, found in texts.items()}
    functions |= {f"{size} examples": found.lay for size, found in texts.items()}
    taken = interleaved(functions, repeats, progress=progress)
    return [
        Throughput(
            size,
            found.size / taken[f"{size} aligned"].median,
            found.size / taken[f"{size} examples"].median,
        )
        for size, found in texts.items()
    ]


def render(pair: str, found: Sequence[Throughput], format_name: str) -> str:
    """As lines (`terminal`) or `json`."""
    if format_name == "json":
        return json.dumps({"pair": pair, "throughput": [asdict(row) for row in found]}) + "\n"
    lines = [f"alignment of {pair} once tokenized, MB of text a second on one core"]
    lines += [f"{'document bytes':>14}  {'aligned':>8}  {'examples':>8}"]
    lines += [
        f"{row.document_bytes:>14,}  {row.aligned:>8.1f}  {row.examples:>8.1f}" for row in found
    ]
    return "\n".join(lines) + "\n"


def _spelled(sides: Sequence[Side], text: str, size: int) -> _Text:
    """The text's pieces of so many bytes, without those that a side cannot spell."""
    pieces = list(cut(Document((Segment(text),)), size))
    renderers = [Renderer.of(side, PLAIN, pieces) for side in sides]
    rows = zip(pieces, *(renderer.spell(pieces) for renderer in renderers), strict=True)
    kept = [row for row in rows if not any(isinstance(part, Refusal) for part in row)]
    documents, *spelled = map(list, zip(*kept, strict=True))
    return _Text(documents, renderers, spelled)
