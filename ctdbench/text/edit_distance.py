"""Edit distances between tokens, the nearest token of another vocabulary, and time warping.

Distances are Levenshtein's over bytes: an insertion, deletion or substitution costs 1. A column of
the edit table is two bit masks, its rises and its falls (Myers, J. ACM 46(3), 1999). One side's
prefixes are walked as a trie, whose nodes extend their parent's column by a byte, for many tokens
of the other side at once. Nothing is estimated or left out, and still 49k tokens find their nearest
ones among 33k in some seconds on one core, and 262k among 49k in two or three minutes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ctdbench.text.vocabulary import ByteTrie, Integers, ids_by_bytes

Words = NDArray[Any]  # unsigned integers, of 8 to 64 bits
BITS = 1 << 11  # of the queries that walk the trie together: bounds the memory of a level
CACHED = 1 << 17  # columns that advance together: their masks stay in the processor's cache
DIAGONAL, UP, BACK = range(3)  # the step that enters a cell of a path
FAR = 1 << 40  # a cost that no path has


class _Level(NamedTuple):
    """The columns of n queries at the N nodes of one depth.

    rises, falls [W, N, n]: for every step down a column, whether it goes up or down by one. A query
    fills the highest bits of its W words; those below are its empty prefix, repeated.
    distance [N, n]: between the whole query and the node's prefix, the foot of the column.
    """

    rises: Words
    falls: Words
    distance: Words


def levenshtein(queries: Sequence[bytes], others: Sequence[bytes]) -> Integers:
    """The distances of all pairs, [len(queries), len(others)]."""
    place = {text: index for index, text in enumerate(dict.fromkeys(others))}
    found = np.empty((len(place), len(queries)), np.int64)
    if b"" in place:
        found[place[b""]] = [len(query) for query in queries]
    if queries:
        for _, tokens, distance in _levels(queries, ByteTrie(list(place))):
            found[tokens] = distance
    return found[[place[text] for text in others]].T


def minimum_edit_map(
    queries: Sequence[bytes],
    candidates: Sequence[bytes],
    special_pairs: Sequence[tuple[int, int]] = (),
) -> Integers:
    """The id of the candidate at the least distance from every query, [len(queries)]; -1: none.

    Equal bytes come first; of several candidates at the least distance the lowest id counts. Of ids
    with the same bytes, on either side, only the one that a tokenizer emits takes part: the others
    neither have a match nor are one, and neither do empty tokens but those in special_pairs (query
    id, candidate id), of which the first with a query holds.
    """
    wanted, offered = ids_by_bytes(queries), ids_by_bytes(candidates)
    found = np.full(len(queries), -1, np.int64)
    for query, candidate in reversed(special_pairs):
        if not queries[query]:
            found[query] = candidate
    for text, query in wanted.items():
        found[query] = offered.get(text, -1)
    missing = [text for text in wanted if text not in offered] if offered else []
    missing.sort(key=lambda text: (-len(text), text))
    ids = np.array(sorted(offered.values()), np.int64)
    trie = ByteTrie([candidates[candidate] for candidate in ids])
    while missing:
        count = max(1, BITS // max(8, len(missing[0])))
        batch, missing = missing[:count], missing[count:]
        found[[wanted[text] for text in batch]] = ids[_nearest(batch, trie)]
    return found


def time_warp(cost: Integers) -> Integers:
    """The cheapest path through costs [n, m] from corner to corner: its rows and columns, [P, 2].

    Dynamic time warping, D[i, j] = cost[i, j] + min(D[i-1, j-1], D[i-1, j], D[i, j-1]). Where paths
    cost the same, the one found from the end that goes diagonally before up a row before back a
    column (as in FuseLLM's and DSKD's code).
    """
    rows, columns = cost.shape
    steps = np.empty((rows, columns), np.uint8)
    before = np.append(0, np.full(columns, FAR))
    for i, row in enumerate(cost):
        entered = np.minimum(before[:-1], before[1:])
        total = np.cumsum(row)  # from an entry on, a row costs what lies between
        now = np.append(FAR, total + np.minimum.accumulate(entered - total + row))
        straight = np.where(before[1:] <= now[:-1], UP, BACK)
        beside = np.minimum(before[1:], now[:-1])
        steps[i] = np.where(before[:-1] <= beside, DIAGONAL, straight)
        before = now
    return _walked_back(steps)


def _walked_back(steps: NDArray[np.uint8]) -> Integers:
    """The path that ends in the last corner, from its start."""
    rows, columns = steps.shape
    taken = steps.tobytes()
    i, j = rows - 1, columns - 1
    path = []
    while i >= 0 and j >= 0:
        path.append((i, j))
        step = taken[i * columns + j]
        i, j = i - (step != BACK), j - (step != UP)
    return np.array(path[::-1], np.int64).reshape(-1, 2)


def _nearest(queries: Sequence[bytes], trie: ByteTrie) -> Integers:
    """The token at the least distance from every query, of several the lowest, [n]."""
    longest = max(map(len, queries))
    worst = trie.size * (1 + max(longest, int(trie.depth[-1])))
    best = np.full(len(queries), worst, np.min_scalar_type(worst))  # distance * size + token
    size = best.dtype.type(trie.size)
    for depth, tokens, distance in _levels(queries, trie):
        if depth - longest > int(best.max()) // trie.size:
            break  # what is longer yet needs more insertions
        key = distance.astype(best.dtype) * size + tokens.astype(best.dtype)[:, None]
        np.minimum(best, key.min(0), out=best)
    return (best % size).astype(np.int64)


def _levels(queries: Sequence[bytes], trie: ByteTrie) -> Iterator[tuple[int, Integers, Words]]:
    """Depth by depth: the depth, tokens that are so long [E], distances to the queries [E, n].

    Of tokens with the same bytes the lowest.
    """
    match, above = _start(queries, int(trie.depth[-1]))
    bounds = np.searchsorted(trie.depth, np.arange(trie.depth[-1] + 2)).tolist()
    ends = trie.exact > trie.low
    step = max(1, CACHED // len(queries))
    for depth, (begin, end) in enumerate(pairwise(bounds[1:]), 1):
        level = _Level(*(_empty(part, end - begin) for part in above))
        for first in range(begin, end, step):
            nodes = slice(first, min(first + step, end))
            place = slice(nodes.start - begin, nodes.stop - begin)
            parents = trie.parent[nodes] - bounds[depth - 1]
            _advance(match[:, trie.byte[nodes]], above, parents, level, place)
            if ends[nodes].any():
                ending = first + np.flatnonzero(ends[nodes])
                yield depth, trie.order[trie.low[ending]], level.distance[ending - begin]
        above = level


def _empty(part: Words, nodes: int) -> Words:
    return np.empty((*part.shape[:-2], nodes, part.shape[-1]), part.dtype)


def _start(queries: Sequence[bytes], depth: int) -> tuple[Words, _Level]:
    """Which bytes of a query are equal to a byte, [W, 256, n]; and the columns at the root."""
    lengths = np.fromiter(map(len, queries), np.int64, len(queries))
    longest = int(lengths.max())
    words = max(1, -(-longest // 64))
    size = next(size for size in (1, 2, 4, 8) if longest <= 8 * size * words)
    lane = np.dtype(f"u{size}")
    query = np.repeat(np.arange(len(queries)), lengths)
    data = np.frombuffer(b"".join(queries), np.uint8)
    word, bit = np.divmod(
        8 * size * words - lengths.cumsum()[query] + np.arange(len(data)), 8 * size
    )
    match = np.zeros((words, 256, len(queries)), lane)
    np.bitwise_or.at(match, (word, data, query), np.left_shift(lane.type(1), bit.astype(lane)))
    rises = np.bitwise_or.reduce(match, 1, keepdims=True)
    counted = np.result_type(lane, np.min_scalar_type(max(longest, depth)))
    return match, _Level(rises, np.zeros_like(rises), lengths.astype(counted)[None])


def _advance(match: Words, above: _Level, parents: Integers, level: _Level, place: slice) -> None:
    """Fill `level` at `place`: the columns of nodes, from those of their parents.

    match [W, N, n]: which bytes of the queries are equal to the nodes' last ones. Hyyrö's form of
    the recurrence for several words (Nordic J. Computing 10, 2003). up and down: by what the table
    changes from the parent to the node, at every row of a column and then at a word's last one.
    """
    one, last = match.dtype.type(1), match.dtype.type(8 * match.itemsize - 1)
    into_up, into_down = one, match.dtype.type(0)  # an empty prefix is a byte further away
    for word, equal in enumerate(match):
        rises, falls = above.rises[word, parents], above.falls[word, parents]
        carried = equal | into_down
        across = (((carried & rises) + rises) ^ rises) | carried
        up, down = falls | ~(across | rises), across & rises
        shifted_up, shifted_down = (up << one) | into_up, (down << one) | into_down
        into_up, into_down = up >> last, down >> last
        level.rises[word, place] = shifted_down | ~(equal | falls | shifted_up)
        level.falls[word, place] = shifted_up & (equal | falls)
    level.distance[place] = above.distance[parents] + into_up - into_down
