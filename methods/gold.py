"""GOLD: General Online Logit Distillation (TRL's experimental GOLD trainer, October 2025).

A chunk has one distribution a side: its last row's, times the probability of the tokens that came
before it (chain rule; not renormalised),
    m(y) = p_k(y) * prod_{j<k} max(p_j(token_j), 1e-8),    p = softmax(logits / T).
C are the vocabulary pairs: byte-equal tokens and specials of the same role, one to one.
    matched   = JSD_beta(m_S, m_T) summed over C, both clamped to at least 1e-8:
                beta = 0 (default): forward KL; beta = 1: reverse KL; else, with
                mix = (1 - beta) m_S + beta m_T, beta KL(m_T || mix) + (1 - beta) KL(m_S || mix)
    unmatched = L1 distance of the rest, each side sorted, the shorter one zero-padded
    L = w_m matched + w_u unmatched (+ ce_weight CE, 0 as in the reference),
mean over those of a document's chunks that both sides spell with the same bytes, then over
documents. w_m = w_u = 1 (default); adaptive: w_m times |C| over the teacher's vocabulary, w_u times
what is left of 1. hybrid = false: C is empty, so the whole vocabulary is unmatched (`uld` on
chunks).

On a chunk of one token a student logit j outside C has, for beta = 0 and unmatched_weight = 0, the
gradient p_S[j] * (teacher's mass on C) >= 0: what the teacher cannot spell in one token (Llama's
three-digit numbers, for Qwen) is suppressed.

TRL: its defaults are hybrid = false, beta = 0.5, adaptive; it is meant to run on the student's own
text. Its merge strategy `bayesian` is the one above; its default, `observed`, multiplies the row
*after* a token by that token's probability, which is off by one, and is not offered here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from ctdbench import ops, pieces
from ctdbench.method import Block, Method, MethodOptions, Term

META = {
    "title": "GOLD: JSD on the shared vocabulary, sorted L1 on the rest",
    "paper": "",
    "year": 2025,
    "needs": ["teacher logits"],
    "cost": "one sort a side",
    "on_policy": True,
    "url": "https://github.com/huggingface/trl",
    "ce": False,  # as published
    "floor": "zero",
}

Splits = tuple[ops.Columns, ops.Columns]  # student's and teacher's
FLOOR = 1e-8  # below this a probability is this, and has no gradient (as in the reference)


class GOLDOptions(MethodOptions):
    """Options of `gold`; TRL's own defaults are hybrid=false, beta=0.5, weighting=adaptive."""

    ce_weight: float = Field(
        0.0, ge=0, description="Weight of cross-entropy on the student's own tokens."
    )
    hybrid: bool = Field(
        True, description="Compare the shared vocabulary token by token; false: sort everything."
    )
    beta: float = Field(
        0.0, ge=0, le=1, description="0: forward KL, 1: reverse KL, between: generalized JSD."
    )
    matched_weight: float = Field(1.0, ge=0, description="Weight of the shared vocabulary's term.")
    unmatched_weight: float = Field(1.0, ge=0, description="Weight of the sorted distance.")
    weighting: Literal["fixed", "adaptive"] = Field(
        "fixed",
        description="adaptive: the two weights are also multiplied by the shared part of the "
        "teacher's vocabulary and by the rest of it.",
    )
    top: int | None = Field(
        None,
        ge=1,
        description="Sort this many of either side's largest masses alone; the distance is too "
        "small by at most the masses left out.",
    )
    temperature_student: float = Field(1.0, gt=0, description="Softmax temperature, student.")
    temperature_teacher: float = Field(1.0, gt=0, description="Softmax temperature, teacher.")


class GOLD(Method):
    """Generalized JSD on the shared vocabulary of merged chunks, sorted L1 on the rest."""

    Options = GOLDOptions
    options: GOLDOptions

    def weights(self) -> Mapping[str, float]:
        """w_m (hybrid) and w_u; what `adaptive` adds depends on the pair, in the terms."""
        options = self.options
        matched = {"matched": options.matched_weight} if options.hybrid else {}
        return {**matched, "unmatched": options.unmatched_weight}

    def terms(self, block: Block, modules: Mapping[str, nn.Module]) -> dict[str, Term]:
        """`matched`, `unmatched`: the sum over documents of their share in this block."""
        splits = _splits(block) if self.options.hybrid else None
        chunks = pieces.by_chunks(block)
        totals = pieces.totals(partial(self._totals, splits=splits), block, chunks)
        counts = self.counts(block)
        return {name: Term(total, counts[name]) for name, total in totals.items()}

    def counts(self, block: Block) -> Mapping[str, Tensor]:
        """Documents: every chunk counts 1/n of its document, which may reach over blocks."""
        names = ("matched", "unmatched") if self.options.hybrid else ("unmatched",)
        return dict.fromkeys(names, _shares(block, _rows(block)).sum())

    def _totals(self, block: Block, splits: Splits | None) -> dict[str, Tensor]:
        rows = _rows(block)
        sides = (block.student, block.taught())
        temperatures = (self.options.temperature_student, self.options.temperature_teacher)
        log_p, log_q = (
            ops.merged_chunks(side.scores(), side.token, side.chunk, last, block.chunks, heat)
            for side, last, heat in zip(sides, rows.T, temperatures, strict=True)
        )
        share = _shares(block, rows)
        distances = self._distances(log_p, log_q, splits)
        return {name: (value * share).sum() for name, value in distances.items()}

    def _distances(self, log_p: Tensor, log_q: Tensor, splits: Splits | None) -> dict[str, Tensor]:
        """Every term of every chunk: [M, V_S], [M, V_T] -> [M] each."""
        top = self.options.top
        if splits is None:
            return {"unmatched": ops.sorted_l1(ops.exp(log_p), ops.exp(log_q), top)}
        own, taught = splits
        (log_p, rest), (log_q, other) = own.split(log_p), taught.split(log_q)
        matched = generalized_jsd(log_p, log_q, self.options.beta)
        unmatched = ops.sorted_l1(ops.exp(rest), ops.exp(other), top)
        if self.options.weighting == "fixed":
            return {"matched": matched, "unmatched": unmatched}
        part = len(taught.some) / sum(map(len, taught))
        return {"matched": part * matched, "unmatched": (1 - part) * unmatched}


def generalized_jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """JSD_beta of rows that need not sum to 1, student's and teacher's: [M, n] twice -> [M]."""
    log_p, log_q = (masses.clamp(min=math.log(FLOOR)) for masses in (log_p, log_q))
    if beta == 0:
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if beta == 1:
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    p, q = log_p.exp(), log_q.exp()
    mix = ((1 - beta) * p + beta * q).log()
    return beta * (q * (log_q - mix)).sum(-1) + (1 - beta) * (p * (log_p - mix)).sum(-1)


def _splits(block: Block) -> Splits:
    """C and the rest of either vocabulary."""
    shared = block.pair.shared.to(block.student.token.device).T
    sizes = (side.scores().shape[1] for side in (block.student, block.taught()))
    own, taught = map(ops.Columns.of, shared, sizes)
    return own, taught


def _rows(block: Block) -> Tensor:
    return ops.last_row_pairs(block.student.chunk, block.taught().chunk, block.chunks)


def _shares(block: Block, rows: Tensor) -> Tensor:
    """1 / (number of chunks of the chunk's document in the whole batch), [M]."""
    return 1 / block.document_chunks[block.student.document[rows[:, 0]]]


METHOD = GOLD
