"""SFT: supervised fine-tuning on the student's own tokens. The baseline of every table; no teacher.

L = mean over supervised tokens of -log p_S(s_i | s_<i).

The harness computes this cross-entropy for every method, so nothing is left to do here: no terms,
and the weight of cross-entropy is `ce_weight`. On text that the teacher wrote, `sft` is
sequence-level knowledge distillation (arXiv 1606.07947).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ctdbench.method import Block, Method, MethodOptions, Needs, Term

META = {
    "title": "SFT: cross-entropy on the student's own tokens",
    "paper": "",
    "year": None,
    "needs": ["no teacher"],
    "cost": "student only",
}


class SFT(Method):
    """No terms: cross-entropy is the harness's."""

    Options = MethodOptions

    @property
    def needs(self) -> Needs:
        """No teacher."""
        return Needs(teacher_logits=False)

    def terms(self, block: Block, modules: Mapping[str, nn.Module]) -> dict[str, Term]:
        """Nothing beside cross-entropy."""
        return {}

    def counts(self, block: Block) -> Mapping[str, Tensor]:
        """Nothing to count."""
        return {}


METHOD = SFT
