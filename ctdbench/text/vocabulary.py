"""Vocabularies as byte strings: the byte-sorted trie, and exact matches between two of them.

Sorted by their bytes, the tokens that start with a given prefix are neighbours: every prefix is an
interval [low, high) of the sorted order, and every mass over a prefix one difference of a
cumulative sum (`ctdbench.ops`). The trie of all prefixes is built level by level over byte columns
and stored as flat arrays, so that a vocabulary of 262k tokens takes a second and no object a node.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


class ByteTrie:
    """The prefixes of a vocabulary as nodes, numbered breadth first; node 0 is the empty prefix.

    vocabulary: token id -> bytes; b"" stands for specials and holes, which are in no node.

    size: V, the length of the vocabulary. N nodes, n non-empty tokens. All arrays are int64:
    order [n]: token ids sorted by their bytes (equal bytes: the emitted one first, `ids_by_bytes`).
    low, high [N]: the tokens that start with the node's prefix are `order[low:high]`.
    exact [N]: those whose bytes are the prefix itself are `order[low:exact]`.
    depth, byte, parent [N]: length of the prefix, its last byte, the node without it (0, -1, -1
        at the root).
    first_child [N + 1]: the children of node k are the nodes first_child[k]:first_child[k + 1],
        in the order of their bytes.
    path_start [V + 1], path [sum of lengths]: token v's prefixes of 1, 2, .. bytes are the nodes
        path[path_start[v]:path_start[v + 1]]; the last one is the node of its full bytes.
    """

    def __init__(self, vocabulary: Sequence[bytes]) -> None:
        self.size = len(vocabulary)
        lengths = np.fromiter(map(len, vocabulary), np.int64, self.size)
        self.path_start: Integers = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.path: Integers = np.zeros(self.path_start[-1], np.int64)
        fallback = _byte_tokens(vocabulary)
        filled = sorted(np.flatnonzero(lengths).tolist(), key=fallback.__contains__)
        self.order: Integers = np.array(sorted(filled, key=vocabulary.__getitem__), np.int64)
        text = np.frombuffer(b"".join(vocabulary), np.uint8)
        self._grow(lengths[self.order], self.path_start[self.order], text)

    def _grow(self, lengths: Integers, starts: Integers, text: NDArray[np.uint8]) -> None:
        """Fill the node arrays, one level of the trie after the other."""
        levels = [np.array([[0], [len(lengths)], [0], [-1], [-1]])]
        node_of = np.zeros(len(lengths), np.int64)  # of every sorted token, at the current depth
        active, count = np.flatnonzero(lengths), 1
        while len(active):
            depth = len(levels) - 1
            column = text[starts[active] + depth].astype(np.int64)
            above = node_of[active]
            new = np.ones(len(active), bool)
            new[1:] = (column[1:] != column[:-1]) | (above[1:] != above[:-1])
            first = np.flatnonzero(new)
            node_of[active] = count + np.cumsum(new) - 1
            self.path[starts[active] + depth] = node_of[active]
            ends = lengths[active] == depth + 1
            low, high = active[first], active[np.append(first[1:], len(active)) - 1] + 1
            exact = low + np.add.reduceat(ends.astype(np.int64), first)
            levels.append(np.stack([low, high, exact, column[first], above[first]]))
            active, count = active[~ends], count + len(first)
        self.low, self.high, self.exact, self.byte, self.parent = np.concatenate(levels, axis=1)
        widths = [level.shape[1] for level in levels]
        self.depth: Integers = np.repeat(np.arange(len(levels)), widths)
        # breadth first, so the children of consecutive nodes are consecutive nodes
        self.first_child: Integers = np.searchsorted(self.parent[1:], np.arange(count + 1)) + 1

    def node(self, prefix: bytes) -> int:
        """The node of `prefix`, or -1 where no token starts with it."""
        node = 0
        for value in prefix:
            begin, end = self.first_child[node : node + 2]
            node = int(begin + np.searchsorted(self.byte[begin:end], value))
            if node == end or self.byte[node] != value:
                return -1
        return node

    def interval(self, prefix: bytes) -> tuple[int, int]:
        """(low, high): `order[low:high]` are the tokens that start with `prefix`; (0, 0): none."""
        node = self.node(prefix)
        return (0, 0) if node < 0 else (int(self.low[node]), int(self.high[node]))


def exact_matches(
    student_vocabulary: Sequence[bytes], teacher_vocabulary: Sequence[bytes]
) -> Integers:
    """Ids of byte-equal tokens, [M, 2] (student, teacher), one to one, by student id.

    Several ids with the same bytes count once, by the one that is emitted; empty ones never.
    """
    students, teachers = ids_by_bytes(student_vocabulary), ids_by_bytes(teacher_vocabulary)
    pairs = [(token, teachers[text]) for text, token in students.items() if text in teachers]
    return np.array(sorted(pairs), np.int64).reshape(-1, 2)


def ids_by_bytes(vocabulary: Sequence[bytes]) -> dict[bytes, int]:
    """Bytes -> the id that a tokenizer emits for them: the lowest of several.

    SentencePiece's byte tokens give way to a piece of the same byte, though their ids are lower: in
    Mistral's vocabulary that is every ASCII letter and digit.
    """
    fallback = _byte_tokens(vocabulary)
    ids: dict[bytes, int] = {}
    for token, text in enumerate(vocabulary):
        if text and token not in fallback:
            ids.setdefault(text, token)
    for token in fallback:
        ids.setdefault(vocabulary[token], token)
    return ids


def one_to_one(pairs: Iterable[tuple[int, int]]) -> Integers:
    """[M, 2]: the pairs without those that name an id again: of two claims the first holds."""
    kept: dict[int, int] = {}
    taken: set[int] = set()
    for student, teacher in pairs:
        if student not in kept and teacher not in taken:
            kept[student] = teacher
            taken.add(teacher)
    return np.array(list(kept.items()), np.int64).reshape(-1, 2)


def emitted(vocabulary: Sequence[bytes]) -> list[bytes]:
    """The vocabulary with b"" for ids that a tokenizer never emits: others have their bytes."""
    ids = ids_by_bytes(vocabulary)
    return [text if ids.get(text) == token else b"" for token, text in enumerate(vocabulary)]


def _byte_tokens(vocabulary: Sequence[bytes]) -> range:
    """The byte tokens of a SentencePiece vocabulary: 256 ids in a row, byte by byte; or none."""
    every = [bytes([value]) for value in range(256)]
    starts = (token for token, text in enumerate(vocabulary) if text == every[0])
    return next(
        (range(i, i + 256) for i in starts if list(vocabulary[i : i + 256]) == every), range(0)
    )
