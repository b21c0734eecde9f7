"""Examples -> padded batches.

Row i of a sequence is the prediction of token i + 1: the causal shift happens here, once. Lengths
are padded to a few fixed sizes, so that kernels are built for a few shapes only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from ctdbench import ops
from ctdbench.distill.examples import AlignedSide, Example
from ctdbench.method import Needs, PairTables

IntArray = NDArray[np.int64]
BUCKETS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)


@dataclass(frozen=True)
class SideBatch:
    """One side of a batch of B documents, padded on the right to length L.

    ids, mask: [B, L] int64. The other fields describe the R rows (predictions) in document order:
    position [R] is the row's place in the states flattened to [B * L, d]; rank [R] how many
    supervised tokens of the document come before the row's token, predicted or not; input [R] the
    token before it; the rest as in `Rows`.
    """

    ids: Tensor
    mask: Tensor
    position: Tensor
    rank: Tensor
    input: Tensor
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

    document_chunks: [B] int64. texts: the bytes that both sides lie over, per document. others: the
    same documents laid against each further teacher; the student's ids are the same in all.
    """

    student: SideBatch
    teacher: SideBatch
    document_chunks: Tensor
    texts: tuple[bytes, ...]
    others: tuple[Batch, ...] = ()

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
            tuple(other.to(device) for other in self.others),
        )


def collate(
    examples: Sequence[Example], student_pad: int, teacher_pad: int, *other_pads: int
) -> Batch:
    """A padded batch of whole documents; `other_pads`: of each further teacher."""
    counts = np.array([example.chunks for example in examples], dtype=np.int64)
    first = np.cumsum(counts) - counts
    student = _side([example.student for example in examples], first, student_pad)
    teacher = _side([example.teacher for example in examples], first, teacher_pad)
    texts = tuple(example.text for example in examples)
    others = tuple(
        collate([example.others[index] for example in examples], student_pad, pad)
        for index, pad in enumerate(other_pads)
    )
    return Batch(student, teacher, torch.from_numpy(counts), texts, others)


def of_same_bytes(batch: Batch, tables: PairTables) -> Batch:
    """The batch without the chunks whose two sides spell different bytes.

    Both cover the same span of the document, but SentencePiece writes a space before a text that is
    not in it: " Start" here and "Start" there are no predictions of one and the same token.
    """
    chunks = int(batch.document_chunks.sum())
    sides = (batch.student, batch.teacher)
    sums = []
    for side, added in zip(sides, _added_bytes(batch, tables), strict=True):
        inside = side.chunk >= 0
        sums.append(ops.segment_sum(added[inside], side.chunk[inside], chunks))
    kept = sums[0] == sums[1]
    number = torch.where(kept, kept.cumsum(0) - 1, -1)
    number = torch.nn.functional.pad(number, (0, 1), value=-1)  # what chunk -1 finds
    student, teacher = (replace(side, chunk=number[side.chunk]) for side in sides)
    document = torch.repeat_interleave(batch.document_chunks)
    counts = torch.bincount(document[kept], minlength=len(batch.document_chunks))
    return replace(batch, student=student, teacher=teacher, document_chunks=counts)


def pairs_of_same_bytes(batch: Batch, tables: PairTables, pairs: Tensor) -> Tensor:
    """The row pairs [P, 2] without those of which one row alone predicts such a space."""
    student, teacher = _added_bytes(batch, tables)
    return pairs[student[pairs[:, 0]] == teacher[pairs[:, 1]]]


def _added_bytes(batch: Batch, tables: PairTables) -> tuple[Tensor, Tensor]:
    """How many bytes more either side's tokens have than they cover of the document, [R] each."""
    sides = zip((batch.student, batch.teacher), tables.lengths, strict=True)
    student, teacher = (
        lengths.to(side.token.device)[side.token] - (side.byte_end - side.byte_start)
        for side, lengths in sides
    )
    return student, teacher


def micro_batches(
    examples: Sequence[Example], size: int | None, accelerator: Accelerator, needs: Needs
) -> list[list[Example]]:
    """The examples of a step as they share a forward pass: `size` together.

    Without a size all of them do on a GPU, which wants large matrices; on a processor, which takes
    as long for padding as for text, those that are padded to one length. Wrapped processes have to
    run in step, and some methods look at a micro-batch as a whole: all come together there, too.
    """
    alone = accelerator.device.type == "cpu" and accelerator.num_processes == 1
    if size is None and alone and needs.prepare != "microbatch":
        return _by_length(examples)
    size = size or len(examples)
    return [list(examples[start : start + size]) for start in range(0, len(examples), size)]


def _by_length(examples: Sequence[Example]) -> list[list[Example]]:
    """In groups whose student sides are padded to one length; in order within each."""
    groups: dict[int, list[Example]] = {}
    for example in examples:
        groups.setdefault(bucket(len(example.student.chunk)), []).append(example)
    return [groups[length] for length in sorted(groups)]


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
        np.concatenate([side.sequence.ids[:-1] for side in sides]),
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
