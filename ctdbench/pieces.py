"""Totals over a block a few rows at a time, each piece's gradient taken with it.

A loss reads every logit a dozen times. On whole blocks each of these passes is a trip through
memory into new pages, and most of its time; a piece stays in the processor's cache. What is kept
for the backward is the finished gradient, one [R, V] a total, and nothing else of that size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from ctdbench.rows import Block, Rows

CACHED = 1 << 21  # logits in a piece; a GPU, which has to be kept busy, gets more
BUSY = 1 << 26

Part = slice | Tensor  # rows: a run of them, or their numbers [n]
Totals = Mapping[str, Tensor]  # scalars by name


def summed(
    function: Callable[..., Totals], parts: Sequence[Part], values: Tensor, *others: Tensor
) -> dict[str, Tensor]:
    """Sums over k of function(k, values[parts[k]], *others), which gives scalars by name.

    values [R, ..]; no row is in two parts, and there is at least one part. Differentiable once, in
    `values` and `others`. The backward hands over what the forward made; a second one through the
    same graph has to make it again.
    """
    names: list[str] = []

    def run(number: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = function(number, *inputs)
        names[:] = found
        return tuple(found.values())

    wanted = tuple(each.requires_grad and torch.is_grad_enabled() for each in (values, *others))
    totals = _Summed.apply(run, parts, wanted, values, *others)  # type: ignore[no-untyped-call]
    return dict(zip(names, totals, strict=True))


class _Summed(torch.autograd.Function):
    """See `summed`."""

    @staticmethod
    def forward(ctx: Any, run: Any, parts: Any, wanted: Any, *inputs: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        ctx.given = (run, parts, wanted)
        totals, ctx.gradients = _evaluate(run, parts, wanted, inputs)
        return tuple(totals)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *slopes: Tensor | None) -> Any:
        inputs, wanted = ctx.saved_tensors, ctx.given[2]
        joined: dict[int, Tensor] = {}
        for number, slope in enumerate(slopes):
            if slope is None:
                continue
            if number not in ctx.gradients:  # handed over before
                run, parts, _ = ctx.given
                ctx.gradients = _evaluate(run, parts, wanted, inputs)[1]
            for index, gradient in ctx.gradients.pop(number).items():
                gradient.mul_(slope)
                joined[index] = joined[index].add_(gradient) if index in joined else gradient
        for index, each in enumerate(inputs):
            if wanted[index] and index not in joined:
                joined[index] = torch.zeros_like(each)
        return None, None, None, *(joined.get(index) for index in range(len(inputs)))


def rowwise(
    function: Callable[[int, Tensor], Tensor], parts: Sequence[Part], values: Tensor
) -> Tensor:
    """What function(k, values[parts[k]]) makes of every row by itself, [R, m], joined.

    parts: of all rows [R, ..], in order. Differentiable once, in `values`.
    """
    joined: Tensor = _Rowwise.apply(  # type: ignore[no-untyped-call]
        function, parts, values, values.requires_grad and torch.is_grad_enabled()
    )
    return joined


class _Rowwise(torch.autograd.Function):
    """Keeps every part's own graph; autograd's for rows of a tensor would add up whole ones."""

    @staticmethod
    def forward(ctx: Any, function: Any, parts: Any, values: Tensor, wanted: bool) -> Tensor:
        leaves = [values.detach()[part].requires_grad_(wanted) for part in parts]
        with torch.set_grad_enabled(wanted):
            found = [function(number, leaf) for number, leaf in enumerate(leaves)]
        ctx.kept = (parts, values.shape, leaves, found)
        return torch.cat(found).detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[None, None, Tensor, None]:
        parts, shape, leaves, found = ctx.kept
        gradient = leaves[0].new_empty(shape)
        for part, leaf, value in zip(parts, leaves, found, strict=True):
            slope = slopes[part]
            (gradient[part],) = torch.autograd.grad(value, leaf, slope, retain_graph=True)
        return None, None, gradient, None


Gradients = dict[int, dict[int, Tensor]]  # total -> input -> gradient


def _evaluate(
    run: Callable[..., tuple[Tensor, ...]],
    parts: Sequence[Part],
    wanted: Sequence[bool],
    inputs: Sequence[Tensor],
) -> tuple[list[Tensor], Gradients]:
    """The totals, and their gradients in the inputs that want one."""
    totals: list[Tensor] = []
    gradients: Gradients = {}
    whole, *others = (each.detach() for each in inputs)
    for number, part in enumerate(parts):
        leaves = [
            leaf.requires_grad_(want)
            for leaf, want in zip((whole[part], *others), wanted, strict=True)
        ]
        with torch.set_grad_enabled(any(wanted)):
            found = run(number, *leaves)
        for index, total in enumerate(found):
            slopes = _differentiated(total, leaves, last=index == len(found) - 1)
            _add(gradients.setdefault(index, {}), slopes, parts, number, whole)
        summands = [total.detach() for total in found]
        totals = [a + b for a, b in zip(totals, summands, strict=True)] if totals else summands
    return totals, gradients


def _differentiated(total: Tensor, leaves: Sequence[Tensor], *, last: bool) -> dict[int, Tensor]:
    """Gradients of a total by the leaves that it depends on, each in memory of its own."""
    if not total.requires_grad:
        return {}
    live = {index: leaf for index, leaf in enumerate(leaves) if leaf.requires_grad}
    slopes = torch.autograd.grad(
        total, list(live.values()), retain_graph=not last, allow_unused=True
    )
    found = zip(live, slopes, strict=True)
    return {index: slope.contiguous() for index, slope in found if slope is not None}


def _add(
    sums: dict[int, Tensor],
    slopes: dict[int, Tensor],
    parts: Sequence[Part],
    number: int,
    whole: Tensor,
) -> None:
    """A piece's gradients: rows of the first input's, summands of the others'."""
    part, rows = parts[number], slopes.pop(0, None)
    if rows is not None and len(rows) == len(whole) and isinstance(part, slice):
        sums[0] = rows  # the one piece is everything
    elif rows is not None:
        if 0 not in sums:
            sums[0] = _buffer(parts[number:], whole)
        sums[0][part] = rows
    elif 0 in sums:
        sums[0][part] = 0
    for index, slope in slopes.items():
        sums[index] = sums[index].add_(slope) if index in sums else slope.clone()


