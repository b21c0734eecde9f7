"""DSKD: Dual-Space Knowledge Distillation with cross-model attention (arXiv 2406.17328).

Each model's states are brought into the other's space and read out by the other's head. Within a
document every scored row of one side attends to all scored rows of the other; E is an embedding
table, x the token read, y the label, H the states, d_T the teacher's channels, [;] joins channels:
    A = query([E_S(x); E_S(y)]) K^T / sqrt(2 d_T),    K = [E_T(x); E_T(y)] / std,
    t2s = softmax_T(A)   t2s(H_T / std + E_T(y) / std) head_S^T    the student's vocabulary,
    s2t = softmax_S(A^T) s2t(H_S) head_T^T                         the teacher's vocabulary;
query, t2s and s2t are linear layers with biases, trained beside the student at a rate of 1e-3.
Tables and heads have no gradient. With all softmaxes at temperature tau (no tau^2 factor):
    t2s_ce = CE of t2s on the labels,
    t2s_kd = KL( t2s / tau_T || z_S ) on the rows where t2s predicts the label, t2s detached,
    s2t_kd = KL( z_T || s2t ) on the teacher's rows.
All three, like CE, are divided by the number of the student's scored rows:
    L = 0.5 CE + 0.5 (t2s_ce + t2s_kd + s2t_kd).
tau = 2 is that of the paper's scripts (the code's own default is 1); of the code's divergences this
is the forward KL. Heads are read without soft-capping, as there.

A std is that of a whole tensor, with n - 1: of K, of H_T, of E_T(y), unscored rows included, with
id 0 as their tokens (public code). There it is of one padded micro-batch; here of the global batch,
from sums that `prepare` takes, so that neither blocks nor micro-batches nor processes change the
loss. A tensor that does not vary is divided by 1. A document with scored rows on one side alone has
nothing to attend to: its rows are in the count only (public code: they attend to padding).

Blocks are whole documents, and so are both sides' logits, and A [n_S, n_T] over all documents of a
block. The logits of t2s and s2t are made some rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from ctdbench import ops, pieces
from ctdbench.errors import UserError
from ctdbench.method import (
    Block,
    Method,
    MethodOptions,
    Needs,
    PairInfo,
    Rows,
    SideName,
    Term,
    Trainable,
)

META = {
    "title": "DSKD: each model's states in the other's space, by cross-model attention",
    "paper": "2406.17328",
    "year": 2024,
    "needs": ["teacher logits", "hidden states", "embeddings"],
    "cost": "softmaxes, attention",
    "floor": "none: the projectors are its own",
    "exceptions": {
        "teacher ids": "token 0 stands for unscored rows in the standard deviation (public code)",
    },
}

TERMS = ("t2s_ce", "t2s_kd", "s2t_kd")
ROUNDING = 1e-12  # share of the sum of squares below which a variance is rounding, no variance


class DSKDOptions(MethodOptions):
    """Options of `dskd`; the defaults are the paper's."""

    ce_weight: float = Field(
        0.5, ge=0, description="Weight of cross-entropy on the student's own tokens."
    )
    kd_weight: float = Field(0.5, ge=0, description="Weight of each of the three terms.")
    kd_temperature: float = Field(2.0, gt=0, description="Softmax temperature of both KL terms.")
    teacher_temperature: float = Field(
        1.0, gt=0, description="Further temperature of t2s where it is the student's target."
    )
    projector_learning_rate: float = Field(
        1e-3, gt=0, description="Learning rate of the projectors."
    )


