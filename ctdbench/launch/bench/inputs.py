"""Aligned rows of two models that are not there: vocabularies of any size, random predictions.

Half of the smaller vocabulary are words that both sides have. The rest of each side's joins two or
three of them, as the merges of a BPE do, and the other side spells it by its parts; so chunks have
up to three rows a side.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from ctdbench.distill.batches import Batch, SideBatch, collate
from ctdbench.distill.blocks import all_rows
from ctdbench.distill.corpus import Document, Segment
from ctdbench.distill.examples import AlignedSide, Example, TokenSequence
from ctdbench.distill.view import bare_rows
from ctdbench.method import PairTables, Rows
from ctdbench.text.vocabulary import ids_by_bytes

BOS, EOS = SPECIALS = (0, 1)  # of both sides
DOCUMENT_ROWS = 128
WIDTH = 576  # channels of both models, as many as SmolLM2-135M has
SPREAD = 3.0  # of the logits
LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
FREQUENCIES = [1 / rank for rank, _ in enumerate(LETTERS, 1)]

Kind = tuple[int, int]  # a chunk's tokens on both sides
Chunk = tuple[tuple[bytes, ...], tuple[bytes, ...]]
EQUAL: Kind = (1, 1)
JOINED: tuple[tuple[Kind, ...], ...] = (((1, 2), (1, 3)), ((2, 1), (3, 1)))  # by side


@dataclass(frozen=True)
class Inputs:
    """Documents of two sides and their predictions; all rows carry states and tables.

    The student's logits and states are leaves with gradient.
    """

    tables: PairTables
    batch: Batch
    student: Rows
    teacher: Rows


def make_inputs(
    sizes: tuple[int, int], rows: int, device: torch.device, *, one_vocabulary: bool = False
) -> Inputs:
    """So many rows on both sides; sizes: of the vocabularies. One vocabulary is the student's."""
    draw = random.Random(0)
    lexicon = _lexicon(sizes, draw)
    vocabularies = [_vocabulary(lexicon, side, draw) for side in (0, 1)]
    if one_vocabulary:
        lexicon, vocabularies[1] = {EQUAL: lexicon[EQUAL]}, vocabularies[0]
    tables = PairTables.build(
        vocabularies[0],
        vocabularies[1],
        special_pairs=[(EOS, EOS), (BOS, BOS)],
        student_special=SPECIALS,
        teacher_special=SPECIALS,
        edit_mapping=_any_map,
    )
    ids = [ids_by_bytes(vocabulary) for vocabulary in vocabularies]
    texts = [
        _chunks(lexicon, min(DOCUMENT_ROWS, rows - start) - 1, draw)
        for start in range(0, rows, DOCUMENT_ROWS)
    ]
    batch = collate([_example(chunks, ids) for chunks in texts], BOS, BOS).to(device)
    torch.manual_seed(0)
    student = _predicted(batch.student, len(vocabularies[0]))
    teacher = _predicted(batch.teacher, len(vocabularies[1]))
    student.scores().requires_grad_()
    assert student.hidden is not None
    student.hidden.requires_grad_()
    return Inputs(tables, batch, student, teacher)


