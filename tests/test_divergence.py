"""`teacher_jsd`: streamed byte distributions, and the divergence between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TEXTS, bpe_tokenizer, byte_tokenizer, recurrent_model, tiny_model
from tokenizers import normalizers

from ctdbench import ops
from ctdbench.evaluate import EvaluationRequest, evaluate
from ctdbench.evaluate.divergence import ROWS, ByteModel, jensen_shannon
from ctdbench.text.token_bytes import TokenBytes

TOKENIZER = bpe_tokenizer()
MODEL = tiny_model(TOKENIZER)


def request(tasks: Sequence[str], **options: Any) -> EvaluationRequest:
    return EvaluationRequest(MODEL, TOKENIZER, tasks, heldout=TEXTS, **options)


class TestTeacherDivergence:
    def test_a_model_does_not_diverge_from_itself(self) -> None:
        evaluation = evaluate(request(["teacher_jsd"], teachers=[(MODEL, TOKENIZER)]))
        assert evaluation.scores["teacher_jsd"]["jsd"] == pytest.approx(0, abs=1e-9)

    def test_other_models_diverge_by_less_than_one_bit(self) -> None:
        tokenizer = byte_tokenizer()
        teachers = [(tiny_model(tokenizer), tokenizer), (tiny_model(tokenizer, 5), tokenizer)]
        first, second, both = (
            evaluate(request(["teacher_jsd"], teachers=chosen)).samples["teacher_jsd"]
            for chosen in (teachers[:1], teachers[1:], teachers)
        )
        for one, other, mean in zip(first, second, both, strict=True):
            assert 0.01 < one["jsd"] < 1
            assert mean["jsd"] == pytest.approx((one["jsd"] + other["jsd"]) / 2)
            assert one["weight"] == mean["weight"] > 70

    @pytest.mark.parametrize("kind", ["attention", "Mamba", "FalconH1"])
    def test_streaming_changes_nothing(self, kind: str) -> None:
        model = MODEL if kind == "attention" else recurrent_model(kind, TOKENIZER)
        side = ByteModel(model, TOKENIZER)
        text = TEXTS[0] * 3
        encoding = side.tokens.encode(text)
        token = torch.from_numpy(encoding.ids)
        assert len(token) > 2 * ROWS
        with torch.no_grad():
            inputs = torch.cat([torch.tensor([0]), token[:-1]])[None]
            logits = model(inputs).logits[0, :, : len(side.tokens.vocabulary)]
        whole = ops.byte_distributions(
            side.trie,
            logits.softmax(-1),
            token,
            torch.from_numpy(encoding.byte_end - encoding.byte_start),
            torch.zeros_like(token),
            estimator="mixed",
        )
        streamed = side.distributions(text)
        assert streamed.shape == (len(text.encode()), 257)
        assert torch.allclose(streamed, whole, atol=1e-5)

    def test_byte_model_gives_its_own_distribution(self) -> None:
        tokenizer = byte_tokenizer()
        model = tiny_model(tokenizer, vocab_size=258)
        text = "A fox, é!"
        ids = [tokenizer.bos_token_id, *TokenBytes(tokenizer).encode(text).ids.tolist()]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        order = [TokenBytes(tokenizer).vocabulary.index(bytes([byte])) for byte in range(256)]
        expected = logits[:, order].softmax(-1)
        measured = ByteModel(model, tokenizer).distributions(text)[:, :256]
        measured = measured / measured.sum(-1, keepdim=True)
        assert torch.allclose(measured, expected, atol=1e-5)

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.floats(0.01, 1), min_size=6, max_size=6))
    def test_divergence_is_its_formula(self, weights: list[float]) -> None:
        p, q = (torch.tensor(w) / sum(w) for w in (weights[:3], weights[3:]))
        m = (p + q) / 2
        expected = ((p * (p / m).log2()).sum() + (q * (q / m).log2()).sum()) / 2
        assert float(jensen_shannon(p[None], q[None])) == pytest.approx(float(expected), abs=1e-6)

    def test_what_a_reader_cannot_spell_is_left_out(self) -> None:
        lower = bpe_tokenizer()
        lower.backend_tokenizer.normalizer = normalizers.Lowercase()
        texts = ["all of it is lower case", "Not all of it", "lower again"]
        given = {"heldout": texts, "teachers": [(MODEL, TOKENIZER)]}
        plain = evaluate(EvaluationRequest(MODEL, TOKENIZER, ["teacher_jsd"], **given))
        chosen = evaluate(
            EvaluationRequest(MODEL, TOKENIZER, ["teacher_jsd"], readers=[(MODEL, lower)], **given)
        )
        rows = plain.samples["teacher_jsd"]
        assert chosen.samples["teacher_jsd"] == [rows[0], rows[2]]
        assert chosen.settings["tasks"]["teacher_jsd"]["skipped_documents"] == 1

    def test_divergence_is_one_bit_at_most(self) -> None:
        one_hot = torch.eye(3, dtype=torch.float64)
        assert jensen_shannon(one_hot, one_hot.roll(1, 0)).tolist() == pytest.approx([1, 1, 1])