def _buffer(parts: Sequence[Part], whole: Tensor) -> Tensor:
    """For a gradient of all rows: zero but in these parts, which are still to be filled."""
    buffer = torch.empty_like(whole)
    left = torch.ones(len(whole), dtype=torch.bool, device=whole.device)
    for part in parts:
        left[part] = False
    buffer[left] = 0
    return buffer


# --- pieces of a block ----------------------------------------------------------------------------


def budget(device: torch.device) -> int:
    """How many logits a piece may have."""
    return CACHED if device.type == "cpu" else BUSY


def by_rows(rows: Tensor, columns: int) -> list[Part]:
    """Row numbers [n] in runs of what a piece holds of so many columns; at least one part."""
    most = max(1, budget(rows.device) // max(columns, 1))
    return [_run(part) for part in rows.split(most)]


@dataclass(frozen=True)
class Piece:
    """Some whole chunks of a block, or some of its row pairs: which rows of both sides they have.

    first, chunks: its chunks' number in the block, and how many. pairs: those of its own rows.
    """

    student: Part
    teacher: Part
    first: int = 0
    chunks: int = 0
    pairs: Tensor | None = None

    def of(self, block: Block, logits: Tensor) -> Block:
        """The piece as a block of its own; logits: its student rows'."""
        return replace(
            block,
            student=replace(_picked(block.student, self.student, self.first), logits=logits),
            teacher=_with_logits(block.taught(), self.teacher, self.first),
            chunks=self.chunks,
            pairs=self.pairs,
        )


def totals(
    function: Callable[..., Totals], block: Block, pieces: Sequence[Piece], *others: Tensor
) -> dict[str, Tensor]:
    """Sums of function(piece's block, *others) over pieces; differentiable as `summed` is."""

    def run(number: int, logits: Tensor, *rest: Tensor) -> Totals:
        return function(pieces[number].of(block, logits), *rest)

    return summed(run, [piece.student for piece in pieces], block.student.scores(), *others)


def by_chunks(block: Block) -> list[Piece]:
    """All chunks of a block. Rows outside of chunks are in no piece."""
    sides = (block.student, block.taught())
    orders, ends = zip(*(_in_chunks(side.chunk, block.chunks) for side in sides), strict=True)
    sizes = [end.diff() * side.scores().shape[1] for end, side in zip(ends, sides, strict=True)]
    stops = _stops(sizes[0] + sizes[1])
    bounds = [end[[0, *stops]].tolist() for end in ends]
    cuts = zip(pairwise([0, *stops]), *map(pairwise, bounds), strict=True)
    return [
        Piece(_run(orders[0][a:b]), _run(orders[1][c:d]), first, stop - first)
        for (first, stop), (a, b), (c, d) in cuts
    ]


def by_pairs(block: Block, pairs: Tensor) -> list[Piece]:
    """All row pairs [P, 2] of a block; no student row is in two."""
    columns = block.student.scores().shape[1] + block.taught().scores().shape[1]
    most = max(1, budget(pairs.device) // columns)
    own = torch.arange(min(most, len(pairs)), device=pairs.device)[:, None].expand(-1, 2)
    return [
        Piece(_run(student), _run(teacher), pairs=own[: len(student)])
        for student, teacher in (part.T for part in pairs.split(most))
    ]


def _in_chunks(chunk: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """Rows in the order of their chunks, [R], and where in it every chunk ends, [chunks + 1].

    The first entry is where the rows outside of chunks end.
    """
    return chunk.argsort(stable=True), torch.bincount(chunk + 1, minlength=chunks + 1).cumsum(0)


def _stops(sizes: Tensor) -> list[int]:
    """Where runs of chunks [C] end that a piece holds; a larger chunk is a run of its own."""
    number = (sizes.cumsum(0) - sizes) // budget(sizes.device)
    counts: list[int] = torch.unique_consecutive(number, return_counts=True)[1].tolist()
    return list(accumulate(counts)) or [0]


def _run(rows: Tensor) -> Part:
    """As a slice, if the rows follow each other."""
    if not len(rows):
        return slice(0, 0)
    first = int(rows[0])
    follow = torch.equal(rows, torch.arange(first, first + len(rows), device=rows.device))
    return slice(first, first + len(rows)) if follow else rows


def _picked(rows: Rows, part: Part, first: int) -> Rows:
    """Some of the rows, without logits, states and tables."""
    chunk = rows.chunk[part]
    return Rows(
        logits=None,
        token=rows.token[part],
        chunk=torch.where(chunk >= 0, chunk - first, -1),
        supervised=rows.supervised[part],
        document=rows.document[part],
        byte_start=rows.byte_start[part],
        byte_end=rows.byte_end[part],
        input=None if rows.input is None else rows.input[part],
    )


def _with_logits(rows: Rows, part: Part, first: int) -> Rows:
    return replace(_picked(rows, part, first), logits=rows.scores().detach()[part])
