"""Averaged models, checked against their members by hand: scores, key-value caches, generation."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from lm_eval.api.instance import Instance
from tiny_models import TEXTS, bpe_tokenizer, byte_tokenizer, tiny_model

from ctdbench.errors import UserError
from ctdbench.evaluate import EvaluationRequest, evaluate
from ctdbench.evaluate.ensemble import Average, Ensemble, require_one_vocabulary
from ctdbench.evaluate.language_model import PinnedLM, undisturbed

AVERAGES: tuple[Average, ...] = get_args(Average)
TOKENIZER = bpe_tokenizer()
SIZE = len(TOKENIZER)
FIRST = tiny_model(TOKENIZER, seed=1).eval()  # has columns beyond the vocabulary
OTHER = tiny_model(
    TOKENIZER, seed=2, hidden_size=48, num_hidden_layers=3, vocab_size=SIZE,
    max_position_embeddings=512,
).eval()  # fmt: skip
IDS = torch.tensor([TOKENIZER.encode(TEXTS[1])[:24]])


def by_hand(ids: torch.Tensor, average: Average) -> torch.Tensor:
    """Log-probabilities of the mean, in float64: [B, L, V]."""
    with torch.no_grad():
        logits = [model(ids).logits[..., :SIZE].double() for model in (FIRST, OTHER)]
    if average == "probabilities":
        return torch.stack([one.softmax(-1) for one in logits]).mean(0).log()
    return torch.stack([one.log_softmax(-1) for one in logits]).mean(0).log_softmax(-1)


def ensemble(average: Average = "probabilities") -> Ensemble:
    return Ensemble([FIRST, OTHER], SIZE, average)


@pytest.mark.parametrize("average", AVERAGES)
def test_logits_are_the_log_probabilities_of_the_mean(average: Average) -> None:
    with torch.no_grad():
        found = ensemble(average)(IDS).logits
        last = ensemble(average)(IDS, logits_to_keep=2).logits
    torch.testing.assert_close(found.double(), by_hand(IDS, average), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, found[:, -2:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(IDS.shape))


@pytest.mark.parametrize("average", AVERAGES)
def test_every_member_goes_on_from_its_own_cache(average: Average) -> None:
    model, expected = ensemble(average), by_hand(IDS, average)
    with torch.no_grad():
        cache = model(IDS[:, :10], use_cache=True).past_key_values
        assert len(cache.layers) == 2 + 3
        assert cache.get_seq_length() == 10
        cache.batch_repeat_interleave(3)
        found = model(IDS[:, 10:].repeat(3, 1), past_key_values=cache).logits
    for row in found:
        torch.testing.assert_close(row.double(), expected[0, 10:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("average", AVERAGES)
def test_greedy_generation_follows_the_mean(average: Average) -> None:
    model = PinnedLM(ensemble(average), TOKENIZER, batch_size=2)
    contexts = ["The quick brown fox", "42 + 17"]  # of unlike length, so one is padded
    options = {"until": [], "max_gen_toks": 6, "do_sample": False}
    requests = [Instance("generate_until", {}, (text, options), 0) for text in contexts]
    with undisturbed(model.model, TOKENIZER):
        found = model.generate_until(requests, disable_tqdm=True)
    for context, text in zip(contexts, found, strict=True):
        ids = [0, *TOKENIZER.encode(context, add_special_tokens=False)]
        start = len(ids)
        budget = model._with_budget(requests[0], model._budget_scale(contexts)).args[1]
        while len(ids) - start < budget["max_gen_toks"] and ids[-1] != TOKENIZER.eos_token_id:
            ids.append(int(by_hand(torch.tensor([ids]), average)[0, -1].argmax()))
        assert text == TOKENIZER.decode(ids[start:], skip_special_tokens=True)


def scores(model: Any, **settings: Any) -> Any:
    tasks = ("bpb_heldout", "teacher_jsd", "everyday_physics")
    teachers = [(FIRST, TOKENIZER)]
    request = EvaluationRequest(
        model, TOKENIZER, tasks, teachers, limit=2, heldout=TEXTS, **settings
    )
    return evaluate(request).scores


def test_a_model_averaged_with_itself_is_itself() -> None:
    alone, twice = scores(FIRST), scores(Ensemble([FIRST, FIRST], SIZE))
    for task, metrics in alone.items():
        assert twice[task] == pytest.approx(metrics, abs=1e-5)
    assert twice["teacher_jsd"]["jsd"] == pytest.approx(0, abs=1e-6)


def test_an_average_of_two_lies_between_them() -> None:
    """The mean of probabilities is never worse than the mean of the members' bits (Jensen)."""
    mean = (scores(FIRST)["bpb_heldout"]["bpb"] + scores(OTHER)["bpb_heldout"]["bpb"]) / 2
    assert scores(ensemble())["bpb_heldout"]["bpb"] < mean


def test_the_shortest_context_of_the_members_is_the_context() -> None:
    assert PinnedLM(ensemble(), TOKENIZER, batch_size=1).max_length == 512


def test_members_must_share_vocabulary_and_bos() -> None:
    require_one_vocabulary([TOKENIZER, bpe_tokenizer()], ["a", "b"])
    with pytest.raises(UserError, match="a and c differ in their vocabularies"):
        require_one_vocabulary([TOKENIZER, bpe_tokenizer(), byte_tokenizer()], ["a", "b", "c"])
    with pytest.raises(UserError, match="a and b begin texts with other tokens"):
        require_one_vocabulary([TOKENIZER, bpe_tokenizer(bos=False)], ["a", "b"])
