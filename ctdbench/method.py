"""The contract a method fulfils: `Rows`, `Block`, `Term`, `Method`; and `probe` to call one alone.

A method is a loss over an aligned block of two models' predictions. The harness owns everything
else: data order, optimizer, precision, schedule, budget and memory. So a method never shifts
labels, never loops over documents and never averages: it returns sums and their counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ctdbench import ops, pieces, registry
from ctdbench.errors import UserError
from ctdbench.rows import (
    Block,
    ByteEstimator,
    PairTables,
    Rows,
    Scalars,
    SideName,
    Term,
    bare,
    checked,
)

__all__ = [
    "Block",
    "ByteEstimator",
    "Method",
    "MethodOptions",
    "Needs",
    "PairInfo",
    "PairTables",
    "Rows",
    "Scalars",
    "SideName",
    "Term",
    "Trainable",
    "bare",
    "create",
    "cross_entropy",
    "mean",
    "probe",
    "probe_gradient",
    "total_loss",
]


@dataclass(frozen=True)
class Needs:
    """What a method asks of the harness.

    kind: "blocks" (the method writes `terms`), or "scalars" (`scalars`, `totals`, `combine`).
    teacher_logits: the teacher's logits per row. hidden: the student's states per row.
    teacher_hidden: the teacher's, too.
    embeddings: the tables of embeddings and head of both models.
    pairing: "chunks" (byte-aligned, see `same_bytes`), "positions" (k-th supervised token with the
        k-th), "own" (`Method.pairs`), or "documents": a block is all supervised rows of whole
        documents.
    bytes: estimator of the teacher's byte distributions, or None.
    end_bin: column 256 of `bytes` is the mass of the teacher's token ending (`path` only).
    skip_last_student_token: leave the student's last supervised token of a document out of the
        pairs (positions only).
    whole_documents: no block cuts a document (chunks only), for a loss that joins chunks.
    prepare: `Method.prepare` sees all of the teacher's rows of the global batch, or of each
        micro-batch, before the first of its blocks. reduce: how its results are joined.
    text: "corpus", or "teacher": the teacher's continuations of the corpus's prompts.
    """

    kind: Literal["blocks", "scalars"] = "blocks"
    teacher_logits: bool = True
    hidden: bool = False
    teacher_hidden: bool = False
    embeddings: bool = False
    pairing: Literal["chunks", "positions", "own", "documents"] = "chunks"
    bytes: ByteEstimator | None = None
    end_bin: bool = False
    skip_last_student_token: bool = False
    whole_documents: bool = False
    prepare: Literal["batch", "microbatch"] | None = None
    reduce: Literal["max", "sum"] = "max"
    text: Literal["corpus", "teacher"] = "corpus"

    def __post_init__(self) -> None:
        for name, allowed in _allowed().items():
            if getattr(self, name) not in allowed:
                told = ", ".join(map(repr, allowed))
                raise UserError(f"Needs({name}={getattr(self, name)!r})", f"it is one of {told}")

    @property
    def teacher(self) -> bool:
        """Whether any teacher has to run."""
        return self.teacher_logits or self.bytes is not None

    @property
    def same_bytes(self) -> bool:
        """Whether chunks go whose sides spell different bytes, for they are compared by token.

        Such is " Start" beside "Start", where one side is SentencePiece's. What is read of each
        side by itself (kind "scalars", `bytes`) is not touched by it. `Method.pairs` is held to the
        same: no pair of rows of which one alone predicts that space.
        """
        return self.kind == "blocks" and self.teacher_logits and self.pairing == "chunks"

    @property
    def teacher_states(self) -> bool:
        """Whether the teacher's states over the documents are read; the beam runs it by itself."""
        return self.teacher_logits or self.bytes not in (None, "beam")


@cache
def _allowed() -> dict[str, tuple[Any, ...]]:
    """The values that every field of `Needs` may have."""
    hints = get_type_hints(Needs)
    return {name: tuple(_values(hint)) for name, hint in hints.items()}


def _values(hint: Any) -> Iterator[Any]:
    if hint is bool:
        yield from (False, True)
    elif hint is type(None):
        yield None
    elif get_origin(hint) is Literal:
        yield from get_args(hint)
    else:  # a union
        for part in get_args(hint):
            yield from _values(part)


class MethodOptions(BaseModel):
    """Base of every method's options: frozen, nothing unknown, every field described."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True
    )

    ce_weight: float = Field(
        1.0, ge=0, description="Weight of cross-entropy on the student's own tokens."
    )


@dataclass(frozen=True)
class Trainable:
    """A module trained beside the student and dropped when the student is saved."""

    module: nn.Module
    learning_rate: float | None = None  # None: the student's
    keep: bool = False  # saved with the cell, for it tells something


@dataclass(frozen=True)
class PairInfo:
    """What `Method.modules` may read: channels of the two models, and the pair's tables."""

    student_width: int
    teacher_width: int
    tables: PairTables


