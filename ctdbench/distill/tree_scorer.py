"""Next-token probabilities of a forest of contexts, over one key-value cache.

The contexts of a document form a tree, those of several documents a forest. `TreeScorer` keeps one
key-value cache that only grows, a place for each tree node, and scores all new nodes of a step in
one forward, under a mask in which a node sees its ancestors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctdbench.errors import RunError
from ctdbench.text.vocabulary import ByteTrie

AT_A_TIME = 16  # contexts whose probabilities exist in float64
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

    slots: cache places of the first tokens, as far as they were computed. sums [n + 1]: cumulative
    probabilities of the next tokens in byte order; specials: that of all others. Both are set by
    scoring. children: contexts with one token more, by that token.
    """

    tokens: tuple[int, ...]
    end: int = 0
    slots: Integers = field(default_factory=lambda: np.zeros(0, np.int64))
    sums: Floats = field(default_factory=lambda: np.zeros(0))
    specials: float = 0.0
    children: dict[int, Context] = field(default_factory=dict)

    @property
    def is_scored(self) -> bool:
        """Whether the model was called for it."""
        return len(self.sums) > 0

    def child(self, token: int, end: int) -> Context:
        """The context with one token more, up to byte `end`; the same one at every call."""
        if token not in self.children:
            self.children[token] = Context((*self.tokens, token), end, self.slots)
        return self.children[token]

    def mass(self, low: int, high: int) -> float:
        """Probability of the next tokens from `low` to `high` in byte order."""
        return float(self.sums[high] - self.sums[low])

    def family(self) -> Iterator[Context]:
        """It and all that descends from it."""
        yield self
        for child in self.children.values():
            yield from child.family()


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
        placed: dict[tuple[int, ...], int] = {}  # new nodes of the forest
        ends = []
        for context in contexts:
            for depth in range(len(context.slots), len(context.tokens)):
                node = context.tokens[: depth + 1]
                place = placed.setdefault(node, self.length + len(tokens))
                context.slots = np.append(context.slots, place)
                if place == self.length + len(tokens):
                    tokens.append(node[-1])
                    depths.append(depth)
                    seen.append(context.slots)
            ends.append(int(context.slots[-1]) - self.length)
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


def scorer_of(model: Any, size: int) -> Scorer:
    """The fastest that is right for the model, or for a function in its place."""
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


def score(scorer: Scorer, trie: ByteTrie, contexts: Sequence[Context]) -> None:
    """Call the model for contexts that it has not seen; raises RunError if it has no number."""
    scores = scorer.log_probabilities(contexts)
    order = torch.from_numpy(trie.order).to(scores.device)
    for start in range(0, len(contexts), AT_A_TIME):
        part = slice(start, start + AT_A_TIME)
        masses = scores[part, order].double().exp().cpu().numpy()
        if not np.isfinite(masses).all():
            raise RunError("the teacher's logits are not finite", "try it in float32")
        for context, row in zip(contexts[part], masses, strict=True):
            context.sums = np.concatenate([[0.0], np.cumsum(row)])
            context.specials = max(0.0, 1.0 - float(context.sums[-1]))
