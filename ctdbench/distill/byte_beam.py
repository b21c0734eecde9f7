"""The beam estimator of a token model's byte distributions (BLD, arXiv 2604.07466, section 3).

P(b | prefix) = P(prefix + b) / P(prefix), where P(.) sums over every token sequence that covers the
bytes. A hypothesis is one such sequence: a context of finished tokens, a node of the vocabulary
trie for the bytes since, and the context's probability. A byte moves it one node down at no model
call; only finishing a token calls the model, and only for hypotheses that survive pruning. With
nothing pruned the result is exact. When no survivor can take the next byte, the beam heals: it
starts anew from its longest context, with the bytes since cut into longest tokens.

The contexts of a document form a tree. `TreeScorer` keeps one key-value cache that only grows, a
place for each tree node, and scores all new nodes of a step in one forward, under a mask in which
a node sees its ancestors. Several documents are a forest in the same cache: each goes on until it
needs the model, and one forward answers them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctdbench.errors import RunError
from ctdbench.text.vocabulary import ByteTrie

ENDS = 256  # the column of the text's end
ROOT = 0
SPARE_SLOTS = 256  # dead cache entries that are not worth a copy
# families whose forward takes a finished 4-D mask, and how: {model_type: one mask per layer type}
TREE_FAMILIES = {
    "llama": False,
    "mistral": False,
    "phi3": False,
    "gemma2": True,
    "gemma3_text": True,
    "qwen2": True,
    "qwen3": True,
    "smollm3": True,
}

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
LogProbabilities = Callable[[list[tuple[int, ...]]], Tensor]


@dataclass(eq=False)
class Context:
    """Tokens that cover the document's first `end` bytes (after the BOS tokens).

    slots: cache places of the first tokens, as far as they were computed. masses [n]: probability
    of every next token in byte order; specials: that of all others. Both are set by scoring.
    """

    tokens: tuple[int, ...]
    end: int = 0
    slots: Integers = field(default_factory=lambda: np.zeros(0, np.int64))
    masses: Floats = field(default_factory=lambda: np.zeros(0))
    specials: float = 0.0

    def extended(self, tokens: Sequence[int], end: int) -> Context:
        """The unscored context with further tokens, up to byte `end`."""
        return Context((*self.tokens, *tokens), end, self.slots)


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
) -> list[Tensor]:
    """The model's distribution of every byte of documents given those before: [bytes, 257] each.

    model: a transformers causal LM, or a function from token sequences to the log-probabilities
    [sequences, V] of the next token. trie: its vocabulary. bos: tokens before a text, not empty.
    width: K, hypotheses kept. prune: those below this share of the beam's mass are dropped.
    Column 256 is the probability that the text ends (all specials, at token boundaries). float32 on
    the CPU; rows sum to 1. After a byte that no token holds the rows are zero.
    """
    if not bos:
        raise ValueError("the beam needs at least one token before the text, such as BOS")
    scorer = _scorer(model, trie.size)
    beams = [_Beam(trie, text, bos, width, prune) for text in texts]
    waiting = [(beam, beam.run()) for beam in beams]
    while waiting:
        asked = [(beam, run, contexts) for beam, run in waiting if (contexts := next(run, None))]
        waiting = [(beam, run) for beam, run, _ in asked]
        scorer.keep([context for beam, _ in waiting for context in beam.contexts])
        _score(scorer, trie, [context for _, _, contexts in asked for context in contexts])
    return [torch.from_numpy(beam.rows) for beam in beams]


def _score(scorer: Scorer, trie: ByteTrie, contexts: Sequence[Context]) -> None:
    """Call the model for contexts that it has not seen."""
    if not contexts:
        return
    scores = scorer.log_probabilities(contexts)
    order = torch.from_numpy(trie.order).to(scores.device)
    masses = scores[:, order].double().exp().cpu().numpy()
    if not np.isfinite(masses).all():
        raise RunError("the teacher's logits are not finite", "try it in float32")
    for context, row in zip(contexts, masses, strict=True):
        context.masses, context.specials = row, max(0.0, 1.0 - float(row.sum()))


class _Beam:
    """The search over one document.

    rows [bytes, 257]: what it found. contexts: those that it may still extend.
    """

    def __init__(
        self, trie: ByteTrie, text: bytes, bos: Sequence[int], width: int, prune: float
    ) -> None:
        self.trie, self.text, self.bos, self.width, self.prune = trie, text, bos, width, prune
        self.rows = np.zeros((len(text), ENDS + 1), np.float32)
        self.contexts: list[Context] = []

    def run(self) -> Iterator[list[Context]]:
        """Go through the text; yields contexts that have to be scored before it can go on."""
        hypotheses = [Hypothesis(Context(tuple(self.bos)), ROOT, 1.0)]
        yield from self._asking(hypotheses)
        for place in range(len(self.text)):
            hypotheses, dropped = self.survivors(hypotheses, place)
            yield from self._asking(hypotheses)
            self.rows[place] = self.distribution([*hypotheses, *dropped])
            moved = self.advanced(hypotheses, place)
            if not moved:
                healed = self.healed(hypotheses, place)
                yield from self._asking(healed)
                moved = self.rescaled(healed)
            if not moved:
                break
            hypotheses = moved

    def _asking(self, hypotheses: Sequence[Hypothesis]) -> Iterator[list[Context]]:
        self.contexts = [one.context for one in hypotheses]
        if unscored := [context for context in self.contexts if not len(context.masses)]:
            yield unscored

    def following(self, context: Context, node: int) -> Floats:
        """Masses of the node's children under the context."""
        begin, end = self.trie.first_child[node : node + 2]
        first, last = self.trie.exact[node], self.trie.high[node]
        if begin == end:
            return np.zeros(0)
        starts = self.trie.low[begin:end] - first
        return np.add.reduceat(context.masses[first:last], starts)

    def survivors(
        self, hypotheses: list[Hypothesis], place: int
    ) -> tuple[list[Hypothesis], list[Hypothesis]]:
        """Each hypothesis goes on in its token or, where the bytes are one, ends it; then prune.

        The second list has those of the pruned whose next byte is known without a model call.
        """
        candidates = []
        for context, node, weight in hypotheses:
            longer = weight * float(self.following(context, node).sum())
            candidates.append((longer, Hypothesis(context, node, weight)))
            for index in range(self.trie.low[node], self.trie.exact[node]):
                ended = weight * float(context.masses[index])
                child = context.extended([int(self.trie.order[index])], place)
                candidates.append((ended, Hypothesis(child, ROOT, ended)))
        candidates.sort(key=lambda candidate: -candidate[0])
        least = self.prune * sum(mass for mass, _ in candidates)
        kept = [one for mass, one in candidates[: self.width] if mass > 0 and mass >= least]
        dropped = [one for _, one in candidates[len(kept) :] if len(one.context.masses)]
        return kept, dropped

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
        moved = []
        for context, node, weight in hypotheses:
            begin, end = self.trie.first_child[node : node + 2]
            child = int(begin + np.searchsorted(self.trie.byte[begin:end], self.text[place]))
            if child < end and self.trie.byte[child] == self.text[place]:
                moved.append(Hypothesis(context, child, weight))
        return self.rescaled(moved)

    def rescaled(self, hypotheses: list[Hypothesis]) -> list[Hypothesis]:
        """The same, with 1 as the probability of all together; none where it is 0."""
        low, high = self.trie.low, self.trie.high
        total = sum(w * float(c.masses[low[n] : high[n]].sum()) for c, n, w in hypotheses)
        return [one._replace(weight=one.weight / total) for one in hypotheses] if total > 0 else []

    def healed(self, hypotheses: list[Hypothesis], place: int) -> list[Hypothesis]:
        """One hypothesis over all bytes up to `place`, from the longest context of the beam."""
        anchor = max(hypotheses, key=lambda one: (one.context.end, one.weight), default=None)
        if anchor is None:
            return []
        tokens: list[int] = []
        at = anchor.context.end
        while (node := self.trie.node(self.text[at : place + 1])) < 0:
            length, token = self._longest_token(at, place + 1)
            if not length:
                return []
            tokens.append(token)
            at += length
        return [Hypothesis(anchor.context.extended(tokens, at), node, 1.0)]

    def _longest_token(self, begin: int, end: int) -> tuple[int, int]:
        """(bytes, id) of the longest token that the text has at `begin`; (0, -1) for none."""
        for stop in range(end, begin, -1):
            node = self.trie.node(self.text[begin:stop])
            if node >= 0 and self.trie.exact[node] > self.trie.low[node]:
                return stop - begin, int(self.trie.order[self.trie.low[node]])
        return 0, -1


