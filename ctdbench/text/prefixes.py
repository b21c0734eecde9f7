"""What a student's tokens can spell of a teacher's: longest byte prefixes, for every suffix.

A student that has emitted the first k bytes of teacher token w goes on with the suffix of w after
k bytes. All suffixes of all teacher tokens walk down the student's trie together, a byte a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ctdbench.text.vocabulary import ByteTrie, Integers


class PrefixMap:
    """Tables over the suffixes of a teacher's tokens, and over the tokens; all arrays are int64.

    Suffix number `teacher.path_start[w] + k` is teacher token w without its first k bytes, k less
    than its length; S of them.

    token [S]: the longest student token whose bytes the suffix starts with, -1: none (of equal
        bytes the emitted one).
    node [S]: node of the whole suffix in the student's trie, -1 where no student token starts so.
    first [V_T]: `token` of the whole teacher token; of a special, the student's special of the same
        role; -1: none.
    nested [V_T]: for a teacher token without a byte-equal student token, the length of the longest
        shorter token without one that it starts with, 0: none; -1 for a token that has one, and
        for specials.
    """

    def __init__(
        self, student: ByteTrie, teacher: ByteTrie, special_pairs: Sequence[tuple[int, int]] = ()
    ) -> None:
        self._walk(student, teacher)
        lengths = np.diff(teacher.path_start)
        filled = np.flatnonzero(lengths)
        self.first: Integers = np.full(teacher.size, -1, np.int64)
        self.first[filled] = self.token[teacher.path_start[filled]]
        for own, taught in reversed(special_pairs):  # of two claims to an id the first holds
            if not lengths[taught]:
                self.first[taught] = own
        self._nest(student, teacher)

    def _walk(self, student: ByteTrie, teacher: ByteTrie) -> None:
        edges = student.parent[1:] * 256 + student.byte[1:]  # ascending, since breadth first
        text = teacher.byte[teacher.path]
        stop = np.repeat(teacher.path_start[1:], np.diff(teacher.path_start))
        self.token: Integers = np.full(len(text), -1, np.int64)
        self.node: Integers = np.full(len(text), -1, np.int64)
        suffix, node = np.arange(len(text)), np.zeros(len(text), np.int64)
        depth = 0
        while len(suffix):
            wanted = node * 256 + text[suffix + depth]
            place = np.searchsorted(edges, wanted)
            found = edges[np.minimum(place, len(edges) - 1)] == wanted if len(edges) else place < 0
            suffix, node = suffix[found], place[found] + 1
            depth += 1
            whole = student.exact[node] > student.low[node]
            self.token[suffix[whole]] = student.order[student.low[node[whole]]]
            done = suffix + depth == stop[suffix]
            self.node[suffix[done]] = node[done]
            suffix, node = suffix[~done], node[~done]

    def _nest(self, student: ByteTrie, teacher: ByteTrie) -> None:
        """Fill `nested`: lengths are handed down the teacher's trie, a level a step."""
        alone = teacher.exact > teacher.low  # nodes that are a token without a twin
        first = teacher.order[teacher.low[alone]]
        spelled = self.node[teacher.path_start[first]]
        twin = (spelled >= 0) & (student.exact[spelled] > student.low[spelled])
        alone[np.flatnonzero(alone)[twin]] = False
        above = np.zeros(len(alone), np.int64)
        bounds = np.searchsorted(teacher.depth, np.arange(1, teacher.depth[-1] + 2))
        for begin, end in pairwise(bounds.tolist()):
            parent = teacher.parent[begin:end]
            above[begin:end] = np.where(alone[parent], teacher.depth[parent], above[parent])
        self.nested: Integers = np.full(teacher.size, -1, np.int64)
        filled = np.flatnonzero(np.diff(teacher.path_start))
        whole = teacher.path[teacher.path_start[filled + 1] - 1]
        self.nested[filled] = np.where(alone[whole], above[whole], -1)
