"""SeqKD: sequence-level knowledge distillation, `sft` on text that the teacher wrote.

Kim and Rush, "Sequence-Level Knowledge Distillation", EMNLP 2016 (arXiv 1606.07947), section 3.2.

    L = mean over supervised tokens of -log p_S(s_i | s_<i),  s the tokens of an answer y ~ p_T(.|x)

The gradient of the KL from the teacher's distribution over whole texts to the student's, with that
distribution replaced by one text of it. The harness lets the teacher continue training documents'
prompts x, each once, until there is text for the budget, and caches it. y is sampled at temperature
1, up to 192 tokens (train.generation_temperature, train.generated_tokens); the paper takes the
mode, by beam search, and greedy decoding (0) is its nearest here. The loss is the harness's
cross-entropy, so nothing is left to do: tokenizers never meet, only text does.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ctdbench.method import Block, Method, MethodOptions, Needs, Term

META = {
    "title": "SeqKD: cross-entropy on text that the teacher wrote",
    "paper": "1606.07947",
    "year": 2016,
    "needs": ["teacher-generated text"],
    "cost": "student only",
}


class SeqKD(Method):
    """No terms: cross-entropy is the harness's, and the text is the teacher's."""

    Options = MethodOptions

    @property
    def needs(self) -> Needs:
        """The teacher's text, not its logits."""
        return Needs(teacher_logits=False, text="teacher")

    def terms(self, block: Block, modules: Mapping[str, nn.Module]) -> dict[str, Term]:
        """Nothing beside cross-entropy."""
        return {}

    def counts(self, block: Block) -> Mapping[str, Tensor]:
        """Nothing to count."""
        return {}


METHOD = SeqKD