def _lexicon(sizes: tuple[int, int], draw: random.Random) -> dict[Kind, list[Chunk]]:
    """Chunks by kind, spelled on both sides; together they name all tokens but single bytes."""
    words: dict[bytes, None] = {}
    while len(words) < min(sizes) // 2:
        letters = draw.choices(LETTERS, FREQUENCIES, k=draw.randint(2, 6))
        words[(draw.choice(("", " ")) + "".join(letters)).encode()] = None
    lexicon: dict[Kind, list[Chunk]] = {EQUAL: [((word,), (word,)) for word in words]}
    for size, kinds in zip(sizes, JOINED, strict=True):
        missing = size - len(SPECIALS) - 256 - len(words)
        known = set(words)
        for kind, count in zip(kinds, (missing - missing // 4, missing // 4), strict=True):
            lexicon[kind] = _joined(list(words), kind, count, known, draw)
    return lexicon


def _joined(
    words: list[bytes], kind: Kind, count: int, known: set[bytes], draw: random.Random
) -> list[Chunk]:
    """So many new tokens of one side with their parts on the other."""
    found: list[Chunk] = []
    while len(found) < count:
        parts = tuple(draw.choices(words, k=max(kind)))
        token = b"".join(parts)
        if token not in known:
            known.add(token)
            found.append(((token,), parts) if kind[0] == 1 else (parts, (token,)))
    return found


def _vocabulary(lexicon: dict[Kind, list[Chunk]], side: int, draw: random.Random) -> list[bytes]:
    """Token id -> bytes, in random order."""
    tokens = [bytes([value]) for value in range(256)]
    tokens += [chunk[side][0] for kind in (EQUAL, *JOINED[side]) for chunk in lexicon[kind]]
    draw.shuffle(tokens)
    return [b""] * len(SPECIALS) + tokens


def _chunks(lexicon: dict[Kind, list[Chunk]], rows: int, draw: random.Random) -> list[Chunk]:
    """Random chunks, of every kind as many; so many rows on both sides."""
    cycles, rest = divmod(rows, sum(own for own, _ in lexicon))
    kinds = [*lexicon] * cycles + [EQUAL] * rest
    draw.shuffle(kinds)
    return [draw.choice(lexicon[kind]) for kind in kinds]


def _example(chunks: Sequence[Chunk], ids: Sequence[dict[bytes, int]]) -> Example:
    """A document that begins with BOS and ends with EOS on both sides."""
    student, teacher = (_side([chunk[side] for chunk in chunks], ids[side]) for side in (0, 1))
    text = b"".join(token for spelled, _ in chunks for token in spelled)
    document = Document((Segment(text.decode()),))
    return Example(student, teacher, len(chunks) + 1, text, document)


def _side(chunks: Sequence[tuple[bytes, ...]], ids: dict[bytes, int]) -> AlignedSide:
    tokens = [token for spelled in chunks for token in spelled]
    end = np.cumsum([0, *map(len, tokens), 0])
    chunk = np.repeat(np.arange(len(chunks)), [len(spelled) for spelled in chunks])
    is_text = np.ones(len(tokens) + 2, dtype=bool)
    is_text[[0, -1]] = False
    sequence = TokenSequence(
        np.array([BOS, *(ids[token] for token in tokens), EOS]),
        np.append(0, end[:-1]),
        end,
        is_text,
        len(tokens) + 1,
    )
    supervised = np.append(False, np.ones(len(tokens) + 1, dtype=bool))
    return AlignedSide(sequence, np.array([-1, *chunk, len(chunks)]), supervised)


def _predicted(side: SideBatch, columns: int) -> Rows:
    """All rows of a side with random logits, states and tables; embeddings are tied."""
    (whole,) = all_rows(side, len(side.token), len(side.token))
    rows = bare_rows(side, whole.student, whole)
    table = torch.randn(columns, WIDTH, device=side.ids.device).div_(WIDTH**0.5)
    return replace(
        rows,
        logits=SPREAD * torch.randn(len(side.token), columns, device=side.ids.device),
        hidden=torch.randn(len(side.token), WIDTH, device=side.ids.device),
        embedding=table,
        head=table,
    )


def _any_map(
    queries: Sequence[bytes], others: Sequence[bytes], special_pairs: Sequence[tuple[int, int]]
) -> NDArray[np.int64]:
    """In place of the map of least edit distance, which takes minutes: what has equal bytes, and
    any token for the others. A loss takes as long with it."""
    ids = ids_by_bytes(others)
    found = [ids.get(text, len(SPECIALS) + index % 256) for index, text in enumerate(queries)]
    for query, other in special_pairs:
        found[query] = other
    return np.array(found)
