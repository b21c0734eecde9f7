"""The beam estimator of a token model's byte distributions (BLD, arXiv 2604.07466, section 3).

P(b | prefix) = P(prefix + b) / P(prefix), where P(.) sums over every token sequence that covers the
bytes. A hypothesis is one such sequence: a context of finished tokens, a node of the vocabulary
trie for the bytes since, and the context's probability. A byte moves it one node down at no model
call; only finishing a token calls the model, and only for hypotheses that survive pruning. With
nothing pruned the result is exact. When no survivor can take the next byte, the beam heals: it
starts anew from its longest context, with the bytes since cut into longest tokens.

The text is known, so a beam that needs the model asks for what it will need soon as well: the
text's own tokens, and whatever branches off contexts at hand with a share above the threshold. That
changes no result; it turns a call a byte into a few calls for every `AHEAD` bytes.

Several documents are searched together: each goes on until it needs the model, and one forward
answers them all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ctdbench.distill.tree_scorer import Context, Floats, Integers, score, scorer_of
from ctdbench.text.vocabulary import ByteTrie

ENDS = 256  # the column of the text's end
ROOT = 0
AHEAD = 64  # bytes: how far a beam asks beyond the place where it stands
LIKELY = 0.01  # share of the mass from which a branch is asked for ahead of its need

Encode = Callable[[bytes], Sequence[int]]  # a text's tokens, whose bytes joined are the text


class Hypothesis(NamedTuple):
    """`weight`: probability of the context, up to a factor that all hypotheses share."""

    context: Context
    node: int
    weight: float


def beam_distributions(
    model: Any,
    trie: ByteTrie,
    texts: Sequence[bytes],
    bos: Sequence[int],
    *,
    width: int = 10,
    prune: float = 0.01,
    encode: Encode | None = None,
) -> list[Tensor]:
    """The model's distribution of every byte of documents given those before: [bytes, 257] each.

    model: a transformers causal LM, or a function from token sequences to the log-probabilities
    [sequences, V] of the next token. trie: its vocabulary. bos: tokens before a text, not empty.
    width: K, hypotheses kept. prune: finished tokens below this share of the beam's mass are
    dropped. encode: the tokenizer, for speed alone: the text's own tokens are scored early.
    Column 256 is the probability that the text ends (all specials, at token boundaries). float32 on
    the CPU; rows sum to 1. After a byte that no token holds the rows are zero.
    """
    if not bos:
        raise ValueError("the beam needs at least one token before the text, such as BOS")
    scorer = scorer_of(model, trie.size)
    beams = [_Beam(trie, text, bos, width, prune, encode) for text in texts]
    waiting = [(beam, beam.run()) for beam in beams]
    while waiting:
        asked = [(beam, run, contexts) for beam, run in waiting if (contexts := next(run, None))]
        waiting = [(beam, run) for beam, run, _ in asked]
        scorer.keep([context for beam, _ in waiting for context in beam.contexts])
        if contexts := [context for _, _, contexts in asked for context in contexts]:
            score(scorer, trie, contexts)
    return [torch.from_numpy(beam.rows) for beam in beams]


class _Beam:
    """The search over one document.

    rows [bytes, 257]: what it found. contexts: those at hand, which may still be extended.
    own: the last context of the text's own tokens that was asked for; rest: the tokens after it.
    """

    def __init__(
        self,
        trie: ByteTrie,
        text: bytes,
        bos: Sequence[int],
        width: int,
        prune: float,
        encode: Encode | None,
    ) -> None:
        self.trie, self.text, self.width, self.prune = trie, text, width, prune
        self.rows = np.zeros((len(text), ENDS + 1), np.float32)
        self.contexts: list[Context] = []
        self.own = Context(tuple(bos))
        self.rest = deque(encode(text) if encode else ())

    def run(self) -> Iterator[list[Context]]:
        """Go through the text; yields contexts that have to be scored before it can go on."""
        hypotheses = [Hypothesis(self.own, ROOT, 1.0)]
        yield from self._asking(hypotheses, 0)
        for place in range(len(self.text)):
            hypotheses, dropped = self.survivors(hypotheses, place)
            yield from self._asking(hypotheses, place)
            self.rows[place] = self.distribution([*hypotheses, *dropped])
            moved = self.advanced(hypotheses, place)
            if not moved:
                healed = self.healed(hypotheses, place)
                yield from self._asking(healed, place + 1)
                moved = self.rescaled(healed)
            if not moved:
                break
            hypotheses = moved

    # --- asking the model ---------------------------------------------------------------------

    def _asking(self, hypotheses: Sequence[Hypothesis], place: int) -> Iterator[list[Context]]:
        unscored = [one.context for one in hypotheses if not one.context.is_scored]
        if unscored:
            asked = {id(context): context for context in unscored}
            asked |= {id(context): context for context in self._own_tokens(place + AHEAD)}
            asked |= {id(context): context for context in self._branches(hypotheses, place)}
            roots = [self.own, *asked.values(), *(one.context for one in hypotheses)]
            found = {id(one): one for root in roots for one in root.family()}
            self.contexts = list(found.values())
            yield list(asked.values())

    def _own_tokens(self, stop: int) -> Iterator[Context]:
        """Contexts of the text's own tokens, up to the byte `stop`; half the way at least."""
        if self.own.end > stop - AHEAD // 2:
            return
        while self.rest and self.own.end < stop:
            token = self.rest.popleft()
            size = int(self.trie.path_start[token + 1] - self.trie.path_start[token])
            self.own = self.own.child(token, self.own.end + size)
            if not self.own.is_scored:  # it may have been a likely branch
                yield self.own

    def _branches(self, hypotheses: Sequence[Hypothesis], place: int) -> list[Context]:
        """Contexts that will be asked for once the beam is there, unless its mass has grown."""
        stop = min(place + AHEAD, len(self.text))
        cover = np.zeros(stop + 1)  # of every place the mass of what is known to reach it
        ways: list[tuple[int, float, Context, int]] = []  # end, mass, parent, token
        known = [(one.context, one.weight) for one in hypotheses if one.context.is_scored]
        while known:
            context, weight = known.pop()
            node, ends = ROOT, range(context.end, stop)
            for end in ends:
                node = self._child(node, self.text[end])
                if node < 0:
                    break
                low, exact, high = (int(part[node]) for part in self._spans)
                cover[end + 1] += weight * context.mass(low, high)
                for index in range(low, exact if end >= place else low):
                    mass, token = (
                        weight * context.mass(index, index + 1),
                        int(self.trie.order[index]),
                    )
                    child = context.children.get(token)
                    if child is not None and child.is_scored:
                        known.append((child, mass))
                    else:
                        ways.append((end + 1, mass, context, token))
        least = max(self.prune, LIKELY)
        likely = (way for way in ways if way[1] > least * cover[way[0]])
        return [parent.child(token, end) for end, _, parent, token in likely]

    @property
    def _spans(self) -> tuple[Integers, Integers, Integers]:
        return self.trie.low, self.trie.exact, self.trie.high

    def _child(self, node: int, byte: int) -> int:
        """The node one byte further; -1 for none."""
        begin, end = self.trie.first_child[node : node + 2]
        child = int(begin + np.searchsorted(self.trie.byte[begin:end], byte))
        return child if child < end and self.trie.byte[child] == byte else -1

    # --- the search ---------------------------------------------------------------------------

    def following(self, context: Context, node: int) -> Floats:
        """Masses of the node's children under the context."""
        begin, end = self.trie.first_child[node : node + 2]
        masses: Floats = (
            context.sums[self.trie.high[begin:end]] - context.sums[self.trie.low[begin:end]]
        )
        return masses

    def survivors(
        self, hypotheses: list[Hypothesis], place: int
    ) -> tuple[list[Hypothesis], list[Hypothesis]]:
        """Each hypothesis goes on in its token or, where the bytes are one, ends it; then prune.

        To go on costs no model call, so only finished tokens are held to the threshold. The second
        list has those of the pruned whose next byte is known all the same.
        """
        candidates = []
        for context, node, weight in hypotheses:
            low, exact, high = (int(part[node]) for part in self._spans)
            longer = weight * context.mass(exact, high)
            candidates.append((longer, Hypothesis(context, node, weight)))
            for index in range(low, exact):
                ended = weight * context.mass(index, index + 1)
                child = context.child(int(self.trie.order[index]), place)
                candidates.append((ended, Hypothesis(child, ROOT, ended)))
        candidates.sort(key=lambda candidate: -candidate[0])
        least = self.prune * sum(mass for mass, _ in candidates)
        good = [one for m, one in candidates if m > 0 and (one.node != ROOT or m >= least)]
        return good[: self.width], [one for one in good[self.width :] if one.node != ROOT]

    def distribution(self, hypotheses: list[Hypothesis]) -> Floats:
        """The next byte, or the end, over all hypotheses: [257]."""
        row = np.zeros(ENDS + 1)
        for context, node, weight in hypotheses:
            begin, end = self.trie.first_child[node : node + 2]
            row[self.trie.byte[begin:end]] += weight * self.following(context, node)
            row[ENDS] += weight * context.specials if node == ROOT else 0.0
        total = row.sum()
        return row / total if total > 0 else row

    def advanced(self, hypotheses: list[Hypothesis], place: int) -> list[Hypothesis]:
        """Those that can take the byte at `place`, one node further down."""
        children = [self._child(one.node, self.text[place]) for one in hypotheses]
        moved = zip(hypotheses, children, strict=True)
        return self.rescaled([one._replace(node=child) for one, child in moved if child >= 0])

    def rescaled(self, hypotheses: list[Hypothesis]) -> list[Hypothesis]:
        """The same, with 1 as the probability of all together; none where it is 0."""
        low, _, high = self._spans
        total = sum(w * c.mass(low[n], high[n]) for c, n, w in hypotheses)
        return [one._replace(weight=one.weight / total) for one in hypotheses] if total > 0 else []

    def healed(self, hypotheses: list[Hypothesis], place: int) -> list[Hypothesis]:
        """One hypothesis over all bytes up to `place`, from the longest context of the beam."""
        anchor = max(hypotheses, key=lambda one: (one.context.end, one.weight), default=None)
        if anchor is None:
            return []
        context = anchor.context
        while (node := self.trie.node(self.text[context.end : place + 1])) < 0:
            length, token = self._longest_token(context.end, place + 1)
            if not length:
                return []
            context = context.child(token, context.end + length)
        return [Hypothesis(context, node, 1.0)]

    def _longest_token(self, begin: int, end: int) -> tuple[int, int]:
        """(bytes, id) of the longest token that the text has at `begin`; (0, -1) for none."""
        for stop in range(end, begin, -1):
            node = self.trie.node(self.text[begin:stop])
            if node >= 0 and self.trie.exact[node] > self.trie.low[node]:
                return stop - begin, int(self.trie.order[self.trie.low[node]])
        return 0, -1
