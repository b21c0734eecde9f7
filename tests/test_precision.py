"""Weights are cast once for many forward passes, whatever reads with them, and to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from counted_allocations import Casts
from tiny_models import TEXTS, bpe_tokenizer, tiny_model

from ctdbench.distill.precision import autocast, casts_kept
from ctdbench.evaluate import EvaluationRequest, evaluate
from ctdbench.evaluate.divergence import ROWS, ByteModel

CPU = torch.device("cpu")
TOKENIZER = bpe_tokenizer()


def passes(model: Any) -> list[torch.Tensor]:
    found = []
    for ids in ([[3, 4, 5]], [[6, 7]], [[8]]):
        with autocast(CPU, "bfloat16"):
            found.append(model(torch.tensor(ids)).logits)
    return found


@pytest.mark.parametrize("frozen", [False, True])
def test_once_for_all_passes_and_to_the_same_bits(frozen: bool) -> None:
    model = tiny_model(TOKENIZER).requires_grad_(not frozen)
    with torch.no_grad(), Casts(model) as casts:
        apart = passes(model)
    assert set(casts.found.values()) == {3}
    with casts_kept(model, "bfloat16"), Casts(model) as casts:
        together = passes(model)
    assert set(casts.found.values()) == {1}
    assert all(map(torch.equal, apart, together))
    assert all(p.requires_grad is not frozen for p in model.parameters())


def test_nothing_is_kept_for_those_who_come_after() -> None:
    model = tiny_model(TOKENIZER)
    with casts_kept(model, "bfloat16"):
        passes(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    with autocast(CPU, "bfloat16"):
        loss = model(torch.tensor([[3, 4]])).logits.float().square().mean()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def items(model: Any) -> None:
    evaluate(
        EvaluationRequest(
            model, TOKENIZER, ["everyday_physics"], limit=4, batch_size=2, precision="bfloat16"
        )
    )


def documents(model: Any) -> None:
    side = ByteModel(model, TOKENIZER, "bfloat16")
    assert len(side.tokens.encode(TEXTS[0] * 3).ids) > 2 * ROWS
    side.distributions(TEXTS[0] * 3)


@pytest.mark.parametrize("reads", [items, documents])
def test_what_evaluates_casts_every_weight_once(reads: Callable[[Any], None]) -> None:
    model = tiny_model(TOKENIZER).requires_grad_(False)
    with Casts(model) as casts:
        reads(model)
    assert set(casts.found.values()) == {1}
