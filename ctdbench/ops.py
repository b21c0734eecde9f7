"""Tensor operations that methods share: byte-prefix masses, chunks, sorted distance.

Notation: R rows of predictions, V tokens, n non-empty tokens in byte order, E byte events. Masses
are summed in float64; inputs keep their device. Nothing here loops over rows, tokens or bytes.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ctdbench.sorted_distance import sorted_l1 as sorted_l1
from ctdbench.text.vocabulary import ByteTrie

BYTES = 256
RARE = 1e-6  # below this mass a difference of cumulative sums loses digits and is summed directly


class TrieTensors(NamedTuple):
    """The arrays of a `ByteTrie` on a device; see there for their meaning."""

    order: Tensor
    low: Tensor
    high: Tensor
    exact: Tensor
    depth: Tensor
    byte: Tensor
    first_child: Tensor
    path_start: Tensor
    path: Tensor


_ON_DEVICE: WeakKeyDictionary[ByteTrie, dict[str, TrieTensors]] = WeakKeyDictionary()


def trie_tensors(trie: ByteTrie, device: torch.device | str) -> TrieTensors:
    """The trie's arrays on `device`, copied there once for as long as the trie lives."""
    copies = _ON_DEVICE.setdefault(trie, {})
    if str(device) not in copies:
        arrays = (torch.from_numpy(getattr(trie, name)).to(device) for name in TrieTensors._fields)
        copies[str(device)] = TrieTensors(*arrays)
    return copies[str(device)]


def prefix_mass(trie: ByteTrie, probabilities: Tensor, prefix: bytes) -> Tensor:
    """Mass of the tokens whose bytes start with `prefix`: [R, V] -> [R], differentiable.

    The empty prefix holds every token with bytes, so 1 - mass is the specials'. Summed in float64.
    """
    low, high = trie.interval(prefix)
    order = trie_tensors(trie, probabilities.device).order
    return probabilities[:, order[low:high]].sum(1, dtype=torch.float64).to(probabilities.dtype)


def next_byte(trie: ByteTrie, probabilities: Tensor, prefix: bytes) -> Tensor:
    """Distribution of the byte after `prefix` within one token: [R, V] -> [R, 256], differentiable.

    mass(prefix + b) / sum over b: tokens that end at the prefix are left out. Rows where no longer
    token has any mass are all zero.
    """
    masses = probabilities.new_zeros(len(probabilities), BYTES, dtype=torch.float64)
    node = trie.node(prefix)
    if node >= 0:
        tables = trie_tensors(trie, probabilities.device)
        tokens = tables.order[trie.exact[node] : trie.high[node]]
        following = tables.byte[tables.path[tables.path_start[tokens] + len(prefix)]]
        masses = masses.index_add(1, following, probabilities[:, tokens].double())
    return _normalised(masses).to(probabilities.dtype)


def sorted_masses(trie: ByteTrie, probabilities: Tensor) -> Tensor:
    """Cumulative sums over the byte-sorted vocabulary: [R, V] -> [R, n + 1] float64, from 0.

    The mass of a prefix with interval (low, high) is column `high` minus column `low`.
    """
    order = trie_tensors(trie, probabilities.device).order
    return nn.functional.pad(probabilities.index_select(1, order), (1, 0)).cumsum(
        1, dtype=torch.float64
    )


def token_bytes(trie: ByteTrie, token: Tensor, position: Tensor) -> Tensor:
    """The byte at `position` [S] of each token [S], int64 [S]; no position may be past the end."""
    tables = trie_tensors(trie, token.device)
    return tables.byte[tables.path[tables.path_start[token] + position]]


def token_lengths(trie: ByteTrie, token: Tensor) -> Tensor:
    """Number of bytes of each token [R] -> [R]; 0 for specials, holes and -1."""
    start = trie_tensors(trie, token.device).path_start
    known = token.clamp(min=0)
    return torch.where(token >= 0, start[known + 1] - start[known], 0)


