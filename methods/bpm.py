"""BPM: Byte-Prefix Marginalization (arXiv 2607.22334).

phi(w) is the longest student token whose bytes begin teacher token w's. Where both sides start at
the same byte, the teacher's row becomes a distribution over student tokens u and a residual class:
    t(u) = sum of p_T(w) over w with phi(w) = u;    t(rest) = what is left, so that t sums to 1.
Where the student's token starts inside a teacher token, with r its bytes so far: the same with
p_T(w) / p_T(r..) over the w that start with r, and phi of their remaining bytes; r itself, with no
byte remaining, is in the residual class.
A student token that reaches past its teacher token w_1, over w_2 .. w_n, can be no phi(w). Its own
cell takes the chain product of what came,
    p_T(w_1 | r) p_T(w_2) .. p_T(w_{n-1}) p_T(its last bytes..),    p_T(b..) = mass of prefix b,
out of the cell of w_1, so that t still sums to 1.
The student's residual is the mass of the tokens that no phi reaches at this row.
    L = mean over rows of KL( t || p )  (the paper's main table),
or divergence = jsd: beta KL(t || m) + (1 - beta) KL(p || m), m = beta t + (1 - beta) p, beta = 1/2.
Special tokens count by role: the teacher's stop mass is the student's stop token's. Rows whose
token is only spaces or tabs are dropped, and those that start before the teacher's token does (a
SentencePiece prefix on the student's side alone). No CE by default (`ce_weight`).

The paper's public code takes the chain product for every longer student token that the text
begins with, not only for the one that came, and no phi beyond the end of the teacher's token that
came; it trains on the student's own text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from ctdbench import pieces, prefix_ops
from ctdbench.method import Block, Method, MethodOptions, Term

META = {
    "title": "BPM: the teacher's mass on the student's longest byte prefixes",
    "paper": "2607.22334",
    "year": 2026,
    "needs": ["teacher logits"],
    "cost": "one softmax, one scatter",
    "on_policy": True,
    "ce": False,  # as published
    "floor": "zero",
}


class BPMOptions(MethodOptions):
    """Options of `bpm`; the defaults are those of the paper's main table."""

    ce_weight: float = Field(
        0.0, ge=0, description="Weight of cross-entropy on the student's own tokens."
    )
    weight: float = Field(1.0, ge=0, description="Weight of the BPM term.")
    divergence: Literal["forward_kl", "jsd"] = Field(
        "forward_kl", description="KL from the teacher's masses, or the generalized JSD."
    )
    beta: float = Field(0.5, gt=0, lt=1, description="Weight of the teacher's part in the JSD.")
    drop_whitespace: bool = Field(
        True, description="Leave out rows whose token is only spaces or tabs."
    )


class BPM(Method):
    """Divergence between the teacher's masses on student tokens and the student's."""

    Options = BPMOptions
    options: BPMOptions

    def weights(self) -> Mapping[str, float]:
        """Of the one term."""
        return {"bpm": self.options.weight}

    def terms(self, block: Block, modules: Mapping[str, nn.Module]) -> dict[str, Term]:
        """`bpm`: the divergence in nats, and the number of rows."""
        totals = pieces.totals(self._totals, block, pieces.by_chunks(block))
        return {"bpm": Term(totals["bpm"], self.counts(block)["bpm"])}

    def counts(self, block: Block) -> Mapping[str, Tensor]:
        """Rows that are not dropped."""
        rows = prefix_ops.token_starts(block, self.options.drop_whitespace).student
        return {"bpm": rows.new_tensor(len(rows))}

    def _totals(self, block: Block) -> dict[str, Tensor]:
        starts = prefix_ops.token_starts(block, self.options.drop_whitespace)
        beta = self.options.beta if self.options.divergence == "jsd" else None
        return {"bpm": prefix_ops.divergences(block, starts, beta).sum()}


METHOD = BPM
