"""P-KL: X-Token's loss on the teacher's vocabulary (arXiv 2605.21699).

A sparse matrix W [V_S, V_T] says which teacher tokens spell a student token
(`ctdbench.text.projection`). The student's rows are projected, p_S W, and compared on K, the
teacher's `vocab_topk` = 8192 tokens with the largest logit anywhere in the batch. With S and T a
chunk's rows on either side and softmax at the temperature:
    p = mean over S of (p_S W)[K], divided by its sum;    log q = mean over T of log_softmax(z_T[K])
    L = T^2 * mean over chunks of sum_K q (log q - log p)   (reverse_kl: sum_K p (log p - log q))
plus CE. No token is left out of the comparison, so nothing is suppressed for being spelled
differently: Llama's "201" puts its mass on Qwen's "2" (0.9), "0" (0.09) and "1" (0.009).
log q is a mean of logarithms: q does not sum to 1 on chunks of several teacher tokens.

merge = mean (default, the public code) | chain: the chain rule, a chunk's distribution is its last
row's times the probability of the tokens before it. Both sides are normalised on K, where that
factor cancels: chain compares the last rows.
topk_scope = batch (default): K is chosen once for the global batch, so that neither micro-batches
nor processes change it. The public code chooses it in every micro-batch (`microbatch`), padding
included, which is no row here.
projection = fixed (default, the public code) | learned (the paper): the weights of W are softmaxed
over the row, start at W, and are trained beside the student with a learning rate of 1e-2.
Weights: the harness balances by ratio unless asked otherwise, CE + KD scaled to CE's size, where KD
= L (the public code's default); with train.balance=fixed 1.0 KD + 0.1 CE. Its `exact_chunks_only`
has no use here: chunks are cut by bytes, and the harness leaves out those whose sides spell
different ones (a space that SentencePiece puts before a text).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ctdbench import ops, pieces
from ctdbench.method import (
    Block,
    Method,
    MethodOptions,
    Needs,
    PairInfo,
    PairTables,
    Rows,
    Term,
    Trainable,
)

META = {
    "title": "P-KL: KL on the teacher's vocabulary through a projection (X-Token)",
    "paper": "2605.21699",
    "year": 2026,
    "needs": ["teacher logits", "projection"],
    "cost": "one softmax, one projection",
    "floor": "zero",
    "exceptions": {
        "micro-batches if topk_scope=microbatch": "each one chooses its own tokens (public code)",
    },
}

EPSILON = 1e-10  # added to sums and probabilities before they divide or enter a logarithm (code)


class PKLOptions(MethodOptions):
    """Options of `p-kl`; the defaults are the public code's."""

    ce_weight: float = Field(
        0.1, ge=0, description="Weight of cross-entropy on the student's own tokens."
    )
    kd_weight: float = Field(1.0, ge=0, description="Weight of the KL.")
    temperature: float = Field(1.0, gt=0, description="Softmax temperature; the KL counts T^2.")
    vocab_topk: int = Field(8192, ge=1, description="How many teacher tokens are compared.")
    topk_scope: Literal["batch", "microbatch"] = Field(
        "batch", description="Where they are chosen: in the global batch, or in each micro-batch."
    )
    reverse_kl: bool = Field(False, description="KL(student || teacher) instead.")
    merge: Literal["mean", "chain"] = Field(
        "mean", description="A chunk's distribution: mean of its rows (code), or chain rule."
    )
    projection: Literal["fixed", "learned"] = Field(
        "fixed", description="The projection's weights: fixed (code) or trained (paper)."
    )
    projection_learning_rate: float = Field(
        1e-2, gt=0, description="Learning rate of a learned projection."
    )


class LearnedProjection(nn.Module):
    """The weights of W as log_weights [V_S, k], softmaxed over the entries of each row."""

    def __init__(self, indices: Tensor, weights: Tensor) -> None:
        """indices [V_S, k], -1 for no entry; weights [V_S, k], where training starts."""
        super().__init__()
        self.register_buffer("absent", indices < 0, persistent=False)
        start = weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
        self.log_weights = nn.Parameter(start.masked_fill(indices < 0, 0))

    def forward(self) -> Tensor:
        """Weights [V_S, k]; a row without entries is 0."""
        absent = self.get_buffer("absent")
        scores = self.log_weights.float().masked_fill(absent, torch.finfo(torch.float32).min)
        return scores.softmax(-1).masked_fill(absent, 0)


