"""ESCD: Event-Set Completion Distillation (arXiv 2609.34738).

A teacher token that the student has to spell in several of its own is an event: entered with the
first of them, then completed. Two terms, each a mean over its rows:
bpm         where both sides start at the same byte: the KL of `bpm`, on these rows alone.
completion  where the student's token starts inside a teacher token, r its bytes so far. The
            teacher's tokens that start with r, are longer, and have no byte-equal student token are
            grouped by the prefix relation: a group is a shortest one, y, and all that y begins. It
            has the mass M of its tokens under the teacher's row, and with y' the bytes of y after r
                completion = -sum over groups of M * log( sum of p(u), y' a prefix of u's bytes ).
            How p is divided among the u that complete y in one step is left to the student.
    L = bpm + completion_weight * completion, no CE by default (`ce_weight`).

A group that no student token completes in one step is left out. M is the teacher's mass itself, not
divided by the mass of r: an event that the teacher had hardly entered weighs little. The rows that
`bpm` drops are dropped here as well. The paper trains on the student's own text; it has no public
code.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from ctdbench import ops, pieces, prefix_ops
from ctdbench.method import Block, Method, MethodOptions, Term
from ctdbench.prefix_ops import Starts

META = {
    "title": "ESCD: byte-prefix marginalization, and the completion of entered teacher tokens",
    "paper": "2609.34738",
    "year": 2026,
    "needs": ["teacher logits"],
    "cost": "one softmax, one scatter",
    "on_policy": True,
    "ce": False,  # as published
    "floor": "zero",
}


class ESCDOptions(MethodOptions):
    """Options of `escd`."""

    ce_weight: float = Field(
        0.0, ge=0, description="Weight of cross-entropy on the student's own tokens."
    )
    weight: float = Field(1.0, ge=0, description="Weight of the KL where both sides start.")
    completion_weight: float = Field(1.0, ge=0, description="Weight of the completion term.")
    drop_whitespace: bool = Field(
        True, description="Leave out rows whose token is only spaces or tabs."
    )


class ESCD(Method):
    """`bpm` where both sides start, the mass of completions where the student is inside."""

    Options = ESCDOptions
    options: ESCDOptions

    def weights(self) -> Mapping[str, float]:
        """Of the two terms."""
        return {"bpm": self.options.weight, "completion": self.options.completion_weight}

    def terms(self, block: Block, modules: Mapping[str, nn.Module]) -> dict[str, Term]:
        """`bpm`: nats and rows; `completion`: the same for the rows inside a teacher token."""
        totals = pieces.totals(self._totals, block, pieces.by_chunks(block))
        counts = self.counts(block)
        return {name: Term(total, counts[name]) for name, total in totals.items()}

    def counts(self, block: Block) -> Mapping[str, Tensor]:
        """Rows of each kind."""
        rows = (starts.student for starts in self._split(block))
        names = ("bpm", "completion")
        return {name: row.new_tensor(len(row)) for name, row in zip(names, rows, strict=True)}

    def _totals(self, block: Block) -> dict[str, Tensor]:
        entered, inside = self._split(block)
        return {
            "bpm": prefix_ops.divergences(block, entered).sum(),
            "completion": completion(block, inside),
        }

    def _split(self, block: Block) -> tuple[Starts, Starts]:
        starts = prefix_ops.token_starts(block, self.options.drop_whitespace)
        inside = starts.emitted > 0
        return starts.picked(~inside), starts.picked(inside)


def completion(block: Block, starts: Starts) -> Tensor:
    """The completion term, summed over rows that start inside a teacher token: a scalar in nats."""
    if not len(starts.student):
        return block.student.scores().new_zeros(())
    masses, event, node = teacher_events(block, starts)
    tables = ops.trie_tensors(block.pair.student_trie, node.device)
    group, offset = ops.ragged(tables.high[node] - tables.low[node])
    token = tables.order[tables.low[node][group] + offset]
    logits = block.student.scores().index_select(0, starts.student)
    scores = logits.float().log_softmax(-1)
    completed = prefix_ops.segment_logsumexp(scores[event[group], token], group, len(node))
    return -(masses * completed).sum()


@torch.no_grad()
def teacher_events(block: Block, starts: Starts) -> tuple[Tensor, Tensor, Tensor]:
    """The groups of all rows that one student token can complete, G of them.

    Returns mass [G] float64, row [G] (an index into `starts`), and [G] the node of the student's
    trie at which the missing bytes end.
    """
    taught = block.taught()
    maps = prefix_ops.prefix_maps(block.pair, taught.token.device)
    row = starts.rows[starts.first]
    logits = taught.scores().index_select(0, row).float()
    every = torch.arange(len(row), device=row.device)
    event, word, score = prefix_ops.prefix_scores(
        block.pair, logits, every, taught.token[row], starts.emitted
    )
    longer = ops.token_lengths(block.pair.teacher_trie, word) > starts.emitted[event]
    kept = longer & (maps.nested[word] >= 0)
    event, word, score = event[kept], word[kept], score[kept]
    # in the order of bytes a group follows its shortest token (equal ones share a group's loss)
    shortest = maps.nested[word] <= starts.emitted[event]
    group = shortest.cumsum(0) - 1
    norm = logits.logsumexp(-1)
    masses = ops.segment_sum((score - norm[event]).double().exp(), group, int(shortest.sum()))
    event, word = event[shortest], word[shortest]
    start = ops.trie_tensors(block.pair.teacher_trie, word.device).path_start[word]
    node = maps.node[start + starts.emitted[event]]
    able = node >= 0
    return masses[able], event[able], node[able]


METHOD = ESCD