class Method:
    """A loss over an aligned block of two models' predictions.

    Subclass it, set `Options`, write `terms`. A loss that joins rows over any distance but reads
    little of each one is of kind "scalars" instead: it writes `scalars`, `totals` and `combine`.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    balance: ClassVar[Literal["fixed", "ratio", "gradmag"]] = "fixed"  # as published

    def __init__(self, options: MethodOptions) -> None:
        self.options = options

    @property
    def needs(self) -> Needs:
        """What the harness has to provide."""
        return Needs()

    def check(self, pair: PairTables) -> None:
        """Raises UserError, with the reason, if the method cannot serve this pair."""

    def weights(self) -> Mapping[str, float]:
        """Weight of each term in the loss; a term not named has weight 1."""
        return {}

    def modules(self, pair: PairInfo) -> dict[str, Trainable]:
        """Extra trainable modules, by name."""
        return {}

    def pairs(self, student: Rows, teacher: Rows, pair: PairTables) -> Tensor:
        """Pairing "own": [P, 2] int64, student row and teacher row, from whole documents.

        The rows carry no logits and no states. A student row is named at most once; supervised
        ones that are not named arrive in blocks of their own, with no pairs.
        """
        raise self._unwritten("pairs(student, teacher, pair)")

    def prepare(self, teacher: Rows) -> Tensor:
        """What a loss must know of the whole batch before its first block; `Needs.prepare` asks.

        Called without gradient, any number of times, with some of the teacher's rows each (with
        logits, of chunks or not, maybe none). Every result has the same shape; `Block.batch` is
        their elementwise maximum or sum (`Needs.reduce`) over all rows, whatever the blocks,
        micro-batches and processes.
        """
        raise self._unwritten("prepare(teacher)")

    def terms(self, block: Block, modules: Mapping[str, nn.Module]) -> dict[str, Term]:
        """The method's terms on one block; of kind "scalars", on a block that is all there is."""
        if self.needs.kind == "blocks":
            raise self._unwritten("terms(block, modules)")
        own, taught = block.student, block.taught()
        student = Scalars(self.scalars(own, "student", block.pair, modules), bare(own))
        values = self.scalars(taught, "teacher", block.pair, modules).detach()
        teacher = Scalars(values, bare(taught))
        return self.combine(student, teacher, self.totals(student.rows, teacher))

    def scalars(
        self, rows: Rows, side: SideName, pair: PairTables, modules: Mapping[str, nn.Module]
    ) -> Tensor:
        """Kind "scalars": all that the loss needs of every row, [R, m], each row by itself."""
        raise self._unwritten("scalars(rows, side, pair, modules)")

    def totals(self, student: Rows, teacher: Scalars) -> dict[str, Tensor]:
        """Kind "scalars": sums over this batch that `combine` needs over the whole global batch.

        At least every term's count, by its name. They follow from tokens, chunks and the teacher.
        """
        raise self._unwritten("totals(student, teacher)")

    def combine(
        self, student: Scalars, teacher: Scalars, totals: Mapping[str, Tensor]
    ) -> dict[str, Term]:
        """Kind "scalars": the terms on a batch of whole documents, differentiable in `student`.

        totals: those of the global batch. A term's count is that of this batch alone.
        """
        raise self._unwritten("combine(student, teacher, totals)")

    def _unwritten(self, signature: str) -> UserError:
        name = signature.partition("(")[0]
        return UserError(f"method {type(self).__name__} has no {name}()", f"write {signature}")

    def counts(self, block: Block) -> Mapping[str, Tensor] | None:
        """The terms' counts from a block without logits and states, where they are cheap to tell.

        None (the default): the harness learns them by calling `terms` on rows of zeros.
        """
        return None


def cross_entropy(rows: Rows) -> Term:
    """Cross-entropy of the tokens that came, over the supervised rows: nats, and their number."""
    scored = rows.scored()
    logits = rows.scores()
    parts = pieces.by_rows(torch.nonzero(scored).squeeze(1), logits.shape[1])

    def nll(number: int, scores: Tensor) -> dict[str, Tensor]:
        label = rows.token[parts[number]]
        return {"nll": nn.functional.cross_entropy(scores, label, reduction="sum")}

    return Term(pieces.summed(nll, parts, logits)["nll"], scored.sum())