@torch.no_grad()
def byte_distributions(
    trie: ByteTrie,
    probabilities: Tensor,
    token: Tensor,
    width: Tensor,
    document: Tensor,
    *,
    select: Tensor | None = None,
    estimator: Literal["path", "mixed"],
    end_bin: bool = False,
) -> Tensor:
    """A teacher's distribution of every byte of its tokens, from one forward; [N, 257] float32.

    probabilities [R, V]: consecutive rows, row r predicts token r. token [R]: -1 where none came.
    width [R]: bytes the token covers in its document; 0 for specials, which emit nothing. Where it
    is smaller than the token's own length (a SentencePiece dummy prefix) the token's first bytes
    count as emitted. document [R]. select [R] bool: only these rows' bytes are returned; the other
    rows still serve as the row before.

    With r the bytes of the token so far and w the token before, of row p (METHODS section 4):
    path: P(b) = mass(r + b) / sum over b. With `end_bin`, column 256 holds the tokens that end at
        r, and the row is normalised over all 257; at a token's first byte it is 0. The event that
        the token did end is `end_probability`: it belongs between two bytes and has no row here.
    mixed: as path, but at a token's first byte, where the row directly before is of the same
        document and its token has bytes,
        P(b) = [mass_p(w + b) + p(w) * mass(b)] / mass_p(w), column 256: p(w) * specials / same.
    Rows sum to 1, except that a row whose prefix has no mass at all is zero.
    """
    tables = trie_tensors(trie, probabilities.device)
    lengths = token_lengths(trie, token)
    chosen = width > 0 if select is None else (width > 0) & select
    rows, offset = ragged(torch.where(chosen, width, 0))
    position = (lengths - width)[rows] + offset
    nodes = _prefix_nodes(tables, token[rows], position)
    masses = _Masses(trie, probabilities)
    out = probabilities.new_zeros(len(rows), BYTES + 1, dtype=torch.float64)
    out[:, :BYTES] = masses.following(rows, nodes)
    if end_bin:
        out[:, BYTES] = masses.ending(rows, nodes)
    if estimator == "mixed":
        before = torch.roll(lengths, 1) > 0
        before &= torch.roll(document, 1) == document
        before[:1] = False
        mixed = torch.nonzero((position == 0) & before[rows]).squeeze(1)
        last = rows[mixed] - 1
        ended = _prefix_nodes(tables, token[last], lengths[last])
        out[mixed] = _mixture(masses, last, ended, out[mixed])
    return _normalised(out).float()


def end_probability(trie: ByteTrie, probabilities: Tensor, token: Tensor) -> Tensor:
    """Probability that the token [R] ends after its bytes, given them: [R] in the rows' dtype.

    The end event of `byte_distributions(.., "path", end_bin=True)`: log P over all bytes of a token
    plus log of this is log p(token | not a special), since the products telescope (ids with equal
    bytes counted as one). 0 for tokens without bytes.
    """
    tables = trie_tensors(trie, probabilities.device)
    rows = torch.nonzero(token_lengths(trie, token) > 0).squeeze(1)
    nodes = _prefix_nodes(tables, token[rows], token_lengths(trie, token[rows]))
    masses = _Masses(trie, probabilities)
    ending, longer = masses.ending(rows, nodes), masses.following(rows, nodes).sum(1)
    share = torch.nan_to_num(ending / (ending + longer)).to(probabilities.dtype)
    return probabilities.new_zeros(len(token)).index_copy(0, rows, share)


