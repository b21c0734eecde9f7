"""One optimisation step's gradient, streamed over blocks of rows.

No [tokens x vocabulary] tensor is ever whole. The body runs forward once; then, block by block, the
head gives logits for both sides, the method its terms, and `autograd.grad` their gradient with
respect to (states, head, extra modules). One backward through the wrapped network closes the step,
which is what lets DDP and FSDP2 synchronise: a backward per block would not.

A loss is a sum over its count in the *global* batch. Counts follow from tokens and chunks alone, so
they are known, over all micro-batches and processes, before the first gradient is taken.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ctdbench import ops
from ctdbench.distill import models
from ctdbench.distill.batches import (
    Batch,
    BlockRows,
    SideBatch,
    all_rows,
    pairs_per_document,
    plan_blocks,
)
from ctdbench.distill.precision import autocast
from ctdbench.distill.teacher import Teacher
from ctdbench.errors import RunError
from ctdbench.method import (
    Block,
    Method,
    PairTables,
    Rows,
    Scalars,
    SideName,
    Term,
    cross_entropy,
)

CE = "ce"
Number = TypeVar("Number", float, Tensor)


class Network(nn.Module):
    """All that is trained: the student and the method's modules, as one module to wrap."""

    def __init__(self, model: Any, columns: int, modules: Mapping[str, nn.Module]) -> None:
        """columns: size of the student's vocabulary; logits past it are cut."""
        super().__init__()
        self.model = model
        self.columns = columns
        self.extra = nn.ModuleDict(modules)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The states that the head reads, [B * L, d]."""
        return models.hidden_states(self.model, ids, mask).flatten(0, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, columns] float32."""
        return models.logits(self.model, hidden, self.columns)

    def head_parameters(self) -> list[nn.Parameter]:
        """Trained parameters outside the body: the head and the extra modules."""
        head = models.base_model(self.model).get_output_embeddings()
        return [p for module in (head, self.extra) for p in module.parameters() if p.requires_grad]


@dataclass(frozen=True)
class StepReport:
    """What a step computed over the global batch: the loss and every term as its mean."""

    loss: float
    terms: dict[str, float]


@dataclass(frozen=True)
class _Sides:
    """What the blocks of one micro-batch are cut from.

    teacher: its states [B * L, d]. prepared: what `Method.prepare` made of the teacher's rows.
    scalars: the teacher's, for a method of that kind; totals: `Method.totals`, over everything.
    """

    batch: Batch
    per_document: Tensor
    teacher: Tensor | None = None
    bytes: Tensor | None = None
    prepared: Tensor | None = None
    scalars: Scalars | None = None
    totals: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Sums:
    """Every term's total and count over the blocks of a step so far."""

    totals: defaultdict[str, float]
    counts: defaultdict[str, float]


