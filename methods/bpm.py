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

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from pydantic import Field
from torch import Tensor, nn

from ctdbench import ops
from ctdbench.method import Block, Method, MethodOptions, PairTables, Term
from ctdbench.text.prefixes import PrefixMap

META = {
    "title": "BPM: the teacher's mass on the student's longest byte prefixes",
    "paper": "2607.22334",
    "year": 2026,
    "needs": ["teacher logits"],
    "cost": "a scatter of the teacher's vocabulary a student row",
}

NONE = -1e30  # log-probability of a cell outside the partition; finite, since 0 * inf is no number
EMPTY = math.log(1e-12)  # of the student's residual class where no token is left for it
KEY = 1 << 32  # more bytes than a document has: (chunk, byte) as one sortable number


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


class Starts(NamedTuple):
    """Student rows and the teacher's tokens that they start and end in; P of them."""

    student: Tensor  # [P] student row
    first: Tensor  # [P] teacher row of the token that holds the first byte, an index into `rows`
    last: Tensor  # [P] the same for the last byte
    emitted: Tensor  # [P] bytes of the first teacher token that come before
    rows: Tensor  # [T] teacher rows in chunks, in the order of the text

    def picked(self, index: Tensor) -> Starts:
        """Some of the P."""
        return Starts(*(value[index] for value in self[:-1]), self.rows)


class Maps(NamedTuple):
    """The arrays of a `PrefixMap` on a device; see there for their meaning."""

    token: Tensor
    node: Tensor
    first: Tensor
    nested: Tensor


_ON_DEVICE: WeakKeyDictionary[PrefixMap, dict[str, Maps]] = WeakKeyDictionary()


def prefix_maps(pair: PairTables, device: torch.device) -> Maps:
    """The pair's prefix map on `device`, copied there once for as long as the pair lives."""
    copies = _ON_DEVICE.setdefault(pair.prefix_map, {})
    if str(device) not in copies:
        arrays = (getattr(pair.prefix_map, name) for name in Maps._fields)
        copies[str(device)] = Maps(*(torch.from_numpy(array).to(device) for array in arrays))
    return copies[str(device)]


class BPM(Method):
    """Divergence between the teacher's masses on student tokens and the student's."""

    Options = BPMOptions
    options: BPMOptions

    def weights(self) -> Mapping[str, float]:
        """Of the one term."""
        return {"bpm": self.options.weight}

    def terms(self, block: Block, modules: Mapping[str, nn.Module]) -> dict[str, Term]:
        """`bpm`: the divergence in nats, and the number of rows."""
        starts = token_starts(block, self.options.drop_whitespace)
        return {"bpm": self.matched(block, starts)}

    def counts(self, block: Block) -> Mapping[str, Tensor]:
        """Rows that are not dropped."""
        starts = token_starts(block, self.options.drop_whitespace)
        return {"bpm": starts.student.new_tensor(len(starts.student))}

    def matched(self, block: Block, starts: Starts) -> Term:
        """The divergence, summed over these rows."""
        target, reached = teacher_masses(block, starts)
        scores = class_scores(block.student.scores()[starts.student], reached)
        beta = self.options.beta if self.options.divergence == "jsd" else None
        total = divergence(target, scores, beta).sum()
        return Term(total, starts.student.new_tensor(len(starts.student)))


def token_starts(block: Block, drop_whitespace: bool) -> Starts:
    """The student rows that a teacher token covers the start of, in their order."""
    own, taught, pair = block.student, block.taught(), block.pair
    inside = torch.nonzero(taught.chunk >= 0).squeeze(1)
    lengths = ops.token_lengths(pair.teacher_trie, taught.token)
    begins = taught.byte_end - lengths  # not byte_start: a SentencePiece prefix comes before byte 0
    keys, order = (taught.chunk * KEY + begins)[inside].sort(stable=True)
    inside = inside[order]
    rows = torch.nonzero(torch.isin(own.chunk, taught.chunk) & (own.chunk >= 0)).squeeze(1)
    own_lengths = ops.token_lengths(pair.student_trie, own.token[rows])
    begin = own.byte_end[rows] - own_lengths
    end = torch.maximum(own.byte_end[rows] - 1, begin)
    first, last = (
        torch.searchsorted(keys, own.chunk[rows] * KEY + byte, right=True) - 1
        for byte in (begin, end)
    )
    teacher = inside[first.clamp(min=0)]
    emitted = begin - begins[teacher]
    kept = (first >= 0) & (taught.chunk[teacher] == own.chunk[rows])
    kept &= emitted < lengths[teacher].clamp(min=1)
    if drop_whitespace:
        kept &= ~_blank(pair, own.token[rows], own_lengths)
    return Starts(rows, first, last, emitted, inside).picked(kept)


def _blank(pair: PairTables, token: Tensor, lengths: Tensor) -> Tensor:
    """Whether a token is spaces and tabs and nothing else, [P]."""
    owner, offset = ops.ragged(lengths)
    byte = ops.token_bytes(pair.student_trie, token[owner], offset)
    blank = ((byte == ord(" ")) | (byte == ord("\t"))).long()
    return (lengths > 0) & (ops.segment_sum(blank, owner, len(token)) == lengths)


