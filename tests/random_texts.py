"""Random texts that two random tokenizers spell in their own ways, as rows of both sides."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from random_rows import Case
from torch import Tensor

from ctdbench.method import Block, Method, PairTables, Rows, create
from ctdbench.text.alignment import align

ALPHABET = b"ab \xc3"
END, OTHER = 0, 1  # ids of the end token and of a special without a partner; both b""


def made(name: str, **options: Any) -> Method:
    """The method; one instance for all examples, since `create` reads every method's file."""
    return _made(name, tuple(sorted(options.items())))


@lru_cache
def _made(name: str, options: tuple[tuple[str, Any], ...]) -> Method:
    return create(name, dict(options))


def graph_size(root: Tensor) -> int:
    """Number of operations that the gradient of a scalar goes through."""
    seen, pending = set(), [root.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [parent for parent, _ in node.next_functions]
    return len(seen)


def with_gradient(case: Case) -> tuple[Block, Tensor]:
    """The batch as one block, and the student's logits in it, which want a gradient."""
    leaf = case.student.scores().clone().requires_grad_()
    return replace(case.block, student=replace(case.student, logits=leaf)), leaf


class _Side(NamedTuple):
    """A document on one side: ids, spans, chunks (-1: none), one entry a row."""

    ids: list[int]
    start: list[int]
    end: list[int]
    chunk: list[int]


@st.composite
def text_cases(
    draw: st.DrawFn, *, one_tokenizer: bool = False, width: int = 0, least: int = 1
) -> Case:
    """Random cases of `least` to 3 documents; with `width`, rows carry states of so many channels.

    Documents may lack an end token, a row after their last chunk, or their first chunk; a side may
    put a space before the text, as SentencePiece does.
    """
    lengths = draw(st.lists(st.integers(1, 9), min_size=least, max_size=3))
    return text_case(draw(st.integers(0, 9999)), lengths, one_tokenizer=one_tokenizer, width=width)


def text_case(
    seed: int, lengths: Sequence[int], *, one_tokenizer: bool = False, width: int = 0
) -> Case:
    """A case of texts of these lengths in bytes."""
    chance = random.Random(seed)
    student = vocabulary(chance)
    teacher = student if one_tokenizer else vocabulary(chance)
    prefixes = [chance.random() < 0.3 for _ in range(2)]
    documents = [_document(chance, length, (student, teacher), prefixes) for length in lengths]
    if one_tokenizer:
        documents = [(own, own) for own, _ in documents]
    rows = [
        _rows([sides[k] for sides in documents], words, chance, width)
        for k, words in enumerate((student, teacher))
    ]
    pair = PairTables.build(student, teacher, [(END, END)], [END, OTHER], [END, OTHER])
    return Case(rows[0], rows[1], pair, _chunks(rows))


def vocabulary(chance: random.Random) -> list[bytes]:
    """Two specials, all single bytes, some longer tokens, the longest one twice."""
    longer = [bytes(chance.choices(ALPHABET, k=chance.choice((2, 2, 3, 4)))) for _ in range(9)]
    words = [bytes([value]) for value in ALPHABET] + sorted(set(longer))
    chance.shuffle(words)
    return [b"", b"", *words, max(words, key=len)]


def _document(
    chance: random.Random, length: int, words: Sequence[list[bytes]], prefixes: list[bool]
) -> tuple[_Side, _Side]:
    text = bytes(chance.choices(ALPHABET, weights=(4, 4, 2, 1), k=length))
    spelled = [
        _tokens(chance, text, own, prefix) for own, prefix in zip(words, prefixes, strict=True)
    ]
    found = align(*(np.unique([end for end in ends if end]) for _, _, ends in spelled))
    ended, first = (chance.random() < share for share in (0.6, 0.2))
    after = chance.choice([(True, True), (True, False), (False, False)])
    sides = []
    for (ids, start, end), ids_of, context in zip(
        spelled, (found.student_chunk, found.teacher_chunk), after, strict=True
    ):
        lone = int(end[0] == 0)  # a prefix by itself belongs to the first chunk
        chunk = [0] * lone + ids_of.tolist()
        if ended:
            ids, start, end = [*ids, END], [*start, length], [*end, length]
            chunk.append(found.chunks)
        chunk = [c - 1 for c in chunk] if first else chunk
        trail = [-1] if context else []
        sides.append(
            _Side(
                [OTHER, *ids, *trail],
                [0, *start, *([length] * len(trail))],
                [0, *end, *([length] * len(trail))],
                [-1, *chunk, *trail],
            )
        )
    return sides[0], sides[1]


def _tokens(
    chance: random.Random, text: bytes, words: list[bytes], prefix: bool
) -> tuple[list[int], list[int], list[int]]:
    """Ids and spans of a random spelling; the prefix is a space that the text does not have."""
    spelled = b" " + text if prefix else text
    ids, ends, place = [], [], 0
    while place < len(spelled):
        fitting = [v for v, word in enumerate(words) if word and spelled.startswith(word, place)]
        ids.append(chance.choices(fitting, [len(words[v]) ** 2 for v in fitting])[0])
        place += len(words[ids[-1]])
        ends.append(place - prefix)
    return ids, [0, *ends[:-1]], ends


def _rows(sides: list[_Side], words: list[bytes], chance: random.Random, width: int) -> Rows:
    generator = torch.Generator().manual_seed(chance.randrange(1 << 30))
    chunk: list[int] = []
    for side in sides:
        first = 1 + max(chunk, default=-1)
        chunk += [c + first if c >= 0 else -1 for c in side.chunk]
    ids, start, end = ([v for side in sides for v in side[k]] for k in range(3))
    document = [k for k, side in enumerate(sides) for _ in side.ids]
    return Rows(
        logits=2 * torch.randn(len(ids), len(words), generator=generator),
        token=torch.tensor(ids),
        chunk=torch.tensor(chunk),
        supervised=torch.tensor(chunk) >= 0,
        document=torch.tensor(document),
        byte_start=torch.tensor(start),
        byte_end=torch.tensor(end),
        hidden=torch.randn(len(ids), width, generator=generator) if width else None,
    )


def _chunks(rows: list[Rows]) -> list[list[tuple[list[int], list[int]]]]:
    """Rows of both sides of every chunk, by document."""
    found: list[list[tuple[list[int], list[int]]]] = []
    for document in range(int(rows[0].document.max()) + 1):
        inside = rows[0].chunk[(rows[0].document == document) & (rows[0].chunk >= 0)]
        pairs = [
            tuple(torch.nonzero(side.chunk == c)[:, 0].tolist() for side in rows)
            for c in inside.unique().tolist()
        ]
        found.append(pairs)  # type: ignore[arg-type]
    return found