class DSKD(Method):
    """CE and KL in both output spaces, through projectors and cross-model attention."""

    Options = DSKDOptions
    options: DSKDOptions

    @property
    def needs(self) -> Needs:
        """Logits, states and tables of both sides, whole documents, and sums over the batch."""
        return Needs(
            hidden=True,
            teacher_hidden=True,
            embeddings=True,
            pairing="documents",
            prepare="batch",
            reduce="sum",
        )

    def weights(self) -> Mapping[str, float]:
        """The same for all three."""
        return dict.fromkeys(TERMS, self.options.kd_weight)

    def modules(self, pair: PairInfo) -> dict[str, Trainable]:
        """`query` 2 d_S -> 2 d_T, `t2s` d_T -> d_S, `s2t` d_S -> d_T."""
        own, taught = pair.student_width, pair.teacher_width
        sizes = {"query": (2 * own, 2 * taught), "t2s": (taught, own), "s2t": (own, taught)}
        rate = self.options.projector_learning_rate
        return {name: Trainable(nn.Linear(*size), rate) for name, size in sizes.items()}

    def prepare(self, teacher: Rows) -> Tensor:
        """Of K, H_T and E_T(y): number, sum, sum of squares of the entries, [3, 3] float64."""
        hidden, embedded = (part.double() for part in _states(teacher, "teacher"))
        values = (embedded, hidden, embedded[:, hidden.shape[1] :])
        sums = [torch.stack([v.new_tensor(v.numel()), v.sum(), v.square().sum()]) for v in values]
        return torch.stack(sums)

    def terms(self, block: Block, modules: Mapping[str, nn.Module]) -> dict[str, Term]:
        """`t2s_ce`, `t2s_kd` and `s2t_kd`: sums in nats, and the student's scored rows for each."""
        with torch.autocast(block.student.token.device.type, enabled=False):
            totals = self._totals(block, modules)
        counts = self.counts(block)
        return {name: Term(total, counts[name]) for name, total in totals.items()}

    def counts(self, block: Block) -> Mapping[str, Tensor]:
        """The student's scored rows, the one denominator of all terms."""
        return dict.fromkeys(TERMS, block.student.scored().sum())

    def _totals(self, block: Block, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        student, teacher = _sides(block.student, block.taught())
        t2s, s2t = _projected(student, teacher, _deviations(block.batch), modules)
        return {
            **self._in_student_space(block.student, student, t2s),
            **self._in_teacher_space(block.taught(), teacher, s2t),
        }

    def _in_student_space(self, rows: Rows, student: _Side, t2s: Tensor) -> dict[str, Tensor]:
        """`t2s_ce` and `t2s_kd`, some rows' logits at a time, read out of t2s's states."""
        tau, tau_teacher = self.options.kd_temperature, self.options.teacher_temperature
        parts = pieces.by_rows(student.row, len(student.head))
        place = torch.zeros_like(rows.token)
        place[student.row] = torch.arange(len(student.row), device=place.device)

        def totals(number: int, own: Tensor, states: Tensor) -> dict[str, Tensor]:
            label = rows.token[parts[number]]
            logits = student.logits(states[place[parts[number]]])
            right = torch.nonzero(logits.argmax(-1) == label)[:, 0]
            target = logits.detach()[right] / (tau * tau_teacher)
            return {
                "t2s_ce": nn.functional.cross_entropy(logits, label, reduction="sum"),
                "t2s_kd": _divergence(target, own.index_select(0, right) / tau),
            }

        return pieces.summed(totals, parts, _widened(rows.scores()), t2s)

    def _in_teacher_space(self, rows: Rows, teacher: _Side, s2t: Tensor) -> dict[str, Tensor]:
        """`s2t_kd`, some rows' logits at a time, read out of s2t's states."""
        tau, scores = self.options.kd_temperature, rows.scores().detach()
        parts = pieces.by_rows(torch.arange(len(s2t)).to(s2t.device), len(teacher.head))

        def totals(number: int, states: Tensor) -> dict[str, Tensor]:
            target = _widened(scores[teacher.row[parts[number]]]) / tau
            return {"s2t_kd": _divergence(target, teacher.logits(states) / tau)}

        return pieces.summed(totals, parts, s2t)


class _Side(NamedTuple):
    """The n rows of one side that take part: places, documents, states and `_states`' embeddings;
    and how the model reads states out."""

    row: Tensor
    document: Tensor
    hidden: Tensor
    embedded: Tensor
    head: Tensor

    def logits(self, states: Tensor) -> Tensor:
        """[M, V] of states [M, d], multiplied in the head's own precision."""
        return _widened(nn.functional.linear(states.to(self.head.dtype), self.head))


def _sides(student: Rows, teacher: Rows) -> tuple[_Side, _Side]:
    """The scored rows of the documents that have some on both sides."""
    own, taught = student.scored(), teacher.scored()
    kept = own & torch.isin(student.document, teacher.document[taught])
    kept_teacher = taught & torch.isin(teacher.document, student.document[own])
    return _side(student, kept, "student"), _side(teacher, kept_teacher, "teacher")


def _side(rows: Rows, kept: Tensor, name: SideName) -> _Side:
    row = torch.nonzero(kept)[:, 0]
    hidden, embedded = (_widened(part[row]) for part in _states(rows, name))
    if rows.head is None:
        raise TypeError("dskd reads states out by the heads; set Needs(embeddings=True)")
    head = rows.head.detach()[: rows.scores().shape[1]]  # a padded table has rows of no token
    return _Side(row, rows.document[row], hidden, embedded, head)


def _states(rows: Rows, name: SideName) -> tuple[Tensor, Tensor]:
    """States [R, d], and embeddings of the token read and of the label [R, 2 d]; id 0 where the row
    is not scored or has read nothing. Raises UserError for embeddings that are not d wide."""
    if rows.hidden is None or rows.embedding is None:
        raise TypeError("dskd reads states and tables; set Needs(hidden=True, embeddings=True)")
    width, states = rows.embedding.shape[1], rows.hidden.shape[1]
    if width != states:
        raise UserError(
            f"dskd: the {name}'s embeddings have {width} channels, its states {states}",
            "dskd serves models whose embeddings are as wide as their states; try another method",
        )
    ids = torch.stack([rows.inputs(), rows.token], 1)
    ids = torch.where(rows.scored()[:, None], ids, 0).clamp(min=0)
    return rows.hidden, nn.functional.embedding(ids, rows.embedding.detach()).flatten(1)


def _deviations(sums: Tensor | None) -> Tensor:
    """Standard deviations out of `prepare`'s sums over the batch, [3] float64; 1 for a constant."""
    if sums is None:
        raise TypeError("dskd scales by the whole batch's deviations; see Needs(prepare=..)")
    number, total, squares = sums.unbind(1)
    variance = (squares - total.square() / number) / (number - 1)  # not a number for n < 2
    return torch.where(variance * number > ROUNDING * squares, variance, 1).sqrt()


def _projected(
    student: _Side, teacher: _Side, deviations: Tensor, modules: Mapping[str, nn.Module]
) -> tuple[Tensor, Tensor]:
    """The states t2s [n_S, d_S], which the student's head reads, and s2t [n_T, d_T]."""
    of_keys, of_states, of_labels = deviations
    width = teacher.hidden.shape[1]
    scores = _mapped(modules["query"], student.embedded) @ (teacher.embedded / of_keys).T
    apart = student.document[:, None] != teacher.document  # never a whole row or column
    scores = (scores / math.sqrt(2 * width)).masked_fill(apart, -torch.inf)
    labels = teacher.embedded[:, width:] / of_labels
    values = _mapped(modules["t2s"], teacher.hidden.detach() / of_states + labels)
    s2t = scores.T.softmax(1) @ _mapped(modules["s2t"], student.hidden)
    return scores.softmax(1) @ values, s2t


def _mapped(projector: nn.Module, values: Tensor) -> Tensor:
    """Multiplied in the projector's own precision."""
    return _widened(projector(values.to(next(projector.parameters()).dtype)))


def _widened(values: Tensor) -> Tensor:
    """In float32; in float64 if they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Sum over rows of KL( softmax(target) || softmax(logits) ), [n, V] each."""
    return ops.forward_kl(logits, target.softmax(-1), target.log_softmax(-1)).sum()


METHOD = DSKD