class Step:
    """Computes gradients of a method's loss on a global batch; the optimizer is the caller's."""

    def __init__(
        self,
        network: nn.Module,
        teacher: Teacher | None,
        method: Method,
        tables: PairTables,
        *,
        accelerator: Accelerator,
        precision: str = "float32",
        block_rows: int = 512,
    ) -> None:
        """network: a `Network`, wrapped by `accelerator.prepare` or not."""
        self.wrapped = network
        self.network: Network = accelerator.unwrap_model(network)
        self.teacher = teacher
        self.method = method
        self.tables = tables
        self.accelerator = accelerator
        self.precision = precision
        self.block_rows = block_rows

    def gradients(self, batches: Sequence[Batch], *, idle: bool = False) -> StepReport:
        """Add the gradient of the global batch, of which `batches` are this process's share.

        idle: this process has no document of the batch; it runs along on a borrowed one whose
        loss does not count. Raises RunError for a loss that is not finite.
        """
        plans = [[] if idle else self._plan(batch) for batch in batches]
        known = self._known_in_advance(batches, idle=idle)
        counts = self._reduced(self._counts(known, plans))
        counts |= {name: float(total) for name, total in known[0].totals.items() if not total.ndim}
        sums = _Sums(defaultdict(float), defaultdict(float))
        for index, (sides, blocks) in enumerate(zip(known, plans, strict=True)):
            last = index == len(batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                self._micro_batch(sides, blocks, counts, sums)
        seen = self._reduced(sums.counts)
        if self.method.needs.kind == "scalars":  # whose totals may hold more than counts
            counts = {name: count for name, count in counts.items() if name in seen}
        _check_counts(counts, seen)
        terms = self._reduced(dict.fromkeys(counts, 0.0) | dict(sums.totals))
        means = {
            name: total / counts[name] if counts[name] else 0.0 for name, total in terms.items()
        }
        loss = sum(self._weight(name) * value for name, value in means.items())
        if not math.isfinite(loss):
            raise RunError(f"the loss is not finite ({means})", "lower train.learning_rate")
        return StepReport(loss, means)

    def _plan(self, batch: Batch) -> list[BlockRows]:
        return plan_blocks(batch, self.method.needs, self.block_rows)

    def _weight(self, name: str) -> float:
        if name == CE:
            return self.method.options.ce_weight
        return self.method.weights().get(name, 1.0)

    def _known_in_advance(self, batches: Sequence[Batch], *, idle: bool) -> list[_Sides]:
        """What has to be known of every micro-batch before the first gradient is taken."""
        needs = self.method.needs
        known = [_Sides(batch, pairs_per_document(batch, needs)) for batch in batches]
        if self.teacher is None or not (needs.prepare or needs.kind == "scalars"):
            return known
        known = [replace(side, teacher=self.teacher.hidden(side.batch.teacher)) for side in known]
        if needs.kind == "scalars":
            if not idle:
                known = [replace(sides, scalars=self._teacher_scalars(sides)) for sides in known]
            totals = self._totals(known)
            known = [replace(sides, totals=totals) for sides in known]
        if needs.prepare:
            made = [self._prepared(sides) for sides in known]
            if needs.prepare == "batch":
                highest = self.accelerator.gather(torch.stack(made).amax(0)[None]).amax(0)
                made = [highest] * len(made)
            known = [
                replace(sides, prepared=value) for sides, value in zip(known, made, strict=True)
            ]
        return known

    @torch.no_grad()
    def _prepared(self, sides: _Sides) -> Tensor:
        parts = [self.method.prepare(rows) for rows in self._teacher_rows(sides)]
        return torch.stack(parts).amax(0)

    @torch.no_grad()
    def _teacher_scalars(self, sides: _Sides) -> Scalars:
        values = [self._scalars(rows, "teacher") for rows in self._teacher_rows(sides)]
        side = sides.batch.teacher
        (whole,) = all_rows(side, int(sides.batch.document_chunks.sum()), len(side.position))
        return Scalars(torch.cat(values), _rows(side, whole.student, whole))

    def _totals(self, known: Sequence[_Sides]) -> dict[str, Tensor]:
        """What the method sums over the global batch."""
        sums: dict[str, Tensor] = {}
        for sides in known:
            if sides.scalars is not None:
                for name, total in self.method.totals(self._bare(sides), sides.scalars).items():
                    sums[name] = total + sums[name] if name in sums else total
        return self._reduced(sums)

    def _teacher_rows(self, sides: _Sides) -> Iterator[Rows]:
        """All of the teacher's rows with their logits, a block at a time."""
        side = sides.batch.teacher
        assert self.teacher is not None
        assert sides.teacher is not None
        for part in all_rows(side, int(sides.batch.document_chunks.sum()), self.block_rows):
            states = sides.teacher[side.position[part.student]]
            hidden = states if self.method.needs.teacher_hidden else None
            rows = _rows(side, part.student, part)
            yield replace(rows, logits=self.teacher.logits(states), hidden=hidden)

    def _scalars(self, rows: Rows, side: SideName) -> Tensor:
        with autocast(rows.token.device, self.precision):
            return self.method.scalars(rows, side, self.tables, dict(self.network.extra.items()))

    def _counts(
        self, known: Sequence[_Sides], plans: Sequence[list[BlockRows]]
    ) -> dict[str, float]:
        """Every term's count over this process's share."""
        counts: defaultdict[str, float] = defaultdict(float, {CE: 0.0})
        for sides, blocks in zip(known, plans, strict=True):
            for rows in blocks:
                block = self._block(sides, rows, None)
                supervised = block.student.supervised & (block.student.token >= 0)
                counts[CE] += float(supervised.sum())
                for name, count in self._block_counts(block).items():
                    counts[name] += float(count)
        return dict(counts)

    def _bare(self, sides: _Sides) -> Rows:
        """All of the student's rows, without logits and states."""
        side = sides.batch.student
        (whole,) = all_rows(side, int(sides.batch.document_chunks.sum()), len(side.position))
        return _rows(side, whole.student, whole)

    def _block_counts(self, block: Block) -> Mapping[str, Tensor]:
        if self.method.needs.kind == "scalars":
            return {}
        counts = self.method.counts(block)
        return self._counts_by_terms(block) if counts is None else counts

    @torch.no_grad()
    def _counts_by_terms(self, block: Block) -> dict[str, Tensor]:
        """Counts of a method that does not tell them: its terms on rows of zeros."""
        needs, rows = self.method.needs, block.student
        hidden = _zeros(rows, _width(self.network)) if needs.hidden else None
        student = replace(rows, logits=_zeros(rows, self.network.columns), hidden=hidden)
        teacher, distributions = block.teacher, None
        if teacher is not None and self.teacher is not None:
            teacher = replace(teacher, logits=_zeros(teacher, self.teacher.columns))
        if needs.bytes is not None:
            shape = (_bytes_in(rows), ops.BYTES + 1)
            distributions = torch.full(shape, 1 / shape[1], device=rows.token.device)
        filled = replace(block, student=student, teacher=teacher, bytes=distributions)
        terms = self.method.terms(filled, dict(self.network.extra.items()))
        return {name: term.count for name, term in terms.items()}

    def _reduced(self, values: Mapping[str, Number]) -> dict[str, Number]:
        """Sums over all processes; every process knows every name."""
        if self.accelerator.num_processes == 1:
            return dict(values)
        from accelerate.utils import gather_object

        merged: dict[str, Number] = {}
        for entry in gather_object([dict(values)]):
            for name, value in entry.items():
                merged[name] = value + merged[name] if name in merged else value
        return merged

    def _micro_batch(
        self, known: _Sides, blocks: Sequence[BlockRows], counts: Mapping[str, float], sums: _Sums
    ) -> None:
        """One forward of both bodies, the blocks, one backward."""
        batch = known.batch
        with autocast(batch.student.ids.device, self.precision):
            hidden = self.wrapped(batch.student.ids, batch.student.mask)
        head = self.network.head_parameters()
        hidden_grad = torch.zeros_like(hidden)
        head_grads = [torch.zeros_like(parameter) for parameter in head]
        sides = self._sides(known) if blocks else known
        slopes = None
        if sides.scalars is not None:
            slopes = self._slopes(sides, blocks, hidden.detach(), counts, sums)
        for rows in blocks:
            leaf = hidden.detach()[batch.student.position[rows.student]].requires_grad_()
            loss = self._block_loss(sides, rows, leaf, counts, sums)
            if slopes is not None:
                values = self._scalars(self._student_rows(sides, rows, leaf), "student")
                loss = loss + (values * slopes[rows.student]).sum()
            found = torch.autograd.grad(loss, [leaf, *head], allow_unused=True)
            if found[0] is not None:
                hidden_grad.index_add_(0, batch.student.position[rows.student], found[0])
            for total, part in zip(head_grads, found[1:], strict=True):
                if part is not None:
                    total.add_(part)
        surrogate = (hidden * hidden_grad).sum()
        for parameter, gradient in zip(head, head_grads, strict=True):
            surrogate = surrogate + (parameter * gradient).sum()
        surrogate.backward()  # type: ignore[no-untyped-call]

    def _sides(self, known: _Sides) -> _Sides:
        """With the teacher's states, unless they are known, and its byte distributions."""
        needs, batch = self.method.needs, known.batch
        if not needs.teacher:
            return known
        assert self.teacher is not None
        hidden, distributions = known.teacher, None
        if hidden is None and (needs.teacher_logits or needs.bytes != "beam"):
            hidden = self.teacher.hidden(batch.teacher)
        if needs.bytes is not None:
            live = None if needs.bytes == "beam" else hidden
            distributions = self.teacher.byte_distributions(batch, live, needs)
        return replace(known, teacher=hidden, bytes=distributions)

    def _slopes(
        self,
        sides: _Sides,
        blocks: Sequence[BlockRows],
        hidden: Tensor,
        counts: Mapping[str, float],
        sums: _Sums,
    ) -> Tensor:
        """Gradient of the global loss with respect to the student's scalars, [R, m].

        The scalars are collected without a graph, so merging chunks over any distance costs no
        memory; the blocks then compute them once more, with one.
        """
        assert sides.scalars is not None
        position = sides.batch.student.position
        with torch.no_grad():
            states = (hidden[position[rows.student]] for rows in blocks)
            parts = [
                self._scalars(self._student_rows(sides, rows, leaf), "student")
                for rows, leaf in zip(blocks, states, strict=True)
            ]
        values = torch.cat(parts).requires_grad_()
        own = Scalars(values, self._bare(sides))
        terms = self.method.combine(own, sides.scalars, sides.totals)
        loss = self._weighted(terms, counts, sums, values.sum() * 0.0)
        return torch.autograd.grad(loss, values)[0]

    def _block_loss(
        self,
        sides: _Sides,
        rows: BlockRows,
        leaf: Tensor,
        counts: Mapping[str, float],
        sums: _Sums,
    ) -> Tensor:
        """The block's share of the global loss; adds its terms to `sums`."""
        with autocast(leaf.device, self.precision):
            block = self._block(sides, rows, leaf)
            terms = {CE: cross_entropy(block.student)}
            if self.method.needs.kind == "blocks":
                terms |= self.method.terms(block, dict(self.network.extra.items()))
        return self._weighted(terms, counts, sums, leaf.sum() * 0.0)

    def _weighted(
        self, terms: Mapping[str, Term], counts: Mapping[str, float], sums: _Sums, loss: Tensor
    ) -> Tensor:
        """`loss` and the terms' shares of the global loss; notes them in `sums`."""
        scale = self.accelerator.num_processes  # DDP averages over processes
        for name, term in terms.items():
            sums.totals[name] += float(term.total.detach())
            sums.counts[name] += float(term.count)
            if counts.get(name, 0.0) > 0:
                loss = loss + term.total * (self._weight(name) * scale / counts[name])
        return loss

    def _block(self, sides: _Sides, rows: BlockRows, leaf: Tensor | None) -> Block:
        """The block; without states (leaf None) it carries no logits, for counting."""
        needs, batch = self.method.needs, sides.batch
        student = _rows(batch.student, rows.student, rows)
        if leaf is not None:
            student = self._student_rows(sides, rows, leaf)
        teacher = None
        if needs.teacher_logits and needs.kind == "blocks":
            teacher = _rows(batch.teacher, rows.teacher, rows)
            if sides.teacher is not None and self.teacher is not None:
                states = sides.teacher[batch.teacher.position[rows.teacher]]
                teacher = replace(teacher, logits=self.teacher.logits(states))
        distributions = None
        if sides.bytes is not None:
            distributions = sides.bytes[_byte_places(batch, student)]
        return Block(
            student=student,
            teacher=teacher,
            chunks=rows.chunks,
            document_chunks=sides.per_document,
            pairs=rows.pairs,
            bytes=distributions,
            pair=self.tables,
            batch=sides.prepared,
        )

    def _student_rows(self, sides: _Sides, rows: BlockRows, leaf: Tensor) -> Rows:
        """The block's student rows with their logits."""
        bare = _rows(sides.batch.student, rows.student, rows)
        hidden = leaf if self.method.needs.hidden else None
        return replace(bare, logits=self.network.logits(leaf), hidden=hidden)


def _rows(side: SideBatch, index: Tensor, block: BlockRows) -> Rows:
    """The named rows, without logits; the block's chunks are numbered from 0."""
    chunk = side.chunk[index] - block.first_chunk
    return Rows(
        logits=None,
        token=side.token[index],
        chunk=torch.where((chunk >= 0) & (chunk < block.chunks), chunk, -1),
        supervised=side.supervised[index],
        document=side.document[index],
        byte_start=side.byte_start[index],
        byte_end=side.byte_end[index],
    )


def _byte_places(batch: Batch, rows: Rows) -> Tensor:
    """Where the bytes of the rows' chunks lie in the bytes of all documents joined, [N]."""
    width = torch.where(rows.chunk >= 0, rows.byte_end - rows.byte_start, 0)
    row, offset = ops.ragged(width)
    return (batch.first_bytes()[rows.document] + rows.byte_start)[row] + offset


def _check_counts(expected: Mapping[str, float], seen: Mapping[str, float]) -> None:
    """What was divided by is what `terms` said; a method that counts by its logits is refused."""
    for name in expected.keys() | seen.keys():
        told, found = expected.get(name, 0.0), seen.get(name, 0.0)
        if abs(found - told) > 1e-4 * (1 + abs(found)):
            raise RunError(
                f"method term {name!r} counts {found:g} in terms() but {told:g} in advance",
                "a count must follow from tokens and chunks alone, and counts() must agree",
            )


def _width(network: Network) -> int:
    return int(models.base_model(network.model).get_output_embeddings().weight.shape[1])


def _bytes_in(rows: Rows) -> int:
    return int(torch.where(rows.chunk >= 0, rows.byte_end - rows.byte_start, 0).sum())


def _zeros(rows: Rows, columns: int) -> Tensor:
    """[R, columns] zeros that take no memory."""
    return torch.zeros(1, 1, device=rows.token.device).expand(len(rows.token), columns)