class _Masses:
    """Masses of trie nodes under some rows, several (row, node) pairs at once."""

    def __init__(self, trie: ByteTrie, probabilities: Tensor) -> None:
        self.tables = trie_tensors(trie, probabilities.device)
        self.probabilities = probabilities
        self.sums = sorted_masses(trie, probabilities)

    def following(self, rows: Tensor, nodes: Tensor) -> Tensor:
        """Mass of every next byte after the nodes' prefixes, [E, 256] float64."""
        begin = self.tables.first_child[nodes]
        event, offset = ragged(self.tables.first_child[nodes + 1] - begin)
        child, row = begin[event] + offset, rows[event]
        mass = self.sums[row, self.tables.high[child]] - self.sums[row, self.tables.low[child]]
        out = self.sums.new_zeros(len(rows), BYTES)
        out[event, self.tables.byte[child]] = mass.clamp(min=0)
        rare = torch.nonzero(out.sum(1) < RARE).squeeze(1)
        out[rare] = self._summed(rows[rare], nodes[rare])
        return out

    def ending(self, rows: Tensor, nodes: Tensor) -> Tensor:
        """Mass of the tokens that are exactly the nodes' prefixes, [E] float64."""
        event, token = self._tokens(self.tables.low[nodes], self.tables.exact[nodes])
        return segment_sum(self.probabilities[rows[event], token].double(), event, len(rows))

    def _summed(self, rows: Tensor, nodes: Tensor) -> Tensor:
        event, token = self._tokens(self.tables.exact[nodes], self.tables.high[nodes])
        position = self.tables.path_start[token] + self.tables.depth[nodes][event]
        cell = event * BYTES + self.tables.byte[self.tables.path[position]]
        mass = self.probabilities[rows[event], token].double()
        return segment_sum(mass, cell, len(rows) * BYTES).reshape(-1, BYTES)

    def _tokens(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        event, offset = ragged(high - low)
        return event, self.tables.order[low[event] + offset]


def _mixture(masses: _Masses, rows: Tensor, nodes: Tensor, first: Tensor) -> Tensor:
    """Masses [M, 257] after the full tokens `nodes` of the rows before, whether they end or go on.

    first [M, 257]: masses of a new token's first byte, under the rows after; column 256 empty.
    """
    specials = (1 - first.sum(1, keepdim=True)).clamp(min=0)
    out = torch.cat([first[:, :BYTES], specials], 1) * masses.ending(rows, nodes)[:, None]
    out[:, :BYTES] += masses.following(rows, nodes)
    return out


def _prefix_nodes(tables: TrieTensors, token: Tensor, length: Tensor) -> Tensor:
    """The nodes of the tokens' first `length` bytes, [E]; the root for length 0."""
    place = (tables.path_start[token] + length - 1).clamp(min=0)
    return torch.where(length > 0, tables.path[place], 0)


def _normalised(masses: Tensor) -> Tensor:
    total = masses.sum(-1, keepdim=True)
    return masses / torch.where(total > 0, total, 1)


def ragged(counts: Tensor) -> tuple[Tensor, Tensor]:
    """(owner, offset), each [sum of counts]: owner i comes counts[i] times, offsets 0, 1, .."""
    owner = torch.repeat_interleave(counts)
    begin = counts.cumsum(0) - counts
    return owner, torch.arange(len(owner), device=counts.device) - begin[owner]


def segment_sum(values: Tensor, index: Tensor, segments: int) -> Tensor:
    """Sums of the values [N, ..] that share an index [N] in 0..segments-1: [segments, ..]."""
    return values.new_zeros(segments, *values.shape[1:]).index_add(0, index, values)


def last_rows(chunk: Tensor, chunks: int) -> Tensor:
    """The last row of every chunk, [chunks]; -1: no row. chunk [R], -1 for rows outside chunks."""
    rows = torch.nonzero(chunk >= 0).squeeze(1)
    last = torch.full((chunks,), -1, device=chunk.device)
    return last.scatter_reduce(0, chunk[rows], rows, "amax")


def last_row_pairs(student: Tensor, teacher: Tensor, chunks: int) -> Tensor:
    """Student's and teacher's last row of every chunk that has rows on both sides, [M, 2].

    student [R_S], teacher [R_T]: chunk of every row in 0..chunks-1, or -1.
    """
    last = torch.stack([last_rows(chunk, chunks) for chunk in (student, teacher)], 1)
    return last[(last >= 0).all(1)]


def shared_chunks(student: Tensor, teacher: Tensor, chunks: int) -> tuple[Tensor, Tensor, int]:
    """The chunks that have rows on both sides, numbered anew 0..M-1.

    student [R_S], teacher [R_T]: chunk of every row in 0..chunks-1, or -1. Returns the same for the
    new numbers, and M.
    """
    sides = (student, teacher)
    shared = torch.stack([last_rows(chunk, chunks) >= 0 for chunk in sides]).all(0)
    number = torch.where(shared, shared.cumsum(0) - 1, -1)
    number = nn.functional.pad(number, (0, 1), value=-1)  # what chunk -1 finds
    return number[student], number[teacher], int(shared.sum())


def chunk_means(values: Tensor, chunk: Tensor, chunks: int) -> Tensor:
    """Mean of every chunk's rows, [chunks, V]; 0 without rows. values [R, V]; chunk [R] or -1."""
    if torch.equal(chunk, torch.arange(chunks, device=chunk.device)):
        return values  # a row each, in their order
    place = torch.where(chunk >= 0, chunk, chunks)  # rows outside fall into one chunk more
    sizes = torch.bincount(place, minlength=chunks + 1)[:chunks, None]
    return segment_sum(values, place, chunks + 1)[:chunks] / sizes.clamp(min=1)


def project(
    probabilities: Tensor, source: Tensor, target: Tensor, weight: Tensor, columns: int
) -> Tensor:
    """Rows times a sparse matrix: [M, V] -> [M, columns], differentiable in rows and weights.

    The matrix has the entries weight[e] at (source[e], target[e]), [E] each, in any order.
    """
    entries = probabilities.index_select(1, source) * weight.to(probabilities.dtype)
    return probabilities.new_zeros(len(probabilities), columns).index_add(1, target, entries)


def merged_chunks(
    logits: Tensor,
    token: Tensor,
    chunk: Tensor,
    last: Tensor,
    chunks: int,
    temperature: float = 1.0,
) -> Tensor:
    """Log-masses of chunks, chain rule over the tokens that came: [M, V], not renormalised.

    m(y) = p_k(y) * prod over the chunk's earlier rows j of max(p_j(token_j), 1e-8), k the chunk's
    last row and p = softmax(logits / temperature) (METHODS section 2). logits [R, V]; token and
    chunk [R], chunk in 0..chunks-1 or -1; last [M]: the last rows of the chunks to return.
    """
    scores = tempered(rows_of(logits, last), temperature).log_softmax(-1)
    earlier = chunk >= 0
    earlier[last] = False
    rows = torch.nonzero(earlier).squeeze(1)
    if not len(rows):
        return scores
    came = tempered(logits.index_select(0, rows), temperature).log_softmax(-1)
    came = came.gather(1, token[rows, None]).squeeze(1).clamp(min=math.log(1e-8))
    return scores + segment_sum(came, chunk[rows], chunks)[chunk[last], None]


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature, without a copy for 1."""
    return logits if temperature == 1 else logits / temperature


def rows_of(values: Tensor, index: Tensor) -> Tensor:
    """Rows [M] of values [R, ..], without a copy where they are all, in their order."""
    every = torch.arange(len(values), device=index.device)
    return values if torch.equal(index, every) else values.index_select(0, index)


def forward_kl(logits: Tensor, target: Tensor, log_target: Tensor | None = None) -> Tensor:
    """KL( target || softmax(logits) ) of rows: [M, V] twice -> [M], nats.

    target: probabilities, which need not sum to 1; log_target: their logarithms, if at hand.
    Differentiable in `logits` only.
    """
    scores = log(target) if log_target is None else log_target
    divergence: Tensor = _ForwardKL.apply(logits, target.detach(), scores.detach())  # type: ignore[no-untyped-call]
    return divergence


def reverse_kl(logits: Tensor, log_target: Tensor) -> Tensor:
    """KL( softmax(logits) || e^log_target ) of rows: [M, V] twice -> [M], nats.

    Differentiable in `logits` only.
    """
    divergence: Tensor = _ReverseKL.apply(logits, log_target.detach())  # type: ignore[no-untyped-call]
    return divergence


class _WithSlope(torch.autograd.Function):
    """Base of functions of rows [M, V] -> [M] that save their gradient in the forward."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        unused = (None,) * (len(ctx.needs_input_grad) - 1)
        return slope * gradient[:, None], *unused


class _ForwardKL(_WithSlope):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, log_target: Tensor) -> Tensor:
        slope = logits.softmax(-1).mul_(target.sum(-1, keepdim=True)).sub_(target)
        ctx.save_for_backward(slope)
        return (log_target - logits.log_softmax(-1)).mul_(target).sum(-1)


