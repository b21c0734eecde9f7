"""The beam estimator: brute-force enumeration, tree attention against plain forwards, healing."""

from __future__ import annotations

import itertools
from functools import reduce
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ctdbench.distill import byte_beam, tree_scorer
from ctdbench.distill.byte_beam import beam_distributions
from ctdbench.distill.tree_scorer import Context, TreeScorer, plain_forward
from ctdbench.text.vocabulary import ByteTrie

BOS = 0
# bytes a, b, c; two tokens with equal bytes; a special (BOS) and an end
VOCABULARY = [b"", b"a", b"b", b"c", b"ab", b"abc", b"bc", b"ca", b"a", b"cab", b""]


def random_model(seed: int = 0, size: int = len(VOCABULARY)) -> Any:
    """Log-probabilities that depend on the whole sequence, the same at every call."""

    def score(contexts: list[tuple[int, ...]]) -> Tensor:
        rows = []
        for context in contexts:
            generator = torch.Generator().manual_seed(hash((seed, *context)) % 2**31)
            rows.append(2 * torch.randn(size, generator=generator))
        return torch.stack(rows).log_softmax(-1)

    return score


def covering_mass(model: Any, text: bytes) -> float:
    """Total probability of the token sequences that cover `text`, by plain recursion."""

    def mass(context: tuple[int, ...], rest: bytes) -> float:
        if not rest:
            return 1.0
        scores = model([context])[0].double().exp().tolist()
        total = 0.0
        for token, piece in enumerate(VOCABULARY):
            if piece.startswith(rest):
                total += scores[token]
            elif piece and rest.startswith(piece):
                total += scores[token] * mass((*context, token), rest[len(piece) :])
        return total

    return mass((BOS,), text)


@pytest.mark.parametrize("text", [b"abcab", b"cabca", b"aaaa", b"bcbab"])
@pytest.mark.parametrize("seed", [0, 1])
def test_beam_without_pruning_is_brute_force_enumeration(text: bytes, seed: int) -> None:
    model = random_model(seed)
    (rows,) = beam_distributions(model, ByteTrie(VOCABULARY), [text], [BOS], width=10**6, prune=0.0)
    for place, row in enumerate(rows):
        whole = covering_mass(model, text[:place])
        for byte in b"abc":
            expected = covering_mass(model, text[:place] + bytes([byte])) / whole
            assert float(row[byte]) == pytest.approx(expected, rel=1e-5)
        assert float(row[256]) == pytest.approx(1 - float(row[:256].sum()), abs=1e-6)
        assert float(row.sum()) == pytest.approx(1, rel=1e-6)


def test_light_pruning_is_close_to_exact() -> None:
    trie, model, text = ByteTrie(VOCABULARY), random_model(3), b"abcabcabca"
    (exact,) = beam_distributions(model, trie, [text], [BOS], width=10**6, prune=0.0)
    (pruned,) = beam_distributions(model, trie, [text], [BOS], width=10**6, prune=0.01)
    distance = (exact - pruned).abs().sum(1)
    assert 0 < distance.max() < 0.2
    assert distance.mean() < 0.05


def test_only_survivors_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_beam, "AHEAD", 0)
    model, calls = random_model(5), []

    def counting(contexts: list[tuple[int, ...]]) -> Tensor:
        calls.extend(contexts)
        return model(contexts)  # type: ignore[no-any-return]

    trie, text = ByteTrie(VOCABULARY), b"abcabcabcabc"
    beam_distributions(counting, trie, [text], [BOS], width=1, prune=0.0)
    assert len(calls) <= 1 + len(text)
    assert len(set(calls)) == len(calls)


def test_an_emptied_beam_heals() -> None:
    """The model is sure of `ca` after `ab`; the text goes on with `cb`: the survivor dies."""
    vocabulary = [b"", b"a", b"b", b"c", b"ab", b"ca"]

    def sure(contexts: list[tuple[int, ...]]) -> Tensor:
        scores = torch.full((len(contexts), len(vocabulary)), -30.0)
        for row, context in zip(scores, contexts, strict=True):
            row[{0: 4, 4: 5}.get(context[-1], 2)] = 0
        return scores.log_softmax(-1)

    (rows,) = beam_distributions(sure, ByteTrie(vocabulary), [b"abcb"], [BOS])
    # each byte was expected but the last; the next row comes from the healed context (.., c)
    torch.testing.assert_close(rows.sum(1), torch.ones(4))
    assert rows[2, ord("c")] > 0.99
    assert rows[3, ord("a")] > 0.99
    (longer,) = beam_distributions(sure, ByteTrie(vocabulary), [b"abcbb"], [BOS])
    torch.testing.assert_close(longer[:4], rows)
    assert longer[4, ord("b")] > 0.99


