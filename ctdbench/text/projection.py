"""X-Token's projection W between two vocabularies (arXiv 2605.21699), and the pairs it makes.

W [V_S, V_T] has at most `top_k` entries a row, which sum to 1. A student token is cut into teacher
tokens t_0, t_1, ..: the first `tokens_to_cut` get the weights 0.9 * 0.1^i, normalised. The reverse
pass cuts the teacher's tokens into student tokens and adds their weights to the same entries, so
that fewer teacher columns stay empty. Rows are normalised and keep their largest entries; a token
that the teacher has too is one-hot. (The public code keeps 32 entries a row before that step and
`top_k` after it, which comes to the same.)

A token is cut by the other side's tokenizer where there is one, and by greedy longest match over
the other side's vocabulary where there is none, or where the tokenizer does not spell the token's
bytes: a piece of a character, or text that its normaliser changes. The public code re-tokenizes
the replacement character there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ctdbench.text.token_bytes import Encoding, TokenBytes
from ctdbench.text.vocabulary import ByteTrie, Integers, one_to_one

Floats = NDArray[np.floating]
Encoder = Callable[[list[str]], Sequence[Sequence[int]]]
DECAY = 0.1  # of the weight from one token of a cut to the next; the paper's 0.9 cancels
RELAXED = np.float32(0.6)  # least top weight of a relaxed pair


class Projection(NamedTuple):
    """W: indices [V_S, k] int64 (-1 for none) and weights [V_S, k] float32, the largest first."""

    indices: Integers
    weights: NDArray[np.float32]


class Coverage(NamedTuple):
    """What W reaches of the teacher: columns, their share, and the mass that they hold."""

    columns: int
    share: float
    mass: float


def build_projection(
    student: Sequence[bytes],
    teacher: Sequence[bytes],
    *,
    encode_student: Encoder | None = None,
    encode_teacher: Encoder | None = None,
    special_pairs: Sequence[tuple[int, int]] = (),
    exact: Integers | None = None,
    reverse_pass: bool = True,
    tokens_to_cut: int = 4,
    top_k: int = 4,
) -> Projection:
    """W from two vocabularies (token id -> bytes, b"" for specials and holes).

    encode_student, encode_teacher: texts -> token ids, without added specials (`encoder`); None:
    greedy longest match. special_pairs: (student id, teacher id) of specials with the same role,
    one-hot like `exact` [M, 2], the tokens that both sides have (None: those with equal bytes).
    Specials without a partner have empty rows and columns; a cut that holds one is left out. Of two
    special pairs that name one id the first holds.
    """
    twins = _twins(student, teacher) if exact is None else exact
    pairs = np.concatenate([twins, one_to_one(special_pairs)])
    one_hot, first = np.unique(pairs[:, 0], return_index=True)
    uncut = list(student)
    for row in one_hot:
        uncut[row] = b""
    own, taught, weight = _weighted(cut_tokens(uncut, teacher, encode_teacher, tokens_to_cut))
    if reverse_pass:
        back = _weighted(cut_tokens(teacher, student, encode_student, tokens_to_cut))
        own, taught = np.append(own, back[1]), np.append(taught, back[0])
        weight = np.append(weight, back[2])
    indices, weights = _largest(own, taught, weight, (len(student), len(teacher)), top_k)
    indices[one_hot], weights[one_hot] = -1, 0
    indices[one_hot, 0], weights[one_hot, 0] = pairs[first, 1], 1
    return Projection(indices, weights.astype(np.float32))


def encoder(tokenizer: TokenBytes) -> Encoder:
    """A tokenizer as `build_projection` calls it; a text that it cannot spell has no ids."""

    def encode(texts: list[str]) -> list[Sequence[int]]:
        encoded = tokenizer.encode_batch(texts)
        return [part.ids.tolist() if isinstance(part, Encoding) else () for part in encoded]

    return encode


def cut_tokens(
    tokens: Sequence[bytes], other: Sequence[bytes], encode: Encoder | None, count: int
) -> Integers:
    """The first `count` ids of every token cut into tokens of `other`, [V, count], -1 past the end.

    Rows of specials, of tokens whose cut holds a special and of those that cannot be cut are -1.
    """
    cuts = np.full((len(tokens), count), -1, np.int64)
    left = [index for index, text in enumerate(tokens) if text]
    # A SentencePiece tokenizer puts a space in front of a text, but not behind a newline.
    for prefix in ("", "\n") if encode is not None else ():
        readable = [(index, prefix + text) for index in left if (text := _text(tokens[index]))]
        assert encode is not None
        done = set()
        encoded = encode([text for _, text in readable])
        for (index, _), ids in zip(readable, encoded, strict=True):
            pieces = _ending(ids, tokens[index], other)
            if pieces is not None:
                cuts[index, : len(pieces[:count])] = pieces[:count]
                done.add(index)
        left = [index for index in left if index not in done]
    cuts[left] = longest_matches([tokens[index] for index in left], ByteTrie(other), count)
    return cuts


def longest_matches(texts: Sequence[bytes], trie: ByteTrie, count: int) -> Integers:
    """The first `count` tokens of each text, cut greedily into the longest token that fits.

    [n, count], -1 past the end; all -1 where no token fits. Of equal tokens the emitted one.
    """
    cuts = np.full((len(texts), count), -1, np.int64)
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    data = np.frombuffer(b"".join(texts), np.uint8).astype(np.int64)
    end = np.cumsum(lengths)
    place = end - lengths
    for step in range(count):
        open_ = np.flatnonzero(place < end)
        node, width = _walk(trie, data, place[open_], end[open_])
        fits = width > 0
        cuts[open_[fits], step] = trie.order[trie.low[node[fits]]]
        cuts[open_[~fits]] = -1
        place[open_] = np.where(fits, place[open_] + width, end[open_])
    return cuts


def common_pairs(projection: Projection, partition: Literal["strict", "relaxed"]) -> Integers:
    """The pairs C that W makes, [M, 2] (student id, teacher id), one to one, by student id.

    A row's largest entry is a candidate: strict, if it is the only one and its weight is 1;
    relaxed, if its weight is at least 0.6 in float32. Of several students on one teacher the
    highest weight wins, then the lowest id.
    """
    present = projection.indices >= 0
    weights = np.where(present, projection.weights, np.float32(-1)).astype(np.float32)
    rows = np.arange(len(weights))
    top = weights.argmax(1)
    weight, teacher = weights[rows, top], projection.indices[rows, top]
    if partition == "strict":
        student = rows[(weight == 1) & (present.sum(1) == 1)]
    else:
        student = rows[weight >= RELAXED]
    student = student[np.lexsort((student, -weight[student]))]
    _, first = np.unique(teacher[student], return_index=True)
    student = np.sort(student[first])
    return np.stack([student, teacher[student]], 1)


def coverage(projection: Projection, teacher_mass: Floats) -> Coverage:
    """How much of the teacher's vocabulary W reaches; the rest no projected row can ever name.

    teacher_mass [V_T]: weights of the teacher's tokens, such as counts in a corpus or the mean of
    its predictions. Mass is the share of it that falls on columns with an entry.
    """
    reached = np.zeros(len(teacher_mass), bool)
    reached[projection.indices[projection.indices >= 0]] = True
    mass = teacher_mass[reached].sum(dtype=np.float64) / teacher_mass.sum(dtype=np.float64)
    return Coverage(int(reached.sum()), float(reached.mean()), float(mass))


def _text(token: bytes) -> str:
    """The token as text, "" where it is none."""
    try:
        return token.decode("utf-8")
    except UnicodeDecodeError:
        return ""


def _ending(ids: Sequence[int], token: bytes, vocabulary: Sequence[bytes]) -> list[int] | None:
    """The last ids, those that spell the token; [] if a special is in; None if none spell it."""
    pieces = [vocabulary[index] for index in ids]
    if not all(pieces):
        return []
    missing, start = len(token), len(ids)
    while missing > 0 and start > 0:
        start -= 1
        missing -= len(pieces[start])
    spelled = not missing and b"".join(pieces[start:]) == token
    return list(ids[start:]) if spelled else None


def _walk(
    trie: ByteTrie, data: Integers, place: Integers, end: Integers
) -> tuple[Integers, Integers]:
    """Node and width of the longest token at each place, [n] each; width 0 where none fits."""
    keys = trie.parent[1:] * 256 + trie.byte[1:]  # ascends: nodes are numbered breadth first
    keys = np.append(keys, np.iinfo(np.int64).max)
    best, width = np.zeros_like(place), np.zeros_like(place)
    active, node = np.arange(len(place)), np.zeros_like(place)
    depth = 0
    while len(active):
        wanted = node * 256 + data[place[active] + depth]
        found = np.searchsorted(keys, wanted)
        there = keys[found] == wanted
        active, node, depth = active[there], found[there] + 1, depth + 1
        whole = trie.exact[node] > trie.low[node]
        best[active[whole]], width[active[whole]] = node[whole], depth
        more = place[active] + depth < end[active]
        active, node = active[more], node[more]
    return best, width


def _weighted(cuts: Integers) -> tuple[Integers, Integers, NDArray[np.float64]]:
    """Cuts [V, count] as entries: the token, its part, and the part's weight, [E] each."""
    present = cuts >= 0
    weights = present * DECAY ** np.arange(cuts.shape[1])
    weights /= np.maximum(weights.sum(1, keepdims=True), DECAY)
    token, place = np.nonzero(present)
    return token, cuts[token, place], weights[token, place]