@torch.no_grad()
def teacher_masses(block: Block, starts: Starts) -> tuple[Tensor, Tensor]:
    """t [P, V_S + 1], the last column the residual class, and the cells that t may reach, bool."""
    taught, columns = block.taught(), block.student.scores().shape[1]
    maps = prefix_maps(block.pair, taught.token.device)
    logits = taught.scores()[starts.rows].float()
    token = taught.token[starts.rows]
    norm = logits.logsumexp(-1)
    target = logits.new_zeros(len(starts.student), columns + 1)
    reached = torch.zeros_like(target, dtype=torch.bool)
    denominator = norm[starts.first]

    plain = torch.nonzero(starts.emitted == 0).squeeze(1)
    cell = torch.where(maps.first >= 0, maps.first, columns)
    masses = (logits[starts.first[plain]] - denominator[plain, None]).exp()
    part = target[plain].scatter_add_(1, cell.expand(len(plain), -1), masses)
    target[plain], reached[plain] = part, reached.new_zeros(columns + 1).index_fill(0, cell, True)

    inner = torch.nonzero(starts.emitted > 0).squeeze(1)
    row, emitted = starts.first[inner], starts.emitted[inner]
    event, word, score = prefix_scores(block.pair, logits, row, token[row], emitted)
    cell = _suffix_cells(block.pair, maps, word, emitted[event], columns)
    denominator[inner] = segment_logsumexp(score, event, len(inner)).to(denominator)
    masses = (score - denominator[inner[event]]).exp()
    target.index_put_((inner[event], cell), masses, accumulate=True)
    reached[inner[event], cell] = True

    _move_spanning(block, starts, (logits, norm, denominator), (target, reached))
    return target, reached


def _move_spanning(
    block: Block,
    starts: Starts,
    teacher: tuple[Tensor, Tensor, Tensor],
    cells: tuple[Tensor, Tensor],
) -> None:
    """Give the student tokens that span teacher tokens the chain product, out of the first's."""
    over = torch.nonzero(starts.last > starts.first).squeeze(1)
    own, taught = block.student, block.taught()
    logits, norm, denominator = teacher
    target, reached = cells
    first, last = starts.first[over], starts.last[over]
    token = taught.token[starts.rows]
    score = logits.gather(1, token[:, None]).squeeze(1)
    chain = nn.functional.pad((score - norm).double().cumsum(0), (1, 0))  # [k]: the rows before k
    chance = chain[last] - chain[first + 1] + (score[first] - denominator[over])
    begin = taught.byte_end[starts.rows[last]] - ops.token_lengths(
        block.pair.teacher_trie, token[last]
    )
    covered = own.byte_end[starts.student[over]] - begin
    event, _, parts = prefix_scores(block.pair, logits, last, token[last], covered)
    chance += segment_logsumexp(parts, event, len(over)) - norm[last]
    mass = chance.exp().to(target)
    maps = prefix_maps(block.pair, token.device)
    columns = target.shape[1] - 1
    source = _suffix_cells(block.pair, maps, token[first], starts.emitted[over], columns)
    came = own.token[starts.student[over]]
    target[over, source] = (target[over, source] - mass).clamp(min=0)
    target[over, came] += mass
    reached[over, came] = True


def prefix_scores(
    pair: PairTables, logits: Tensor, row: Tensor, token: Tensor, length: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Teacher tokens that start with the first `length` >= 1 bytes of `token`, under `row`; [E].

    Returns (event, token id, logit), [N] each: the tokens of event 0, then of event 1, .., each
    event's in the order of their bytes.
    """
    tables = ops.trie_tensors(pair.teacher_trie, logits.device)
    node = tables.path[tables.path_start[token] + length - 1]
    event, offset = ops.ragged(tables.high[node] - tables.low[node])
    word = tables.order[tables.low[node][event] + offset]
    return event, word, logits[row[event], word]


def segment_logsumexp(values: Tensor, segment: Tensor, segments: int) -> Tensor:
    """log of the sum of exp over every segment, [segments] float64; -inf for an empty one."""
    values = values.double()
    most = values.new_full((segments,), -math.inf)
    most = most.scatter_reduce(0, segment, values.detach(), "amax")
    return ops.segment_sum((values - most[segment]).exp(), segment, segments).log() + most


def _suffix_cells(
    pair: PairTables, maps: Maps, token: Tensor, emitted: Tensor, rest: int
) -> Tensor:
    """phi of the tokens' bytes after `emitted`; `rest` where there is none, or no byte is left."""
    start = ops.trie_tensors(pair.teacher_trie, token.device).path_start
    longer = start[token] + emitted < start[token + 1]
    cell = maps.token[torch.where(longer, start[token] + emitted, 0)]
    return torch.where(longer & (cell >= 0), cell, rest)


def class_scores(logits: Tensor, reached: Tensor) -> Tensor:
    """The student's log-probabilities of the cells and of the residual class, [P, V_S + 1].

    logits [P, V_S], reached [P, V_S + 1]. Cells that are not reached have NONE.
    """
    cells = reached[:, :-1]
    scores = logits.float().log_softmax(-1)
    rest = scores.masked_fill(cells, NONE).logsumexp(-1)
    rest = torch.where(cells.all(1), EMPTY, rest)
    return torch.cat([scores.masked_fill(~cells, NONE), rest[:, None]], 1)


def divergence(target: Tensor, scores: Tensor, beta: float | None) -> Tensor:
    """KL( t || p ), or with `beta` the generalized JSD: [P, C] and log [P, C] -> [P] nats."""
    if beta is None:
        return -(torch.special.entr(target) + target * scores).sum(-1)
    chances = scores.exp()
    mixed = (beta * target + (1 - beta) * chances).clamp(min=torch.finfo(scores.dtype).tiny).log()
    taught = -(torch.special.entr(target) + target * mixed).sum(-1)
    return beta * taught + (1 - beta) * (chances * (scores - mixed)).sum(-1)


METHOD = BPM