def test_documents_share_the_calls_and_nothing_else() -> None:
    model, calls = random_model(5), []

    def counting(contexts: list[tuple[int, ...]]) -> Tensor:
        calls.append(len(contexts))
        return model(contexts)  # type: ignore[no-any-return]

    trie, texts = ByteTrie(VOCABULARY), [b"abcabcabcabc", b"cab", b"", b"cabcabca", b"a!b"]
    alone, most = [], 0
    for text in texts:
        calls.clear()
        alone += beam_distributions(counting, trie, [text], [BOS], width=3)
        most = max(most, len(calls))
    calls.clear()
    together = beam_distributions(counting, trie, texts, [BOS], width=3)
    assert len(calls) == most  # as many as the longest document takes by itself
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_byte_that_no_token_holds_leaves_zero_rows() -> None:
    (rows,) = beam_distributions(random_model(), ByteTrie(VOCABULARY), [b"ab!ab"], [BOS])
    assert (rows[:3].sum(1) - 1).abs().max() < 1e-6
    assert not rows[3:].any()


def test_nothing_before_the_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="BOS"):
        beam_distributions(random_model(), ByteTrie(VOCABULARY), [b"ab"], [])


SIZES: dict[str, Any] = {
    "vocab_size": 16,  # wider than the vocabulary
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
}


def tiny(family: str) -> Any:
    torch.manual_seed(0)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    if family == "mistral":
        return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)).eval()
    if family == "qwen2":
        windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
        return Qwen2ForCausalLM(Qwen2Config(**SIZES, **windows)).eval()
    kinds = ["sliding_attention", "full_attention"] * 2
    layers: dict[str, Any] = {"sliding_window": 4, "layer_types": kinds, "head_dim": 8}
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **layers)).eval()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma3"])
def test_tree_attention_equals_plain_forwards(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, trie = tiny(family), ByteTrie(VOCABULARY)
    texts = [b"abcabcaabbcabcab" * 2, b"cab" * 7]
    assert isinstance(tree_scorer.scorer_of(model, trie.size), TreeScorer)
    monkeypatch.setattr(tree_scorer, "SPARE_SLOTS", 4)  # so that the cache is compacted
    tree = torch.cat(beam_distributions(model, trie, texts, [BOS, 5]))
    plain = torch.cat(beam_distributions(plain_forward(model, trie.size), trie, texts, [BOS, 5]))
    torch.testing.assert_close(tree, plain, rtol=1e-4, atol=1e-5)
    uniform = torch.full((1,), 1 / 4)
    assert (plain[:, list(b"abc")] - uniform).abs().max() > 0.1  # the model is not flat


def test_a_tree_of_contexts_is_scored_in_one_forward_and_survives_compaction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny("gemma3")
    scorer, plain = TreeScorer(model, 11), plain_forward(model, 11)
    monkeypatch.setattr(tree_scorer, "SPARE_SLOTS", 0)
    root = Context((BOS, 1, 2))
    scorer.log_probabilities([root])
    children = [root.child(token, 1) for token in range(1, 9)]
    scorer.log_probabilities(children)
    scorer.keep(children[6:])
    assert scorer.length == 5
    grandchildren = [
        reduce(lambda context, token: context.child(token, 4), tokens, child)
        for child, tokens in itertools.product(children[6:], [[1], [2, 3, 4], [4, 5]])
    ]
    expected = plain([context.tokens for context in grandchildren])
    torch.testing.assert_close(
        scorer.log_probabilities(grandchildren), expected, rtol=1e-4, atol=1e-5
    )


def test_what_is_asked_for_ahead_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the text's own tokens, which this beam leaves, nor a compacted cache."""
    model, trie = tiny("llama"), ByteTrie(VOCABULARY)
    monkeypatch.setattr(tree_scorer, "SPARE_SLOTS", 0)
    texts, calls = [b"abcabcaabbcabcab" * 12, b"cab" * 50], list[int]()
    own = TreeScorer.log_probabilities

    def counted(self: Any, contexts: Any) -> Tensor:
        calls.append(len(contexts))
        return own(self, contexts)

    monkeypatch.setattr(TreeScorer, "log_probabilities", counted)
    model.config.max_position_embeddings = 512

    def bytes_alone(text: bytes) -> list[int]:
        return [VOCABULARY.index(text[i : i + 1]) for i in range(len(text))]

    ahead = torch.cat(beam_distributions(model, trie, texts, [BOS], encode=bytes_alone))
    few = len(calls)
    monkeypatch.setattr(byte_beam, "AHEAD", 0)
    plain = torch.cat(beam_distributions(model, trie, texts, [BOS]))
    torch.testing.assert_close(ahead, plain, rtol=1e-4, atol=1e-5)
    assert 2 * few < len(calls) - few


def test_an_unknown_architecture_is_scored_without_a_tree() -> None:
    model = tiny("llama")
    model.config.model_type = "something-else"
    assert not isinstance(tree_scorer.scorer_of(model, 11), TreeScorer)