def create(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """The method called `name`; raises UserError for an unknown name or option."""
    method_class = registry.load_method(name)
    return method_class(registry.validate(method_class.Options, options or {}, f"method {name}"))


def total_loss(method: Method, ce: Term | None, terms: Mapping[str, Term]) -> Tensor:
    """The loss from whole-batch terms: weighted sum of means; an empty term counts as zero."""
    weights = method.weights()
    parts = [weights.get(name, 1.0) * mean(term) for name, term in terms.items()]
    if ce is not None:
        parts.append(method.options.ce_weight * mean(ce))
    return torch.stack(parts).sum()


def mean(term: Term) -> Tensor:
    """total / count, and 0 for an empty term."""
    return term.total / term.count.clamp(min=1)


def probe(
    name: str | Method,
    student: Rows,
    teacher: Rows,
    pair: PairTables,
    *,
    pairs: Any = None,
    weights: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, float]:
    """Evaluate a method on given rows with no model at all.

    student, teacher: rows of both sides; `pairs` [P, 2] for methods that pair rows. `weights`: the
    tensors of the method's modules, keyed `module.parameter`. Returns every term as its mean, `ce`,
    and `loss`.
    """
    values, loss = _evaluate(name, student, teacher, pair, pairs, weights, options)
    return {
        **{key: float(mean(term).detach()) for key, term in values.items()},
        "loss": float(loss.detach()),
    }


def probe_gradient(
    name: str | Method,
    student: Rows,
    teacher: Rows,
    pair: PairTables,
    *,
    pairs: Any = None,
    weights: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[dict[str, float], np.ndarray]:
    """As `probe`, with the gradient of `loss` with respect to the student's logits, [R, V]."""
    leaf = student.scores().detach().clone().requires_grad_()
    rows = replace(student, logits=leaf)
    values, loss = _evaluate(name, rows, teacher, pair, pairs, weights, options)
    gradient = torch.zeros_like(leaf)
    if loss.requires_grad:
        (taken,) = torch.autograd.grad(loss, leaf, allow_unused=True)
        gradient = gradient if taken is None else taken
    numbers = {key: float(mean(term).detach()) for key, term in values.items()}
    return {**numbers, "loss": float(loss.detach())}, gradient.numpy()


def _evaluate(
    name: str | Method,
    student: Rows,
    teacher: Rows,
    pair: PairTables,
    pairs: Any,
    weights: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> tuple[dict[str, Term], Tensor]:
    method = create(name, options) if isinstance(name, str) else name
    method.check(pair)
    block = _block(method, student, teacher, pair, pairs)
    widths = [0 if rows.hidden is None else rows.hidden.shape[1] for rows in (student, teacher)]
    modules = {
        key: extra.module
        for key, extra in method.modules(PairInfo(widths[0], widths[1], pair)).items()
    }
    if weights is not None:
        state = {key: torch.as_tensor(np.asarray(value)) for key, value in weights.items()}
        nn.ModuleDict(modules).load_state_dict(state)
    terms = checked(method.terms(block, modules))
    ce = cross_entropy(student)
    return {"ce": ce, **terms}, total_loss(method, ce, terms)


def _block(method: Method, student: Rows, teacher: Rows, pair: PairTables, pairs: Any) -> Block:
    chunks = 1 + int(torch.cat([student.chunk, teacher.chunk, torch.tensor([-1])]).max())
    documents = 1 + int(student.document.max()) if student.document.numel() else 0
    if pairs is None and method.needs.pairing == "own":
        pairs = method.pairs(bare(student), bare(teacher), pair)
    if pairs is not None:
        pairs = torch.as_tensor(np.asarray(pairs)).long().reshape(-1, 2)
        counted = student.document[pairs[:, 0]]
    else:
        counted = _chunk_documents(student, teacher)
    distributions = None
    if method.needs.bytes is not None:
        distributions = _probe_bytes(method.needs, student, teacher, pair)
    batch = None
    if method.needs.prepare:
        with torch.no_grad():
            batch = method.prepare(teacher)
    return Block(
        student=student,
        teacher=teacher,
        chunks=chunks,
        document_chunks=torch.bincount(counted, minlength=documents),
        pairs=pairs,
        bytes=distributions,
        pair=pair,
        batch=batch,
    )


def _chunk_documents(student: Rows, teacher: Rows) -> Tensor:
    """The document of every chunk that has rows on both sides, one entry a chunk."""
    taught = student.chunk[torch.isin(student.chunk, teacher.chunk) & (student.chunk >= 0)]
    first = {
        int(chunk): int(doc) for chunk, doc in zip(student.chunk, student.document, strict=True)
    }
    return torch.tensor([first[int(chunk)] for chunk in taught.unique()], dtype=torch.long)


def _probe_bytes(needs: Needs, student: Rows, teacher: Rows, pair: PairTables) -> Tensor:
    if needs.bytes == "beam":
        raise UserError(
            "probe has no model, so it cannot run bytes='beam'", "use bytes='path' or 'mixed'"
        )
    probabilities = teacher.scores().softmax(-1)
    return ops.byte_distributions(
        pair.teacher_trie,
        probabilities,
        teacher.token,
        teacher.byte_end - teacher.byte_start,
        teacher.document,
        select=teacher.chunk >= 0,
        estimator=needs.bytes or "mixed",
        end_bin=needs.end_bin,
    )