def _largest(
    own: Integers,
    taught: Integers,
    weight: NDArray[np.float64],
    shape: tuple[int, int],
    top_k: int,
) -> tuple[Integers, NDArray[np.float64]]:
    """Entries summed by cell, the `top_k` largest of each row, normalised; ties by lower id."""
    cells, cell = np.unique(own * shape[1] + taught, return_inverse=True)
    sums = np.bincount(cell, weight, len(cells))
    row, column = np.divmod(cells, shape[1])
    order = np.lexsort((column, -sums, row))
    row, column, sums = row[order], column[order], sums[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    indices, weights = np.full((shape[0], top_k), -1, np.int64), np.zeros((shape[0], top_k))
    kept = rank < top_k
    indices[row[kept], rank[kept]], weights[row[kept], rank[kept]] = column[kept], sums[kept]
    total = weights.sum(1, keepdims=True)
    return indices, np.divide(weights, total, out=weights, where=total > 0)


def _twins(student: Sequence[bytes], teacher: Sequence[bytes]) -> Integers:
    """Every student token with bytes that the teacher has too, and the lowest such teacher id."""
    ids: dict[bytes, int] = {}
    for index, text in enumerate(teacher):
        ids.setdefault(text, index)
    pairs = [(index, ids[text]) for index, text in enumerate(student) if text and text in ids]
    return np.array(pairs, np.int64).reshape(-1, 2)