class _ReverseKL(_WithSlope):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_target: Tensor) -> Tensor:
        p, gap = logits.softmax(-1), logits.log_softmax(-1).sub_(log_target)
        value = (p * gap).sum(-1)
        ctx.save_for_backward(gap.sub_(value[:, None]).mul_(p))
        return value


# MKL's exp and log are 20 to 70 times slower on what underflows than on other numbers; softmax and
# log_softmax do not use them.


def log(masses: Tensor) -> Tensor:
    """Logarithms; of 0 that of the least normal number."""
    return masses.clamp(min=torch.finfo(masses.dtype).tiny).log_()


def exp(values: Tensor) -> Tensor:
    """e^values, at least the least normal number."""
    return values.clamp(min=math.log(torch.finfo(values.dtype).tiny)).exp()


class Columns(NamedTuple):
    """Some of a vocabulary's columns, [n], and the rest in their order, [V - n]."""

    some: Tensor
    rest: Tensor

    @classmethod
    def of(cls, some: Tensor, size: int) -> Columns:
        """some: columns of `size`, in any order."""
        others = torch.ones(size, dtype=torch.bool, device=some.device)
        others[some] = False
        return cls(some, torch.nonzero(others).squeeze(1))

    def split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """[M, V] -> [M, n] and [M, V - n]."""
        return values.index_select(1, self.some), values.index_select(1, self.rest)