class PKL(Method):
    """KL between the teacher's chunks and the student's projected ones."""

    Options = PKLOptions
    options: PKLOptions
    balance = "ratio"

    @property
    def needs(self) -> Needs:
        """Teacher logits, and a look at all of the batch's before."""
        return Needs(prepare=self.options.topk_scope)

    def weights(self) -> Mapping[str, float]:
        """The KL's gradients shrink with T^2."""
        return {"kl": self.options.kd_weight * self.options.temperature**2}

    def modules(self, pair: PairInfo) -> dict[str, Trainable]:
        """`projection`, if it is learned."""
        if self.options.projection == "fixed":
            return {}
        module = LearnedProjection(*pair.tables.projected)
        rate = self.options.projection_learning_rate
        return {"projection": Trainable(module, rate, keep=True)}

    def prepare(self, teacher: Rows) -> Tensor:
        """Every token's largest logit, [V_T]."""
        logits = teacher.scores().float()
        return logits.amax(0) if len(logits) else logits.new_full(logits.shape[1:], -torch.inf)

    def terms(self, block: Block, modules: Mapping[str, nn.Module]) -> dict[str, Term]:
        """`kl`: the sum over chunks, nats, without T^2; and the number of chunks."""
        columns, place = self._columns(block)
        source, target, weight = self._entries(block.pair, place, modules)
        terms = partial(self._totals, columns=columns, source=source, target=target)
        totals = pieces.totals(terms, block, pieces.by_chunks(block), weight)
        return {"kl": Term(totals["kl"], self.counts(block)["kl"])}

    def counts(self, block: Block) -> Mapping[str, Tensor]:
        """Chunks with rows on both sides."""
        own, taught = block.student.chunk, block.taught().chunk
        return {"kl": own.new_tensor(ops.shared_chunks(own, taught, block.chunks)[2])}

    def _columns(self, block: Block) -> tuple[Tensor, Tensor]:
        """The teacher's tokens that are compared, [K], of equal logits the lower ids; and the place
        of every token among them, [V_T + 1], -1 for none, the last one for id -1.
        """
        if block.batch is None:
            raise TypeError("p-kl chooses its tokens from the whole batch; see Needs(prepare=..)")
        largest = block.batch
        most = min(self.options.vocab_topk, len(largest))
        least = largest.topk(most, sorted=False).values.min()
        chosen = largest > least
        alike = torch.nonzero(largest == least).squeeze(1)
        chosen[alike[: most - int(chosen.sum())]] = True
        columns = torch.nonzero(chosen).squeeze(1)
        place = columns.new_full((len(largest) + 1,), -1)
        place[columns] = torch.arange(len(columns), device=place.device)
        return columns, place

    def _totals(
        self, block: Block, weight: Tensor, *, columns: Tensor, source: Tensor, target: Tensor
    ) -> dict[str, Tensor]:
        student, teacher = block.student, block.taught()
        own, taught, chunks = ops.shared_chunks(student.chunk, teacher.chunk, block.chunks)
        logits = teacher.scores().index_select(1, columns)
        log_q = self._merged(torch.log_softmax, logits, taught, chunks)
        masses = self._merged(torch.softmax, student.scores(), own, chunks)
        p = ops.project(masses, source, target, weight, len(columns))
        log_p = (p / (p.sum(-1, keepdim=True) + EPSILON) + EPSILON).log()
        first, second = (log_p, log_q) if self.options.reverse_kl else (log_q, log_p)
        return {"kl": (first.exp() * (first - second)).sum()}

    def _merged(
        self, normalise: Callable[..., Tensor], logits: Tensor, chunk: Tensor, chunks: int
    ) -> Tensor:
        """Chunks out of rows [R, V] normalised at the temperature, [chunks, V]."""
        if self.options.merge == "chain":
            logits = ops.rows_of(logits, ops.last_rows(chunk, chunks))
            chunk = torch.arange(chunks, device=chunk.device)
        rows = normalise(ops.tempered(logits.float(), self.options.temperature), -1)
        return ops.chunk_means(rows, chunk, chunks)

    def _entries(
        self, pair: PairTables, place: Tensor, modules: Mapping[str, nn.Module]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """W on the columns that have a place: student id, place, weight, [E] each."""
        indices, weights = (part.to(place.device) for part in pair.projected)
        if self.options.projection == "learned":
            weights = modules["projection"]()
        target = place[indices]
        source, slot = torch.nonzero(target >= 0, as_tuple=True)
        return source, target[source, slot], weights[source, slot]


METHOD = PKL
