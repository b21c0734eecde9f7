"""Strict: reverse KL on shared tokens, where the two tokenizations agree (arXiv 2610.08448).

Only chunks of one token on each side count, of the same bytes. At such a token, with K the
teacher's `top` = 16 likeliest tokens of the shared vocabulary (byte-equal tokens and specials of
the same role), and both sides renormalised on K,
    L = mean over these chunks of KL( q_S || q_T ),    q = softmax of the logits in K.
No CE by default (`ce_weight`). Everything else the teacher says is thrown away, which makes it the
cheapest of the teacher-logit methods and a strong one.

renormalise = false: q are the probabilities under the whole vocabulary instead, which do not sum to
1 on K, so the sum over K may be negative.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from ctdbench import ops, pieces
from ctdbench.errors import UserError
from ctdbench.method import Block, Method, MethodOptions, PairTables, Term

META = {
    "title": "Strict: reverse KL on the teacher's top shared tokens, 1:1 chunks only",
    "paper": "2610.08448",
    "year": 2026,
    "needs": ["teacher logits"],
    "cost": "one top-k a side",
    "on_policy": True,
    "ce": False,  # as published
    "floor": "zero",
}


class StrictOptions(MethodOptions):
    """Options of `strict`; the defaults are the paper's."""

    ce_weight: float = Field(
        0.0, ge=0, description="Weight of cross-entropy on the student's own tokens."
    )
    top: int = Field(16, ge=1, description="How many of the teacher's shared tokens are compared.")
    renormalise: bool = Field(
        True, description="Renormalise both sides on the compared tokens before the KL."
    )


class Strict(Method):
    """Reverse KL on a few shared tokens, where one token meets one token."""

    Options = StrictOptions
    options: StrictOptions

    def check(self, pair: PairTables) -> None:
        """Raises UserError if the two vocabularies have nothing in common."""
        if not len(pair.shared):
            raise UserError(
                "method strict compares shared tokens, and the two vocabularies share none",
                "use a method such as uld or bld",
            )

    def terms(self, block: Block, modules: Mapping[str, nn.Module]) -> dict[str, Term]:
        """`strict`: the KL in nats, and the number of 1:1 chunks."""
        rows = _single_rows(block)
        own, taught = block.pair.shared.to(rows.device).T
        logits, scores = block.taught().scores().detach(), block.student.scores()
        parts = pieces.by_rows(rows[:, 1], logits.shape[1])
        tops = [self._top(logits[part], taught) for part in parts]
        top, teacher = (torch.cat(found) for found in zip(*tops, strict=True))
        student = scores[rows[:, :1], own[top]]
        if self.options.renormalise:
            student = student.log_softmax(-1)
        else:
            student = student - ops.rows_of(scores, rows[:, 0]).logsumexp(-1, keepdim=True)
        total = (student.exp() * (student - teacher)).sum()
        return {"strict": Term(total, rows.new_tensor(len(rows)))}

    def counts(self, block: Block) -> Mapping[str, Tensor]:
        """Chunks of one token on each side."""
        rows = _single_rows(block)
        return {"strict": rows.new_tensor(len(rows))}

    def _top(self, logits: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        """K of the teacher's rows [m, V_T] as places in `shared`, and log q there, [m, |K|]."""
        top = logits.index_select(1, shared).topk(min(self.options.top, len(shared)))
        if self.options.renormalise:
            return top.indices, top.values.log_softmax(-1)
        return top.indices, top.values - logits.logsumexp(-1, keepdim=True)


def _single_rows(block: Block) -> Tensor:
    """Student's and teacher's row of every chunk that has one row on each side, [M, 2]."""
    sides = [side.chunk for side in (block.student, block.taught())]
    sizes = [torch.bincount(chunk[chunk >= 0], minlength=block.chunks) for chunk in sides]
    last = torch.stack([ops.last_rows(chunk, block.chunks) for chunk in sides], 1)
    return last[(torch.stack(sizes, 1) == 1).all(1)]


METHOD = Strict
