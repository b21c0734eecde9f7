"""SimCT: cross-tokenizer distillation over jointly tokenizable units (arXiv 2605.07711).

A text is cut into units, the chunks: pieces that both sides spell in whole tokens, with the same
bytes. At a unit's
start both sides score the shared vocabulary (byte-equal tokens and specials of the same role) and,
where the unit v_1..v_k takes more than one token on a side, the unit itself:
    score(v) = log p(v | .),    score(unit) = (1/k) sum_j log p(v_j | .),
each side by its own tokens. Other units are not scored there, that would take further forwards.
    L = mean over unit starts of KL( q_S || q_T ),    q = softmax of the scores: reverse KL, no CE.
It is meant for the student's own text (on-policy) and runs on a corpus as well.

Public code (sunjie279/SimCT-, `span_ctkd`), by option:
score = logit: scores are the logits themselves and their mean over the unit's tokens. For a unit of
one token this is the same, for longer ones it is not invariant to a shift of a row's logits.
segmentation = code: the code closes a unit only at a token that both sides have in common, so a
mismatch is one unit with all that follows up to and including the next 1:1 chunk, and one at the
end of a document is dropped.
The code divides by the number of tokens, not of units; it finds the shared vocabulary by string.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ctdbench import ops, pieces
from ctdbench.errors import UserError
from ctdbench.method import Block, Method, MethodOptions, Needs, PairTables, Rows, Term

META = {
    "title": "SimCT: reverse KL on the shared vocabulary and the unit that came",
    "paper": "2605.07711",
    "year": 2026,
    "needs": ["teacher logits"],
    "cost": "one softmax a side",
    "on_policy": True,
    "ce": False,  # as published
    "floor": "zero",
}

ABSENT = -1e9  # score without mass; finite, because 0 * (inf - inf) is not a number


class SimCTOptions(MethodOptions):
    """Options of `simct`; the defaults are the paper's."""

    ce_weight: float = Field(
        0.0, ge=0, description="Weight of cross-entropy on the student's own tokens."
    )
    score: Literal["logprob", "logit"] = Field(
        "logprob", description="What is averaged over a unit: logprob (the paper) or logit (code)."
    )
    segmentation: Literal["bytes", "code"] = Field(
        "bytes",
        description="Units: the chunks (the paper), or mismatches joined to the next shared token.",
    )


class SimCT(Method):
    """Reverse KL at unit starts, over the shared vocabulary and the start's own unit."""

    Options = SimCTOptions
    options: SimCTOptions

    @property
    def needs(self) -> Needs:
        """Teacher logits; whole documents where units are joined."""
        return Needs(whole_documents=self.options.segmentation == "code")

    def check(self, pair: PairTables) -> None:
        """Raises UserError if the two vocabularies have nothing in common."""
        if not len(pair.shared):
            raise UserError(
                "method simct compares shared tokens, and the two vocabularies share none",
                "use a method such as uld or bld",
            )

    def terms(self, block: Block, modules: Mapping[str, nn.Module]) -> dict[str, Term]:
        """`simct`: the KL in nats, and the number of unit starts."""
        units = self._units(block)
        shared = block.pair.shared.to(units.student.token.device).T
        terms = partial(self._totals, shared=shared)
        totals = pieces.totals(terms, units, pieces.by_chunks(units))
        return {"simct": Term(totals["simct"], units.student.chunk.new_tensor(units.chunks))}

    def counts(self, block: Block) -> Mapping[str, Tensor]:
        """Unit starts."""
        units = self._units(block)
        return {"simct": units.student.chunk.new_tensor(units.chunks)}

    def _units(self, block: Block) -> Block:
        """The block with units for chunks: every one has rows on both sides."""
        sides = (block.student, block.taught())
        sizes = torch.stack([_sizes(side.chunk, block.chunks) for side in sides])
        single, kept = (sizes == 1).all(0), (sizes > 0).all(0)
        ends = kept
        if self.options.segmentation == "code":
            ends = single
            document = _documents(block.student, block.chunks)
            kept = kept & (_following(document, single) == document)
        unit = torch.where(kept, ends.cumsum(0) - ends.long(), -1)
        unit = nn.functional.pad(unit, (0, 1), value=-1)  # what chunk -1 finds
        student, teacher = (replace(side, chunk=unit[side.chunk]) for side in sides)
        return replace(block, student=student, teacher=teacher, chunks=int(ends.sum()))

    def _totals(self, units: Block, shared: Tensor) -> dict[str, Tensor]:
        sides = (units.student, units.taught())
        sizes = torch.stack([_sizes(side.chunk, units.chunks) for side in sides])
        long = (sizes > 1).any(0)
        student, teacher = (
            self._scores(side, count, long, columns)
            for side, count, columns in zip(sides, sizes, shared, strict=True)
        )
        return {"simct": ops.reverse_kl(student, teacher.log_softmax(-1)).sum()}

    def _scores(self, rows: Rows, sizes: Tensor, long: Tensor, shared: Tensor) -> Tensor:
        """Scores of the shared vocabulary and of the own unit at the units' starts, [U, M + 1].

        A softmax knows no shift, so the shared tokens keep their logits and the own unit's mean
        log-probability is raised by the first row's normaliser instead.
        """
        logits, unit = rows.scores(), rows.chunk
        first = torch.full_like(long, len(unit), dtype=torch.long)
        first = first.scatter_reduce(0, unit, torch.arange(len(unit)).to(unit), "amin")
        spelled = torch.nonzero(long[unit]).squeeze(1)
        scores = logits.index_select(0, spelled)
        came = scores.gather(1, rows.token[spelled, None]).squeeze(1)
        norm = torch.zeros_like(came)
        if self.options.score == "logprob":
            norm = scores.logsumexp(-1)
        sums = ops.segment_sum(came - norm, unit[spelled], len(long))
        shift = came.new_zeros(len(unit)).index_copy(0, spelled, norm)[first]
        own = torch.where(long, sums / sizes + shift, ABSENT)
        others = ops.rows_of(logits, first).index_select(1, shared)
        return torch.cat([others, own[:, None]], 1)


def _sizes(segment: Tensor, segments: int) -> Tensor:
    """Number of rows of every segment, [segments]; segment [R], -1 for rows outside."""
    return torch.bincount(segment[segment >= 0], minlength=segments)


def _documents(rows: Rows, chunks: int) -> Tensor:
    """The document of every chunk, [chunks]; -1: the chunk has no row."""
    last = ops.last_rows(rows.chunk, chunks)
    return torch.where(last >= 0, rows.document[last], -1)


def _following(values: Tensor, marked: Tensor) -> Tensor:
    """The value at the next marked place, itself included, [C]; -2: none follows."""
    candidates = nn.functional.pad(values[marked], (0, 1), value=-2)
    return candidates[marked.cumsum(0) - marked.long()]


METHOD = SimCT
