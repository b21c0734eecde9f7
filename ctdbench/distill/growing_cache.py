"""A key-value cache for generating text that writes into spare room in place of copying.

transformers' own cache copies all keys and values at every token, and under autocast holds rotated
keys in float32, which attention then casts to bfloat16 at every token, all of them. Here they are
held as attention reads them, so the numbers are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ATTENTION = {DynamicLayer, DynamicSlidingWindowLayer}
SPARE = 4  # room for a quarter more tokens than are there


def growing_cache(model: Any) -> dict[str, DynamicCache]:
    """An empty cache, as an argument of `generate`; none for a model that needs its own kind.

    Layers that keep a window of tokens only stay transformers' own.
    """
    if not is_attention(model):
        return {}
    cache = _dynamic_cache(model)
    cache.layers = [GrowingLayer() if type(one) is DynamicLayer else one for one in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    return {"past_key_values": cache}


def is_attention(model: Any) -> bool:
    """Whether what a model has read is keys and values alone, and no state of recurrent layers.

    Their caches cannot be repeated for several rows, or go by another name.
    """
    if not model._supports_default_dynamic_cache():
        return False
    return {type(layer) for layer in _dynamic_cache(model).layers} <= ATTENTION


def _dynamic_cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, [B, heads, tokens, d] each: views of buffers with spare room."""

    keys: Tensor
    values: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the new tokens' keys and values; all there are."""
        kept = (self.keys, self.values) if self.get_seq_length() else (None, None)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = _appended(kept[0], key_states)
        self.values = _appended(kept[1], value_states)
        return self.keys, self.values


def _appended(kept: Tensor | None, new: Tensor) -> Tensor:
    """`kept` and `new` along the tokens, in kept's own buffer where that has room."""
    if new.is_floating_point() and torch.is_autocast_enabled(new.device.type):
        new = new.to(torch.get_autocast_dtype(new.device.type))
    length = 0 if kept is None else kept.shape[-2]
    end = length + new.shape[-2]
    room = None if kept is None else kept._base
    if room is None or room.shape[-2] < end or room.shape[:2] != new.shape[:2]:
        room = new.new_empty(*new.shape[:2], end + max(64, end // SPARE), new.shape[-1])
        if kept is not None:
            room[:, :, :length] = kept
    room[:, :, length:end] = new
    return room[:, :, :end]
