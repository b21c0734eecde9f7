"""One micro-batch laid against one teacher: what a step needs of it, and the blocks it is cut into.

A `View` goes through stages, because a loss is a sum over its count in the *global* batch: first
what must be known of every view before any gradient is taken (`prepared`, `scalars`, `totals`,
`counts`), then, in its turn, the teacher's states (`load`), then block after block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ctdbench import ops
from ctdbench.distill import fused, models
from ctdbench.distill.batches import Batch, SideBatch, of_same_bytes, pairs_of_same_bytes
from ctdbench.distill.blocks import (
    BlockRows,
    all_rows,
    pairs_per_document,
    plan_blocks,
    position_pairs,
)
from ctdbench.distill.precision import autocast
from ctdbench.distill.teacher import Teacher
from ctdbench.method import Block, Method, PairTables, Rows, Scalars, SideName, Term, cross_entropy
from ctdbench.rows import checked

CE = "ce"
Terms = Callable[[Block, Mapping[str, nn.Module]], dict[str, Term]]


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
class Guide:
    """A teacher of a step, with the tables of the student's vocabulary and its own.

    teacher: None for a method that needs none. suffix: "" for the first teacher, "@2", ... for
    further ones; it marks their terms and modules. weight: of their terms in the loss.
    """

    teacher: Teacher | None
    tables: PairTables
    suffix: str = ""
    weight: float = 1.0


@dataclass
class View:
    """One micro-batch laid against one teacher.

    blocks: none for a process that only runs along. terms: the method's own, compiled or not.
    fused: cross-entropy is all there is, and comes straight from the states.
    states: the teacher's, [B * L, d]. bytes: its byte distributions. prepared: what
    `Method.prepare` made of its rows. scalars: the teacher's, for a method of that kind; totals:
    `Method.totals` over everything.
    """

    batch: Batch
    guide: Guide
    network: Network
    method: Method
    precision: str
    block_rows: int
    terms: Terms
    idle: bool = False
    fused: bool = False
    states: Tensor | None = None
    bytes: Tensor | None = None
    prepared: Tensor | None = None
    scalars: Scalars | None = None
    totals: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        needs = self.method.needs
        if needs.same_bytes:
            self.batch = of_same_bytes(self.batch, self.guide.tables)
        batch = self.batch
        pairs = None
        if needs.pairing == "positions":
            pairs = position_pairs(batch, needs.skip_last_student_token)
        elif needs.pairing == "own":
            pairs = self.method.pairs(self.bare(), self._bare_teacher(), self.guide.tables)
            pairs = pairs_of_same_bytes(batch, self.guide.tables, pairs)
        self.per_document = batch.document_chunks
        if pairs is not None:
            self.per_document = pairs_per_document(batch, pairs)
        self.blocks = [] if self.idle else plan_blocks(batch, needs, self.block_rows, pairs)
        split = {name: name.partition("@") for name in self.network.extra}
        self.modules = {
            base: self.network.extra[name]
            for name, (base, mark, number) in split.items()
            if mark + number == self.guide.suffix
        }

    @property
    def teacher(self) -> Teacher:
        """The teacher, for a method that needs one."""
        assert self.guide.teacher is not None
        return self.guide.teacher

    @property
    def _chunks(self) -> int:
        return int(self.batch.document_chunks.sum())

    # --- before the first gradient ------------------------------------------------------------

    def load_states(self) -> None:
        """The teacher's hidden states, unless they are known."""
        if self.states is None:
            self.states = self.teacher.hidden(self.batch.teacher)

    @torch.no_grad()
    def prepare(self) -> Tensor:
        """`Method.prepare` over this view's rows; of a borrowed batch nothing, its owner has it."""
        parts = torch.stack([self.method.prepare(rows) for rows in self._teacher_rows()])
        if self.method.needs.reduce == "max":
            return torch.full_like(parts[0], -torch.inf) if self.idle else parts.amax(0)
        return parts.sum(0) * (not self.idle)

    @torch.no_grad()
    def load_scalars(self) -> None:
        """The teacher's scalars."""
        values = [self.method_scalars(rows, "teacher") for rows in self._teacher_rows()]
        self.scalars = Scalars(torch.cat(values), self._bare_teacher())
        self.states = None

    def own_totals(self) -> dict[str, Tensor]:
        """`Method.totals` over this view."""
        if self.scalars is None:
            return {}
        return self.method.totals(self.bare(), self.scalars)

    def counts(self) -> dict[str, float]:
        """Every term's count over this view; cross-entropy belongs to the first teacher's view."""
        counts: defaultdict[str, float] = defaultdict(float)
        for rows in self.blocks:
            block = self.block(rows)
            if not self.guide.suffix:
                counts[CE] += float(block.student.scored().sum())
            for name, count in self._block_counts(block).items():
                counts[name + self.guide.suffix] += float(count)
        return dict(counts)

    def _block_counts(self, block: Block) -> Mapping[str, Tensor]:
        if self.method.needs.kind == "scalars":
            return {}
        counts = self.method.counts(block)
        return self._counts_by_terms(block) if counts is None else counts

    @torch.no_grad()
    def _counts_by_terms(self, block: Block) -> dict[str, Tensor]:
        """Counts of a method that does not tell them: its terms on rows of zeros."""
        needs, teacher, distributions = self.method.needs, block.teacher, None
        student = self._zero_rows(block.student, self.network.columns, self.network.model)
        if not needs.hidden:
            student = replace(student, hidden=None)
        if teacher is not None:
            teacher = self._zero_rows(teacher, self.teacher.columns, self.teacher.side.model)
            if not needs.teacher_hidden:
                teacher = replace(teacher, hidden=None)
        if needs.bytes is not None:
            shape = (_bytes_in(block.student), ops.BYTES + 1)
            distributions = torch.full(shape, 1 / shape[1], device=block.student.token.device)
        filled = replace(block, student=student, teacher=teacher, bytes=distributions)
        terms = checked(self.method.terms(filled, self.modules))
        return {name: term.count for name, term in terms.items()}

    def _zero_rows(self, rows: Rows, columns: int, model: Any) -> Rows:
        """With logits and states of zeros, which take no memory."""
        width = models.base_model(model).get_output_embeddings().weight.shape[1]
        zero = torch.zeros(1, 1, device=rows.token.device)
        made = replace(rows, logits=zero.expand(len(rows.token), columns))
        return replace(made, hidden=zero.expand(len(rows.token), width))

    # --- the blocks ---------------------------------------------------------------------------

    def load(self) -> None:
        """The teacher's states and byte distributions."""
        needs = self.method.needs
        if not needs.teacher or needs.kind == "scalars":  # whose scalars are known by now
            return
        if needs.teacher_states:
            self.load_states()
        if needs.bytes is not None:
            live = None if needs.bytes == "beam" else self.states
            self.bytes = self.teacher.byte_distributions(self.batch, live, needs, self.block_rows)

    def unload(self) -> None:
        """Let go of what `load` made."""
        self.states = self.bytes = None

    def block_terms(self, rows: BlockRows, student: Rows) -> dict[str, Term]:
        """The terms of one block (kind "scalars": none of the method's own)."""
        with autocast(student.token.device, self.precision):
            block = self.block(rows, student)
            terms = {} if self.guide.suffix else {CE: self._cross_entropy(block.student)}
            if self.method.needs.kind == "blocks":
                own = checked(self.terms(block, self.modules))
                terms |= {name + self.guide.suffix: term for name, term in own.items()}
        return terms

    def _cross_entropy(self, rows: Rows) -> Term:
        if self.fused:
            return fused.cross_entropy(self.network.model, rows, self.network.columns)
        return cross_entropy(rows)

    def block(self, rows: BlockRows, student: Rows | None = None) -> Block:
        """The block; by default the student's rows carry no logits, for counting."""
        needs, batch = self.method.needs, self.batch
        if student is None:
            student = self._tables(bare_rows(batch.student, rows.student, rows), self.network.model)
        teacher = None
        if needs.teacher_logits and needs.kind == "blocks":
            teacher = bare_rows(batch.teacher, rows.teacher, rows)
            teacher = self._tables(teacher, self.teacher.side.model)
            if self.states is not None:
                teacher = self._with_logits(teacher, batch.teacher.position[rows.teacher])
        distributions = None
        if self.bytes is not None:
            distributions = self.bytes[_byte_places(batch, student)]
        return Block(
            student=student,
            teacher=teacher,
            chunks=rows.chunks,
            document_chunks=self.per_document,
            pairs=rows.pairs,
            bytes=distributions,
            pair=self.guide.tables,
            batch=self.prepared,
        )

    def student_rows(self, rows: BlockRows, leaf: Tensor) -> Rows:
        """The block's student rows with their logits; leaf [R, d] are their states."""
        bare = bare_rows(self.batch.student, rows.student, rows)
        if self.fused:
            return replace(bare, hidden=leaf)
        hidden = leaf if self.method.needs.hidden else None
        bare = self._tables(bare, self.network.model)
        with autocast(leaf.device, self.precision):
            return replace(bare, logits=self.network.logits(leaf), hidden=hidden)

    def method_scalars(self, rows: Rows, side: SideName) -> Tensor:
        """`Method.scalars` under the harness's precision."""
        with autocast(rows.token.device, self.precision):
            return self.method.scalars(rows, side, self.guide.tables, self.modules)

    def bare(self) -> Rows:
        """All of the student's rows, without logits and states."""
        side = self.batch.student
        (whole,) = all_rows(side, self._chunks, len(side.position))
        return bare_rows(side, whole.student, whole)

    def _bare_teacher(self) -> Rows:
        side = self.batch.teacher
        (whole,) = all_rows(side, self._chunks, len(side.position))
        return bare_rows(side, whole.student, whole)

    def _teacher_rows(self) -> Iterator[Rows]:
        """All of the teacher's rows with their logits, a block at a time."""
        side = self.batch.teacher
        for part in all_rows(side, self._chunks, self.block_rows):
            rows = self._tables(bare_rows(side, part.student, part), self.teacher.side.model)
            yield self._with_logits(rows, side.position[part.student])

    def _with_logits(self, rows: Rows, position: Tensor) -> Rows:
        assert self.states is not None
        states = self.states[position]
        hidden = states if self.method.needs.teacher_hidden else None
        return replace(rows, logits=self.teacher.logits(states), hidden=hidden)

    def _tables(self, rows: Rows, model: Any) -> Rows:
        """With the model's tables, where the method asks for them."""
        if not self.method.needs.embeddings:
            return rows
        inner = models.base_model(model)
        embedding = inner.get_input_embeddings().weight.detach()
        return replace(
            rows, embedding=embedding, head=inner.get_output_embeddings().weight.detach()
        )


def bare_rows(side: SideBatch, index: Tensor, block: BlockRows) -> Rows:
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
        input=side.input[index],
    )


def _byte_places(batch: Batch, rows: Rows) -> Tensor:
    """Where the bytes of the rows' chunks lie in the bytes of all documents joined, [N]."""
    width = torch.where(rows.chunk >= 0, rows.byte_end - rows.byte_start, 0)
    row, offset = ops.ragged(width)
    return (batch.first_bytes()[rows.document] + rows.byte_start)[row] + offset


def _bytes_in(rows: Rows) -> int:
    return int(torch.where(rows.chunk >= 0, rows.byte_end - rows.byte_start, 0).sum())
