"""Drawn tokens: reproducible whatever the batch, and a model that is left as it was found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import bpe_tokenizer, tiny_model
from writing_sides import (
    GREEDY,
    PROMPTS,
    QUESTIONS,
    SHORT,
    author,
    said,
    scripted,
    side,
    tokens,
)

from ctdbench.distill.decoding import draw, uniforms
from ctdbench.distill.models import Side
from ctdbench.distill.precision import autocast
from ctdbench.distill.rollouts import Decoding, continued
from ctdbench.errors import UserError


def test_a_draw_follows_the_distribution() -> None:
    scores = torch.tensor([[0.3, -torch.inf, 2.0, 1.0, -1.0]]).expand(20_000, -1)
    uniform = (torch.arange(20_000, dtype=torch.float64)[:, None] + 0.5) / 20_000
    for temperature, top_k in ((1.0, 0), (0.5, 0), (1.0, 2), (2.0, 9)):
        drawn = draw(scores, uniform, Decoding(temperature=temperature, top_k=top_k))
        kept = scores[0] if top_k != 2 else scores[0].masked_fill(scores[0] < 1, -torch.inf)
        expected = (kept.double() / temperature).softmax(-1)
        found = torch.bincount(drawn[:, 0], minlength=5) / 20_000
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)
    assert (draw(scores, uniform, Decoding(temperature=0.0)) == 2).all()


def test_the_ends_of_the_unit_interval_have_a_token_with_probability() -> None:
    scores = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, -1)
    uniform = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    assert draw(scores, uniform, Decoding()).tolist() == [[1], [2]]


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_k": -1}, {"max_new_tokens": 0}, {"batch_size": 0}]
)
def test_a_decoding_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Decoding(**wrong)
    with pytest.raises(UserError, match="nan"):
        Decoding(temperature=float("nan"))


@torch.no_grad()
def uncached(own: Side, opening: list[int], numbers: np.ndarray, decoding: Decoding) -> list[int]:
    """Token by token, everything read anew each time, one document, no padding."""
    columns = len(own.tokens.vocabulary)
    ids = list(opening)
    for number in numbers:
        scores = own.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, :columns]
        if decoding.temperature == 0:
            ids.append(int(scores.argmax()))
        else:
            passed = np.cumsum((scores.double() / decoding.temperature).softmax(-1).numpy())
            ids.append(int((passed <= number * passed[-1]).sum()))
        if ids[-1] in (own.specials.eos, own.specials.bos):
            break
    return ids[len(opening) :]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batch_and_cache_give_what_one_document_without_cache_gives(temperature: float) -> None:
    own, decoding = side(), Decoding(temperature=temperature, max_new_tokens=24)
    writer = author(own, decoding)
    found = tokens(own, PROMPTS, writer)
    for asked, ids in zip(PROMPTS, found, strict=True):
        numbers = uniforms(decoding, "s", asked.text).numpy()
        assert ids == uncached(own, writer._opening(asked), numbers, decoding)
        assert tokens(own, [asked], writer) == [ids]
    assert max(map(len, found)) > 8


def test_neither_batch_size_nor_order_changes_a_text() -> None:
    expected = continued(side(), PROMPTS, SHORT, template="plain", stream="s")
    kept = [(asked, found) for asked, found in zip(PROMPTS, expected, strict=True) if found]
    assert len(kept) >= 4  # a random model may write bytes that are no text
    assert all(found.segments[:-1] == asked.segments for asked, found in kept)
    for size in (1, 2, 64):
        decoding = replace(SHORT, batch_size=size)
        assert continued(side(), PROMPTS, decoding, template="plain", stream="s") == expected
    backwards = continued(side(), PROMPTS[::-1], SHORT, template="plain", stream="s")
    assert backwards[::-1] == expected


def test_seed_stream_and_prompt_decide_what_is_drawn() -> None:
    own = side()
    state = torch.get_rng_state()
    first = tokens(own, PROMPTS, author(own))
    assert tokens(own, PROMPTS, author(own)) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert tokens(own, PROMPTS, author(own, replace(SHORT, seed=1))) != first
    assert tokens(own, PROMPTS, author(own, stream="t")) != first
    assert len({tuple(uniforms(SHORT, "s", text).tolist()) for text in QUESTIONS}) == 5


def test_only_tokens_that_exist_are_drawn() -> None:
    """The model has logits past the vocabulary, here the largest ones."""
    own = side()
    model = scripted(own, len(own.tokens.vocabulary) + 2)
    for ids in tokens(model, PROMPTS, author(model, GREEDY)):
        assert max(ids) < len(own.tokens.vocabulary)


def lora_side() -> Side:
    torch.manual_seed(1)
    wrapped: Any = get_peft_model(
        tiny_model(bpe_tokenizer(), attention_dropout=0.5),
        LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False),
    )
    return replace(Side.of(wrapped, bpe_tokenizer()), model=wrapped)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_model_is_left_as_it_was(precision: str) -> None:
    own = lora_side()
    inner = own.model.get_base_model()
    own.model.train()
    inner.model.layers[0].eval()
    inner.generation_config.repetition_penalty = 9.0
    before = state_of(inner)
    assert any(continued(own, PROMPTS, SHORT, template="plain", stream="s", precision=precision))
    assert state_of(inner) == before
    assert all(parameter.grad is None for parameter in inner.parameters())
    with autocast(torch.device("cpu"), precision):
        continued(own, PROMPTS[:1], SHORT, template="plain", stream="s", precision=precision)
        loss = own.model(input_ids=torch.tensor([[3, 4, 5]])).logits.float().square().mean()
    loss.backward()
    trained = [p.grad for p in inner.parameters() if p.requires_grad]
    assert trained
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in trained)


def state_of(model: Any) -> Any:
    modes = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    return modes, wanted, id(model.generation_config), model.config.use_cache


def test_a_model_that_fails_is_left_as_it_was() -> None:
    own = scripted(side())  # no script: an IndexError
    own.model.train()
    before = state_of(own.model)
    with pytest.raises(IndexError):
        said(own)
    assert state_of(own.model) == before
    assert torch.is_grad_enabled()


def test_adapters_write_without_dropout_and_without_the_models_own_settings() -> None:
    own = lora_side()
    own.model.train()
    own.model.get_base_model().generation_config.update(repetition_penalty=9.0, min_new_tokens=9)
    writer = author(own, GREEDY)
    found = tokens(own, PROMPTS, writer)
    own.model.eval()
    for asked, ids in zip(PROMPTS, found, strict=True):
        assert ids == uncached(own, writer._opening(asked), np.zeros(8), GREEDY)
    with own.model.disable_adapter():
        assert tokens(own, PROMPTS, writer) != found
