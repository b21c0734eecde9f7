"""The blocks in which a step walks over a batch: which rows of both sides lie in each of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctdbench.distill.batches import Batch, SideBatch
from ctdbench.method import Needs

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class BlockRows:
    """What one block takes from a batch: row indices of both sides, a chunk range, row pairs."""

    student: Tensor
    teacher: Tensor
    first_chunk: int
    chunks: int
    pairs: Tensor | None


def plan_blocks(
    batch: Batch, needs: Needs, block_rows: int, pairs: Tensor | None = None
) -> list[BlockRows]:
    """Cut a batch into blocks of at most `block_rows` rows of both sides.

    A chunk (with `whole_documents` or pairing "documents": a document) is never cut, so one that is
    larger makes a larger block. Supervised student rows that no chunk or pair holds follow in
    blocks of their own: cross-entropy counts them. pairs: of a method that pairs rows.
    """
    if needs.kind == "scalars":
        return all_rows(batch.student, int(batch.document_chunks.sum()), block_rows)
    if not needs.teacher:
        blocks: list[BlockRows] = []
        covered = torch.zeros_like(batch.student.supervised)
    elif pairs is not None:
        blocks, covered = _pair_blocks(batch, pairs, block_rows)
    elif needs.pairing == "documents":
        blocks, covered = _document_blocks(batch, block_rows), batch.student.supervised
    else:
        blocks, covered = _chunk_blocks(batch, needs, block_rows)
    loose = (batch.student.supervised & ~covered).nonzero()[:, 0]
    none = loose.new_empty(0)
    unpaired = None if pairs is None else loose.new_empty(0, 2)
    return blocks + [
        BlockRows(part, none, 0, 0, unpaired) for part in loose.split(block_rows) if len(part)
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


def _document_blocks(batch: Batch, block_rows: int) -> list[BlockRows]:
    """All supervised rows of whole documents, on both sides."""
    documents = len(batch.document_chunks)
    rows = [side.supervised.nonzero()[:, 0] for side in (batch.student, batch.teacher)]
    ends = [
        torch.bincount(side.document[kept], minlength=documents).cumsum(0).tolist()
        for side, kept in zip((batch.student, batch.teacher), rows, strict=True)
    ]
    chunks = [0, *batch.document_chunks.cumsum(0).tolist()]
    cuts = _cuts(np.array(ends).sum(0), block_rows)
    blocks: list[BlockRows] = []
    for start, end in pairwise([0, *cuts]):
        student, teacher = (
            row[(last[start - 1] if start else 0) : last[end - 1]]
            for row, last in zip(rows, ends, strict=True)
        )
        first = chunks[start]
        blocks.append(BlockRows(student, teacher, first, chunks[end] - first, None))
    return [block for block in blocks if len(block.student)]


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


def _pair_blocks(batch: Batch, pairs: Tensor, block_rows: int) -> tuple[list[BlockRows], Tensor]:
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


def pairs_per_document(batch: Batch, pairs: Tensor) -> Tensor:
    """[B] int64: row pairs of each document."""
    return torch.bincount(batch.student.document[pairs[:, 0]], minlength=len(batch.document_chunks))
