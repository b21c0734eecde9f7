"""new-method: what it does, in one line. Name the paper here: authors, year, arXiv number.

Write the formula as the paper has it, with every symbol explained. This one is the KL divergence of
the tokens that both vocabularies have, at the last row of every chunk:

    L = mean over chunks of KL( q_T || q_S ),    q = softmax of the logits of the shared tokens

A chunk is a shortest piece of text at whose ends both tokenizers cut; its last row on either side
is the prediction of the token that ends it. Say what the defaults are, and where they differ from
the paper or its code.

    ctdbench check new-method --plugin new_method.py
    ctdbench run --method new-method --plugin new_method.py --pair tiny
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor, nn

from ctdbench import ops
from ctdbench.method import Block, Method, MethodOptions, Term

META = {  # `ctdbench list methods` reads this without importing the file: constants only
    "title": "new-method: what it does, in one line",
    "paper": "",  # its arXiv number; or else "url"
    "url": "https://example.org/new-method",
    "year": 2026,
    "needs": ["teacher logits"],
    "cost": "one softmax a side",
    "floor": "zero",  # of the terms where student = teacher; `ctdbench check` holds you to it
}


class LossOptions(MethodOptions):
    """What a user can set: `--set method.weight=2`. Each one changes a cell's identity."""

    ce_weight: float = Field(
        1.0, ge=0, description="Weight of cross-entropy on the student's own tokens."
    )
    weight: float = Field(1.0, ge=0, description="Weight of the KL.")


class Loss(Method):
    """KL on the shared tokens where chunks end."""

    Options = LossOptions
    options: LossOptions

    def weights(self) -> Mapping[str, float]:
        """Of the terms in the loss; cross-entropy is the harness's, weighted by `ce_weight`."""
        return {"kl": self.options.weight}

    def terms(self, block: Block, modules: Mapping[str, nn.Module]) -> dict[str, Term]:
        """`kl`: a sum and its count, never a mean: the harness adds up blocks and processes."""
        own, taught = _last_rows(block).T
        shared, others = block.pair.shared.to(own.device).T
        student = block.student.scores()[own][:, shared]
        teacher = block.taught().scores()[taught][:, others].detach()
        kl = ops.forward_kl(student, teacher.softmax(-1), teacher.log_softmax(-1))
        return {"kl": Term(kl.sum(), self.counts(block)["kl"])}

    def counts(self, block: Block) -> Mapping[str, Tensor]:
        """Of the terms, from tokens and chunks alone; leave it out where that is no less work."""
        rows = _last_rows(block)
        return {"kl": rows.new_tensor(len(rows))}


def _last_rows(block: Block) -> Tensor:
    """Student's and teacher's last row of every chunk that both sides have, [M, 2]."""
    return ops.last_row_pairs(block.student.chunk, block.taught().chunk, block.chunks)


METHOD = Loss
