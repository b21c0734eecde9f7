"""KD: token-level knowledge distillation (arXiv 1503.02531), for pairs that share a tokenizer.

L = T^2 * mean over tokens of KL( softmax(z_T / T) || softmax(z_S / T) ),  T = 1 by default, over
the whole vocabulary and every token that both sides predict. T^2 keeps the size of the gradient
when T grows (section 2 of the paper). No CE by default; the paper adds one (`ce_weight`).

A reference row: what there is to gain where no tokenizer stands between. Any other pair is refused,
since column v means another token on the other side.
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
    "title": "KD: token-level forward KL (one tokenizer on both sides)",
    "paper": "1503.02531",
    "year": 2015,
    "needs": ["teacher logits", "one tokenizer"],
    "cost": "one softmax a side",
    "ce": False,  # by default; the paper adds one
    "floor": "zero",
}


class KDOptions(MethodOptions):
    """Options of `kd`."""

    ce_weight: float = Field(
        0.0, ge=0, description="Weight of cross-entropy on the student's own tokens."
    )
    temperature: float = Field(
        1.0, gt=0, description="Softmax temperature T of both sides; the KL is multiplied by T^2."
    )


class KD(Method):
    """Forward KL between rows that predict the same token."""

    Options = KDOptions
    options: KDOptions

    def check(self, pair: PairTables) -> None:
        """Raises UserError unless both sides have the same tokens under the same ids."""
        sides = (pair.student_vocabulary, pair.teacher_vocabulary)
        same = len(sides[0]) == len(sides[1]) and all(map(bytes.__eq__, *sides))
        if not same or set(pair.student_special) != set(pair.teacher_special):
            raise UserError(
                "method kd compares the two sides id by id, and their tokenizers differ",
                "use a pair with one tokenizer for both (smol-short), or a method such as gold",
            )

    def terms(self, block: Block, modules: Mapping[str, nn.Module]) -> dict[str, Term]:
        """`kd`: the KL in nats, times T^2, and the number of tokens."""
        totals = pieces.totals(self._totals, block, pieces.by_chunks(block))
        return {"kd": Term(totals["kd"], self.counts(block)["kd"])}

    def counts(self, block: Block) -> Mapping[str, Tensor]:
        """Tokens in chunks."""
        rows = _rows(block)
        return {"kd": rows.new_tensor(rows.shape[1])}

    def _totals(self, block: Block) -> dict[str, Tensor]:
        heat = self.options.temperature
        student, teacher = (
            ops.tempered(ops.rows_of(side.scores(), index), heat)
            for side, index in zip((block.student, block.taught()), _rows(block), strict=True)
        )
        kl = ops.forward_kl(student, teacher.softmax(-1), teacher.log_softmax(-1))
        return {"kd": heat**2 * kl.sum()}


def _rows(block: Block) -> Tensor:
    """The rows of both sides that predict the chunks' tokens, in order, [2, N].

    Raises UserError where equal vocabularies split a text differently.
    """
    sides = (block.student, block.taught())
    index = [torch.nonzero(side.chunk >= 0).squeeze(1) for side in sides]
    student, teacher = (side.token[rows] for side, rows in zip(sides, index, strict=True))
    if not torch.equal(student, teacher):
        raise UserError(
            "method kd: the two sides split a text into different tokens",
            "use a pair with one tokenizer for both (smol-short), or a method such as gold",
        )
    return torch.stack(index)


METHOD = KD