class Scorer:
    """Next-token log-probabilities of contexts, each from its whole token sequence."""

    def __init__(self, function: LogProbabilities) -> None:
        self.function = function

    def log_probabilities(self, contexts: Sequence[Context]) -> Tensor:
        """[contexts, V]."""
        return self.function([context.tokens for context in contexts])

    def keep(self, contexts: Sequence[Context]) -> None:
        """No other context than these will be extended; nothing to forget here."""


class TreeScorer(Scorer):
    """Scores a tree of contexts with one growing key-value cache."""

    def __init__(self, model: Any, size: int) -> None:
        from transformers import DynamicCache

        self.model, self.size = model, size
        self.cache = DynamicCache()  # without a config: no layer forgets what left its window
        self.config = model.config.get_text_config()
        self.length = 0

    @torch.no_grad()
    def log_probabilities(self, contexts: Sequence[Context]) -> Tensor:
        """[contexts, V]; one forward over all tokens that are not in the cache."""
        tokens: list[int] = []
        depths: list[int] = []
        seen: list[Integers] = []  # of every new token: its path in the cache, itself included
        ends = []
        for context in contexts:
            known, whole = len(context.slots), len(context.tokens)
            fresh = self.length + len(tokens) + np.arange(whole - known)
            context.slots = np.concatenate([context.slots, fresh])
            seen += [context.slots[: depth + 1] for depth in range(known, whole)]
            depths += range(known, whole)
            tokens += context.tokens[known:]
            ends.append(len(tokens) - 1)
        output = self.model(
            input_ids=self._tensor([tokens]),
            position_ids=self._tensor([depths]),
            attention_mask=self._masks(seen),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.length += len(tokens)
        scores: Tensor = output.logits[0, ends, : self.size].float().log_softmax(-1)
        return scores

    def keep(self, contexts: Sequence[Context]) -> None:
        """Drop the cache entries of all other contexts, once they are the greater part."""
        kept = np.unique(np.concatenate([np.zeros(0, int), *(one.slots for one in contexts)]))
        if self.length <= 2 * len(kept) + SPARE_SLOTS:
            return
        index = self._tensor(kept)
        for layer in self.cache.layers:
            layer.keys, layer.values = (
                states.index_select(-2, index) for states in (layer.keys, layer.values)
            )
        for context in contexts:
            context.slots = np.searchsorted(kept, context.slots)
        self.length = len(kept)

    def _masks(self, seen: list[Integers]) -> Tensor | dict[str, Tensor]:
        if not TREE_FAMILIES[self.config.model_type]:
            return self._mask(seen, getattr(self.config, "sliding_window", None))
        windows = {"full_attention": None, "sliding_attention": self.config.sliding_window}
        return {kind: self._mask(seen, windows[kind]) for kind in set(self.config.layer_types)}

    def _mask(self, seen: list[Integers], window: int | None) -> Tensor:
        """Additive mask [1, 1, new tokens, cache + new tokens]: 0 on the path, within `window`."""
        mask = np.full((len(seen), self.length + len(seen)), -np.inf, np.float32)
        for row, path in zip(mask, seen, strict=True):
            row[path[-window:] if window else path] = 0
        lowest = torch.finfo(self.model.dtype).min
        additive = torch.from_numpy(mask)[None, None].clamp(min=lowest)
        return additive.to(self.model.device, self.model.dtype)

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(values, device=self.model.device)


def plain_forward(model: Any, size: int) -> LogProbabilities:
    """Score every context by a forward over all its tokens: slow, right for any architecture."""

    @torch.no_grad()
    def score(contexts: list[tuple[int, ...]]) -> Tensor:
        rows = []
        for context in contexts:  # one by one: recurrent models do not ignore padding
            output = model(input_ids=torch.tensor([context], device=model.device), use_cache=False)
            rows.append(output.logits[0, -1, :size].float().log_softmax(-1))
        return torch.stack(rows)

    return score


def _scorer(model: Any, size: int) -> Scorer:
    config = getattr(model, "config", None)
    if config is None:
        return Scorer(model)
    text_config = config.get_text_config()
    kinds = set(getattr(text_config, "layer_types", None) or [])
    masks = text_config._attn_implementation in ("sdpa", "eager")
    known = text_config.model_type in TREE_FAMILIES
    if known and masks and kinds <= {"full_attention", "sliding_attention"}:
        return TreeScorer(model, size)
    return Scorer(plain_forward(model, size))
