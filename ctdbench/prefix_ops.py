"""Tensor operations on teacher tokens as byte prefixes of what a student spells.

Where a student's token starts, a teacher's is under way: at its first byte or inside. The teacher's
masses move to student tokens by longest byte prefixes (`ctdbench.text.prefixes`); see the methods
`bpm` and `escd`. Notation: P student rows, T teacher rows, N (row, teacher token) pairs. Nothing
here loops over rows or tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ctdbench import ops
from ctdbench.rows import Block, PairTables
from ctdbench.text.prefixes import PrefixMap

NONE = -1e30  # added to logits outside the residual class; finite, since there may be no other
EMPTY = math.log(1e-12)  # of the student's residual class where no token is left for it
KEY = 1 << 32  # more bytes than a document has: (chunk, byte) as one sortable number


class Starts(NamedTuple):
    """Student rows and the teacher's tokens that they start and end in; P of them."""

    student: Tensor  # [P] student row
    first: Tensor  # [P] teacher row of the token that holds the first byte, an index into `rows`
    last: Tensor  # [P] the same for the last byte
    emitted: Tensor  # [P] bytes of the first teacher token that come before
    rows: Tensor  # [T] teacher rows in chunks, in the order of the text

    def picked(self, index: Tensor) -> Starts:
        """Some of the P."""
        student, first, last, emitted = (value[index] for value in self[:-1])
        return Starts(student, first, last, emitted, self.rows)


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


class _Masses(NamedTuple):
    """What `teacher_masses` fills in, in place."""

    target: Tensor  # [P, V_S + 1]
    reached: Tensor  # [P, V_S + 1] bool
    denominator: Tensor  # [P] log of the mass that the governing teacher row's logits are over


@torch.no_grad()
def teacher_masses(block: Block, starts: Starts) -> tuple[Tensor, Tensor]:
    """The teacher's masses by student token, and the cells that they can reach, [P, V_S + 1] each.

    The last column is the residual class. Every row sums to 1; the second is bool.
    """
    logits = ops.rows_of(block.taught().scores(), starts.rows).float()
    chances = logits.softmax(-1)
    norm = logits.amax(-1) - chances.amax(-1).log()
    target = logits.new_zeros(len(starts.student), block.student.scores().shape[1] + 1)
    masses = _Masses(target, torch.zeros_like(target, dtype=torch.bool), norm[starts.first])
    _fill_plain(block, starts, chances, masses)
    _fill_inner(block, starts, logits, masses)
    _move_spanning(block, starts, logits, norm, masses)
    return masses.target, masses.reached


def _fill_plain(block: Block, starts: Starts, chances: Tensor, masses: _Masses) -> None:
    """Rows where both sides start: all of the teacher's tokens by their longest prefix."""
    plain = (starts.emitted == 0)[:, None]
    first = prefix_maps(block.pair, chances.device).first
    rest = masses.target.shape[1] - 1
    cell = torch.where(first >= 0, first, rest)
    chances = ops.rows_of(chances, starts.first)
    masses.target.index_add_(1, cell, chances if plain.all() else chances * plain)
    masses.reached[:] = plain & masses.reached.new_zeros(rest + 1).index_fill_(0, cell, True)


def _fill_inner(block: Block, starts: Starts, logits: Tensor, masses: _Masses) -> None:
    """Rows inside a teacher token: the tokens that start alike, by what is left of them."""
    inner = torch.nonzero(starts.emitted > 0).squeeze(1)
    row, emitted = starts.first[inner], starts.emitted[inner]
    token = block.taught().token[starts.rows[row]]
    event, word, score = prefix_scores(block.pair, logits, row, token, emitted)
    whole = segment_logsumexp(score, event, len(inner)).to(score)
    cell = _suffix_cells(block.pair, word, emitted[event], masses.target.shape[1] - 1)
    places = (inner[event], cell)
    masses.denominator[inner] = whole
    masses.target.index_put_(places, (score - whole[event]).exp(), accumulate=True)
    masses.reached[places] = True


def _move_spanning(
    block: Block, starts: Starts, logits: Tensor, norm: Tensor, masses: _Masses
) -> None:
    """Student tokens over several teacher tokens: their chain product, out of the first's cell."""
    over = torch.nonzero(starts.last > starts.first).squeeze(1)
    own, taught = block.student, block.taught()
    first, last, student = starts.first[over], starts.last[over], starts.student[over]
    token = taught.token[starts.rows]
    came = logits.gather(1, token[:, None]).squeeze(1)
    before = nn.functional.pad(
        (came - norm).double().cumsum(0), (1, 0)
    )  # [k]: of the rows before k
    begin = taught.byte_end[starts.rows] - ops.token_lengths(block.pair.teacher_trie, token)
    covered = own.byte_end[student] - begin[last]
    event, _, scores = prefix_scores(block.pair, logits, last, token[last], covered)
    chain = came[first] - masses.denominator[over] + before[last] - before[first + 1]
    chain = chain + segment_logsumexp(scores, event, len(over)) - norm[last]
    mass = chain.exp().to(masses.target)
    rest = masses.target.shape[1] - 1
    source = (over, _suffix_cells(block.pair, token[first], starts.emitted[over], rest))
    goal = (over, own.token[student])
    masses.target[source] = (masses.target[source] - mass).clamp(min=0)
    masses.target[goal] += mass
    masses.reached[goal] = True


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


def _suffix_cells(pair: PairTables, token: Tensor, emitted: Tensor, rest: int) -> Tensor:
    """Longest student token in the tokens' bytes after `emitted`; `rest`: none, or no byte left."""
    start = ops.trie_tensors(pair.teacher_trie, token.device).path_start
    suffix = start[token] + emitted
    longer = suffix < start[token + 1]
    cell = prefix_maps(pair, token.device).token[torch.where(longer, suffix, 0)]
    return torch.where(longer & (cell >= 0), cell, rest)


def divergences(block: Block, starts: Starts, beta: float | None = None) -> Tensor:
    """KL( t || p ) at every row, or with `beta` the generalized JSD, in nats: [P].

    t are `teacher_masses`, p the student's over the same cells and its residual class. Computed
    over all of the student's tokens, with t's residual divided among those of its class as p is:
    that changes neither the divergence nor its gradient.
    """
    masses, reached = teacher_masses(block, starts)
    logits = ops.rows_of(block.student.scores(), starts.student).float()
    target, lost = _divided(masses, reached, logits.detach())
    if beta is None:
        return ops.forward_kl(logits, target) + lost * (ops.log(lost) - EMPTY)
    chances, scores = logits.softmax(-1), logits.log_softmax(-1)
    none = torch.full_like(lost, EMPTY)
    return _jsd(target, chances, scores, beta).sum(-1) + _jsd(lost, none.exp(), none, beta)


def _divided(masses: Tensor, reached: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The masses [P, V_S] with the residual at its class's tokens, by the student's logits; and [P]
    the residual where its class has no token."""
    cells, reached, rest = masses[:, :-1], reached[:, :-1], masses[:, -1]
    within = logits.add(reached, alpha=NONE).softmax(-1)
    empty = reached.all(1)
    divided = cells + within.mul_(torch.where(empty, 0, rest)[:, None])
    return divided, torch.where(empty, rest, 0)


def _jsd(taught: Tensor, chances: Tensor, scores: Tensor, beta: float) -> Tensor:
    """Summands of the JSD of masses and probabilities; scores: the logarithms of these."""
    mixed = ops.log(beta * taught + (1 - beta) * chances)
    return beta * taught * (ops.log(taught) - mixed) + (1 - beta) * chances * (scores - mixed)
