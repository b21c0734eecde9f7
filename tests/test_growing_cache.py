"""The cache that grows in place gives the numbers of transformers' own, and copies nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import bpe_tokenizer, tiny_model
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MambaConfig,
    MambaForCausalLM,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

from ctdbench.distill import growing_cache as growing
from ctdbench.distill.growing_cache import GrowingLayer

TOKENIZER = bpe_tokenizer()
MODEL = tiny_model(TOKENIZER).eval()
IDS = torch.arange(2, 62).reshape(3, 20)


def growing_cache(model: Any) -> DynamicCache:
    return growing.growing_cache(model)["past_key_values"]


def logits(model: Any, cache: Any, parts: list[Tensor], bfloat16: bool) -> Tensor:
    """[B, L, V] of ids read part by part."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        read = [model(ids, past_key_values=cache, use_cache=True).logits for ids in parts]
    return torch.cat(read, 1)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_same_numbers_bit_for_bit(bfloat16: bool) -> None:
    parts = list(IDS.split([7, 1, 1, 1, 5, 1, 4], 1))
    ours = logits(MODEL, growing_cache(MODEL), parts, bfloat16)
    assert torch.equal(ours, logits(MODEL, DynamicCache(config=MODEL.config), parts, bfloat16))


def test_a_new_token_copies_nothing_while_there_is_room() -> None:
    cache = growing_cache(MODEL)
    logits(MODEL, cache, [IDS[:, :7]], False)
    places = []
    for token in IDS[:, 7:].split(1, 1):
        logits(MODEL, cache, [token], False)
        places.append([part.data_ptr() for one in cache.layers for part in (one.keys, one.values)])
    assert all(place == places[0] for place in places)
    assert cache.get_seq_length() == 20


def test_rooms_are_made_seldom() -> None:
    layer, rooms = GrowingLayer(), set()
    for _ in range(3000):
        states = torch.randn(1, 1, 1, 2)
        rooms.add(layer.update(states, states)[0].data_ptr())
    assert len(rooms) < 30


@pytest.mark.parametrize("change", ["reorder", "repeat", "select", "crop"])
def test_it_can_be_reordered_repeated_and_cut(change: str) -> None:
    found = []
    for cache in (growing_cache(MODEL), DynamicCache(config=MODEL.config)):
        logits(MODEL, cache, [IDS[:, :10]], False)
        rows = torch.tensor([2, 0, 1])
        if change == "reorder":
            cache.reorder_cache(rows)
        elif change == "repeat":
            cache.batch_repeat_interleave(2)
            rows = torch.tensor([0, 0, 1, 1, 2, 2])
        elif change == "select":
            cache.batch_select_indices(rows)
        else:
            cache.crop(-3)
            rows = torch.arange(3)
        parts = [IDS[rows, 10:11], IDS[rows, 11:15]]
        found.append(logits(MODEL, cache, parts, False))
    assert torch.equal(*found)


def test_what_is_no_floating_point_is_kept_as_it_is() -> None:
    layer, ids = GrowingLayer(), torch.tensor([[[[40_001]]]])
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.update(ids, ids)[0].tolist() == ids.tolist()


def test_layers_with_a_window_stay_as_they_are() -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=70, hidden_size=16, intermediate_size=32, num_hidden_layers=4, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=4, sliding_window_pattern=2,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    cache = growing_cache(model)
    kinds = {type(layer) for layer in cache.layers}
    assert kinds == {GrowingLayer, DynamicSlidingWindowLayer}
    parts = list(IDS.split([9, 1, 1, 9], 1))
    own = DynamicCache(config=model.config)
    assert torch.equal(logits(model, cache, parts, True), logits(model, own, parts, True))


def test_a_model_with_another_kind_of_cache_gets_none() -> None:
    config = MambaConfig(vocab_size=70, hidden_size=16, num_hidden_layers=1, state_size=4)
    assert growing.growing_cache(MambaForCausalLM(config)) == {}
