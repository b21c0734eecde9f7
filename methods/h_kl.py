"""H-KL: X-Token's hybrid loss, KL on paired tokens and sorted L1 on the rest (arXiv 2605.21699).

The projection W (`ctdbench.text.projection`) makes pairs C of tokens, one to one: a student token
and the largest entry of its row, if its weight is at least 0.6 (`partition = relaxed`), or only if
it is the whole row (`strict`, which is what NeMo-RL calls "gold"). With S and T a chunk's rows on
either side and softmax at the temperature, over the full vocabularies:
    log p = mean over S of log_softmax(z_S),    log q = mean over T of log_softmax(z_T)
    kl_common   = sum over C of q (log q - log p)   (reverse_kl: p (log p - log q))
    l1_uncommon = L1 distance of the largest m probabilities outside C, sorted on each side,
                  m = the smaller number of tokens outside C, at most `uncommon_topk` = 8192
    L = T^2 * mean over chunks of (kl_common + l1_uncommon)
plus CE. Neither part is normalised on C, so kl_common may be negative. On a chunk of one token the
gradient of kl_common on a student logit outside C is p[j] * (the teacher's mass on C) >= 0: tokens
without a partner are suppressed, which is what `p-kl` was made against.

Weights: the harness balances by ratio unless asked otherwise, CE + KD scaled to CE's size, where KD
= L (the public code's default); with train.balance=fixed 1.0 KD + 0.1 CE. Its `exact_chunks_only`
has no use here: chunks are cut by bytes, and the harness leaves out those whose sides spell
different ones (a space that SentencePiece puts before a text).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from ctdbench import ops, pieces
from ctdbench.method import Block, Method, MethodOptions, Rows, Term

META = {
    "title": "H-KL: KL on tokens paired by a projection, sorted L1 on the rest (X-Token)",
    "paper": "2605.21699",
    "year": 2026,
    "needs": ["teacher logits", "projection"],
    "cost": "one softmax, top-k a side",
    "floor": "zero",
}

Splits = tuple[ops.Columns, ops.Columns]  # student's and teacher's


class HKLOptions(MethodOptions):
    """Options of `h-kl`; the defaults are the public code's."""

    ce_weight: float = Field(
        0.1, ge=0, description="Weight of cross-entropy on the student's own tokens."
    )
    kd_weight: float = Field(1.0, ge=0, description="Weight of the two terms together.")
    temperature: float = Field(1.0, gt=0, description="Softmax temperature; the loss counts T^2.")
    partition: Literal["relaxed", "strict"] = Field(
        "relaxed", description="Pairs: weight of at least 0.6, or the whole row (NeMo's gold)."
    )
    uncommon_topk: int = Field(
        8192, ge=0, description="How many of the largest unpaired tokens are compared."
    )
    reverse_kl: bool = Field(False, description="KL(student || teacher) on the pairs instead.")


class HKL(Method):
    """KL on the pairs of W, sorted L1 on the tokens without a partner."""

    Options = HKLOptions
    options: HKLOptions
    balance = "ratio"

    def weights(self) -> Mapping[str, float]:
        """Both terms' gradients shrink with T^2."""
        weight = self.options.kd_weight * self.options.temperature**2
        return {"kl_common": weight, "l1_uncommon": weight}

    def terms(self, block: Block, modules: Mapping[str, nn.Module]) -> dict[str, Term]:
        """`kl_common`, `l1_uncommon`: sums over chunks, without T^2; and the number of chunks."""
        splits = self._splits(block)
        chunks = pieces.by_chunks(block)
        totals = pieces.totals(partial(self._totals, splits=splits), block, chunks)
        counts = self.counts(block)
        return {name: Term(total, counts[name]) for name, total in totals.items()}

    def counts(self, block: Block) -> Mapping[str, Tensor]:
        """Chunks with rows on both sides."""
        own, taught = block.student.chunk, block.taught().chunk
        count = own.new_tensor(ops.shared_chunks(own, taught, block.chunks)[2])
        return {"kl_common": count, "l1_uncommon": count}

    def _totals(self, block: Block, splits: Splits) -> dict[str, Tensor]:
        student, teacher = block.student, block.taught()
        own, taught, chunks = ops.shared_chunks(student.chunk, teacher.chunk, block.chunks)
        (log_p, rest), (log_q, other) = (
            columns.split(self._merged(rows, chunk, chunks))
            for columns, rows, chunk in zip(splits, (student, teacher), (own, taught), strict=True)
        )
        first, second = (log_p, log_q) if self.options.reverse_kl else (log_q, log_p)
        most = min(rest.shape[1], other.shape[1], self.options.uncommon_topk)
        return {
            "kl_common": (first.exp() * (first - second)).sum(),
            "l1_uncommon": ops.sorted_l1(ops.exp(rest), ops.exp(other), most).sum(),
        }

    def _merged(self, rows: Rows, chunk: Tensor, chunks: int) -> Tensor:
        """Mean log-probabilities of the chunks' rows, [chunks, V]."""
        logits = ops.tempered(rows.scores().float(), self.options.temperature)
        return ops.chunk_means(logits.log_softmax(-1), chunk, chunks)

    def _splits(self, block: Block) -> Splits:
        """C and the rest of either vocabulary."""
        strict, pair = self.options.partition == "strict", block.pair
        pairs = (pair.strict_pairs if strict else pair.relaxed_pairs).to(block.student.token.device)
        sizes = (side.scores().shape[1] for side in (block.student, block.taught()))
        own, taught = map(ops.Columns.of, pairs.T, sizes)
        return own, taught


METHOD = HKL
