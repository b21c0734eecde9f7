"""Examples -> padded batches, and the blocks in which a step walks over them.

Row i of a sequence is the prediction of token i + 1: the causal shift happens here, once. Lengths
are padded to a few fixed sizes, so that kernels are built for a few shapes only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctdbench.distill.examples import AlignedSide, Example
from ctdbench.method import Needs

IntArray = NDArray[np.int64]
BUCKETS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)


@dataclass(frozen=True)
class SideBatch:
    """One side of a batch of B documents, padded on the right to length L.

    ids, mask: [B, L] int64. The other fields describe the R rows (predictions) in document order:
    position [R] is the row's place in the states flattened to [B * L, d]; rank [R] how many
    supervised tokens of the document come before the row's token, predicted or not; the rest as in
    `Rows`.
    """

    ids: Tensor
    mask: Tensor
    position: Tensor
    rank: Tensor
    token: Tensor
    chunk: Tensor
    supervised: Tensor
    document: Tensor
    byte_start: Tensor
    byte_end: Tensor

    def to(self, device: torch.device) -> SideBatch:
        """The same on another device."""
        return SideBatch(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True)
class Batch:
    """Documents of one forward pass on both sides; chunk ids run over the whole batch.

    document_chunks: [B] int64. texts: the bytes that both sides lie over, per document.
    """

    student: SideBatch
    teacher: SideBatch
    document_chunks: Tensor
    texts: tuple[bytes, ...]

    @property
    def size(self) -> int:
        """Bytes of text."""
        return sum(map(len, self.texts))

    def first_bytes(self) -> Tensor:
        """[B] where each document starts in the bytes of all documents joined."""
        sizes = torch.tensor([len(text) for text in self.texts], device=self.document_chunks.device)
        return sizes.cumsum(0) - sizes

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(
            self.student.to(device),
            self.teacher.to(device),
            self.document_chunks.to(device),
            self.texts,
        )


@dataclass(frozen=True)
class BlockRows:
    """What one block takes from a batch: row indices of both sides, a chunk range, row pairs."""

    student: Tensor
    teacher: Tensor
    first_chunk: int
    chunks: int
    pairs: Tensor | None


def collate(examples: Sequence[Example], student_pad: int, teacher_pad: int) -> Batch:
    """A padded batch of whole documents."""
    counts = np.array([example.chunks for example in examples], dtype=np.int64)
    first = np.cumsum(counts) - counts
    student = _side([example.student for example in examples], first, student_pad)
    teacher = _side([example.teacher for example in examples], first, teacher_pad)
    texts = tuple(example.text for example in examples)
    return Batch(student, teacher, torch.from_numpy(counts), texts)


def bucket(length: int) -> int:
    """The padded length of a sequence: the next of a few sizes."""
    return next((size for size in BUCKETS if size >= length), -(-length // 1024) * 1024)


def _side(sides: Sequence[AlignedSide], first_chunk: IntArray, pad: int) -> SideBatch:
    length = bucket(max(len(side.chunk) for side in sides))
    ids = np.full((len(sides), length), pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, side in enumerate(sides):
        ids[row, : len(side.chunk)] = side.sequence.ids
        mask[row, : len(side.chunk)] = 1
    lengths = np.array([len(side.chunk) - 1 for side in sides])
    document = np.repeat(np.arange(len(sides)), lengths)
    column = np.arange(len(document)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    chunk = _joined([side.chunk for side in sides])
    arrays = (
        ids,
        mask,
        document * length + column,
        _joined([np.cumsum(side.supervised) - side.supervised for side in sides]),
        _joined([side.sequence.ids for side in sides]),
        np.where(chunk >= 0, chunk + first_chunk[document], -1),
        _joined([side.supervised for side in sides]),
        document,
        _joined([side.sequence.byte_start for side in sides]),
        _joined([side.sequence.byte_end for side in sides]),
    )
    return SideBatch(*map(torch.from_numpy, arrays))


def _joined(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """The arrays in a row, each without its first entry: token 0 has no prediction."""
    return np.concatenate([array[1:] for array in arrays])


def plan_blocks(batch: Batch, needs: Needs, block_rows: int) -> list[BlockRows]:
    """Cut a batch into blocks of at most `block_rows` rows of both sides.

    A chunk (with `whole_documents`: a document) is never cut, so one that is larger makes a larger
    block. Supervised student rows that no chunk or pair holds follow in blocks of their own:
    cross-entropy counts them.
    """
    if needs.kind == "scalars":
        return all_rows(batch.student, int(batch.document_chunks.sum()), block_rows)
    if not needs.teacher:
        blocks: list[BlockRows] = []
        covered = torch.zeros_like(batch.student.supervised)
    elif needs.pairing == "positions":
        blocks, covered = _pair_blocks(batch, needs, block_rows)
    else:
        blocks, covered = _chunk_blocks(batch, needs, block_rows)
    loose = (batch.student.supervised & ~covered).nonzero()[:, 0]
    none = loose.new_empty(0)
    pairs = loose.new_empty(0, 2) if needs.pairing == "positions" else None
    return blocks + [
        BlockRows(part, none, 0, 0, pairs) for part in loose.split(block_rows) if len(part)
    ]


def all_rows(side: SideBatch, chunks: int, block_rows: int) -> list[BlockRows]:
    """Every row of one side in runs of `block_rows`, for what reads each row by itself."""
    rows = torch.arange(len(side.position), device=side.position.device)
    none = rows.new_empty(0)
    return [BlockRows(part, none, 0, chunks, None) for part in rows.split(block_rows) if len(part)]


def _chunk_blocks(batch: Batch, needs: Needs, block_rows: int) -> tuple[list[BlockRows], Tensor]:
    chunks = int(batch.document_chunks.sum())
    sides = [batch.student.chunk, batch.teacher.chunk]
    rows = [(chunk >= 0).nonzero()[:, 0] for chunk in sides]
    ends = [
        torch.bincount(c[r], minlength=chunks).cumsum(0) for c, r in zip(sides, rows, strict=True)
    ]
    if not needs.teacher_logits:
        rows[1], ends[1] = rows[1][:0], torch.zeros_like(ends[1])
    stops = torch.arange(1, chunks + 1)  # after which chunks a block may end
    if needs.whole_documents:
        stops = batch.document_chunks.cpu().cumsum(0).unique()
        stops = stops[stops > 0]
    cuts = _cuts((ends[0] + ends[1]).cpu()[stops - 1].numpy(), block_rows)
    starts = [0, *stops[[cut - 1 for cut in cuts]].tolist()]
    blocks: list[BlockRows] = []
    for start, end in pairwise(starts):
        student, teacher = (
            row[(int(last[start - 1]) if start else 0) : int(last[end - 1])]
            for row, last in zip(rows, ends, strict=True)
        )
        blocks.append(BlockRows(student, teacher, start, end - start, None))
    return blocks, batch.student.chunk >= 0


def _cuts(rows_up_to: IntArray, block_rows: int) -> list[int]:
    """Ends of runs of pieces with at most `block_rows` rows each, and at least one piece."""
    cuts: list[int] = []
    start, before = 0, 0
    while start < len(rows_up_to):
        fitting = int(np.searchsorted(rows_up_to, before + block_rows, side="right"))
        start = max(fitting, start + 1)
        before = int(rows_up_to[start - 1])
        cuts.append(start)
    return cuts


def _pair_blocks(batch: Batch, needs: Needs, block_rows: int) -> tuple[list[BlockRows], Tensor]:
    pairs = position_pairs(batch, needs.skip_last_student_token)
    covered = torch.zeros_like(batch.student.supervised)
    covered[pairs[:, 0]] = True
    blocks: list[BlockRows] = []
    for part in pairs.split(max(1, block_rows // 2)):
        if len(part):
            own = torch.arange(len(part), device=part.device)
            local = torch.stack([own, own], dim=1)
            blocks.append(BlockRows(part[:, 0], part[:, 1], 0, 0, local))
    return blocks, covered


def position_pairs(batch: Batch, skip_last_student_token: bool) -> Tensor:
    """[P, 2] rows of a document's k-th supervised tokens on both sides, where both predict it.

    A first token without BOS has no row, so its partner has no pair and no later one moves up.
    """
    sides, starts, stops = [], [], []
    for side, left_out in ((batch.student, int(skip_last_student_token)), (batch.teacher, 0)):
        rows = side.supervised.nonzero()[:, 0]
        document, rank = side.document[rows], side.rank[rows]
        none = rank.new_zeros(len(batch.document_chunks))
        starts.append(none.scatter_reduce(0, document, rank, "amin", include_self=False))
        stops.append(none.scatter_reduce(0, document, rank + 1, "amax") - left_out)
        sides.append((rows, document, rank))
    start, stop = torch.maximum(*starts), torch.minimum(*stops)
    kept = [
        rows[(rank >= start[document]) & (rank < stop[document])] for rows, document, rank in sides
    ]
    return torch.stack(kept, dim=1)


def pairs_per_document(batch: Batch, needs: Needs) -> Tensor:
    """[B] int64: chunks of each document, or row pairs for a method that pairs positions."""
    if needs.pairing == "chunks":
        return batch.document_chunks
    pairs = position_pairs(batch, needs.skip_last_student_token)
    return torch.bincount(batch.student.document[pairs[:, 0]], minlength=len(batch.document_chunks))
