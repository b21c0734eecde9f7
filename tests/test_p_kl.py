"""`p-kl` against the authors' numbers and its formula, its top tokens, its projection, numerals."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from ctdbench_methods.p_kl import PKL, PKLOptions
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_rows import Case, case_of, cases, check_graph, check_invariants, picked, terms
from torch import Tensor
from wheel_tokenizers import wheel_file, wheel_token_bytes
from xtoken_rows import INDICES, WEIGHTS, check_golden, golden_cases, identity, with_matrix

from ctdbench.method import PairInfo, PairTables, Rows, probe, probe_gradient
from ctdbench.text.projection import build_projection, encoder

CONFIGURATIONS: list[dict[str, Any]] = [
    {},
    {"vocab_topk": 3, "temperature": 2.0},
    {"merge": "chain", "vocab_topk": 5},
    {"reverse_kl": True, "topk_scope": "microbatch"},
]


@pytest.mark.parametrize("case", golden_cases("p_kl"))
@pytest.mark.parametrize("projection", ["fixed", "learned"])
def test_p_kl_reproduces_the_authors_numbers(case: dict[str, Any], projection: str) -> None:
    """A learned projection starts at the given one."""
    options = {"vocab_topk": case["options"]["vocab_topk"], "projection": projection}
    check_golden(
        "p-kl", case, options, {"kl": "kd"} if case["options"]["temperature"] == 1 else {"kl": ""}
    )


def p_kl(options: dict[str, Any]) -> PKL:
    return PKL(PKLOptions(**options))


def slow_p_kl(case: Case, logits: Tensor, matrix: Tensor, chosen: PKLOptions) -> Tensor:
    """The loss without CE, chunk by chunk; matrix [V_S, V_T]."""
    teacher, losses = case.teacher.scores().double(), []
    top = sorted(range(teacher.shape[1]), key=lambda v: -teacher[:, v].max())[: chosen.vocab_topk]
    for own_rows, taught_rows in (chunk for chunks in case.chunks for chunk in chunks):
        if chosen.merge == "chain":
            own_rows, taught_rows = own_rows[-1:], taught_rows[-1:]
        p = [(logits[r] / chosen.temperature).softmax(-1) @ matrix[:, top] for r in own_rows]
        q = [(teacher[r, top] / chosen.temperature).log_softmax(-1) for r in taught_rows]
        mass, log_q = torch.stack(p).mean(0), torch.stack(q).mean(0)
        log_p = (mass / (mass.sum() + 1e-10) + 1e-10).log()
        first, second = (log_p, log_q) if chosen.reverse_kl else (log_q, log_p)
        losses.append((first.exp() * (first - second)).sum() * chosen.temperature**2)
    return torch.stack(losses).mean() if losses else logits.sum() * 0


def dense(weights: Tensor) -> Tensor:
    """W [V_S, V_T] out of the entries' weights."""
    indices = torch.tensor(INDICES)
    return weights.new_zeros(8, 8).scatter_add(1, indices % 8, weights * (indices >= 0))[:, :7]


@pytest.mark.parametrize("options", CONFIGURATIONS)
@settings(max_examples=8, deadline=None)
@given(case=cases().map(with_matrix))
def test_p_kl_is_its_formula(options: dict[str, Any], case: Case) -> None:
    leaf = case.student.scores().double().requires_grad_()
    matrix = dense(torch.tensor(WEIGHTS, dtype=torch.float64))
    method = p_kl({**options, "ce_weight": 0.0})
    expected = slow_p_kl(case, leaf, matrix, method.options)
    (gradient,) = torch.autograd.grad(expected, leaf)
    values, found = probe_gradient(method, case.student, case.teacher, case.pair)
    assert values["loss"] == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(found, gradient.numpy(), rtol=1e-3, atol=1e-6)


def learned(pair: PairTables) -> tuple[PKL, torch.nn.Module]:
    method = p_kl({"vocab_topk": 5, "projection": "learned"})
    trainable = method.modules(PairInfo(0, 0, pair))["projection"]
    assert trainable.learning_rate == 0.01
    return method, trainable.module


@settings(max_examples=8, deadline=None)
@given(case=cases().map(with_matrix), seed=st.integers(0, 99))
def test_a_learned_projection_is_softmaxed_over_the_row(case: Case, seed: int) -> None:
    """Loss and gradient of the log-weights; a row without entries stays empty."""
    assume(case.block.chunks)
    method, module = learned(case.pair)
    torch.testing.assert_close(module(), torch.tensor(WEIGHTS, dtype=torch.float32))
    leaf = torch.randn(8, 2, generator=torch.Generator().manual_seed(seed)).double()
    leaf.requires_grad_()
    weights = leaf.masked_fill(torch.tensor(INDICES) < 0, -torch.inf).softmax(-1).nan_to_num()
    expected = slow_p_kl(case, case.student.scores().double(), dense(weights), method.options)
    module.load_state_dict({"log_weights": leaf.detach().float()})
    term = method.terms(case.block, {"projection": module})["kl"]
    total = term.total / term.count.clamp(min=1)
    assert float(total.detach()) == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    (found,) = torch.autograd.grad(total, list(module.parameters()))
    (gradient,) = torch.autograd.grad(expected, leaf)
    np.testing.assert_allclose(found, gradient.nan_to_num(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("options", CONFIGURATIONS)
@settings(max_examples=5, deadline=None)
@given(case=cases())
def test_p_kl_invariants(options: dict[str, Any], case: Case) -> None:
    check_invariants(p_kl(options), case)


@pytest.mark.parametrize("options", [*CONFIGURATIONS[2:], {"temperature": 2.0}])
@settings(max_examples=8, deadline=None)
@given(case=cases(one_tokenizer=True).map(identity))
def test_p_kl_of_the_teacher_itself_is_zero(options: dict[str, Any], case: Case) -> None:
    """On chunks of one row: a mean of logarithms is no logarithm of a mean."""
    if options.get("merge") != "chain":
        case = case_of([[(1, 1)] * len(chunks) for chunks in case.chunks], one_tokenizer=True)
    found = terms(p_kl({**options, "vocab_topk": 8}), identity(case).block)
    assert abs(found["kl"]) < 1e-6


def test_p_kl_does_not_loop_over_chunks() -> None:
    check_graph(p_kl({}))


@settings(max_examples=10, deadline=None)
@given(case=cases(), cut=st.integers(0, 9))
def test_the_top_tokens_are_the_batchs_wherever_it_is_cut(case: Case, cut: int) -> None:
    method = p_kl({})
    assert method.needs.prepare == "batch"
    rows = torch.arange(len(case.teacher.token))
    parts = [method.prepare(picked(case.teacher, part)) for part in (rows[:cut], rows[cut:])]
    assert torch.maximum(*parts).tolist() == method.prepare(case.teacher).tolist()


def test_p_kl_compares_the_top_tokens_alone() -> None:
    """Rows in no chunk choose them too; of equal logits the lower id is in."""
    case = case_of([[(1, 1), (1, 1)]])
    logits = case.teacher.scores().clone()
    logits[0] = torch.tensor([9.0, 1, 9, 9, 1, 1, 1])
    teacher = replace(case.teacher, logits=logits)
    expected = probe("p-kl", case.student, teacher, case.pair, vocab_topk=2)
    for token, matters in ((0, True), (2, True), (3, False), (6, False)):
        changed = logits.clone()
        changed[1:, token] -= 1
        found = probe(
            "p-kl", case.student, replace(teacher, logits=changed), case.pair, vocab_topk=2
        )
        assert (abs(found["kl"] - expected["kl"]) > 1e-6) == matters


@lru_cache
def numeral_tables() -> PairTables:
    """Llama 3's tokens and Qwen's tokenizer, which cuts them for W; no reverse pass."""
    lines = wheel_file("llama3").read_bytes().splitlines()
    taught = wheel_token_bytes("qwen")
    vocabularies = ([base64.b64decode(line.split()[0]) for line in lines], taught.vocabulary)
    projection = build_projection(*vocabularies, encode_teacher=encoder(taught), reverse_pass=False)
    return PairTables.build(*vocabularies, projection=projection)


def numerals(digits: int) -> list[bytes]:
    return [b"%0*d" % (digits, value) for value in range(10**digits)]


def one_chunk(vocabulary: Sequence[bytes], logits: dict[bytes, float]) -> Rows:
    """One row: these logits, and 0 for every other token."""
    scores = torch.zeros(1, len(vocabulary))
    ids = {word: index for index, word in enumerate(vocabulary)}
    for word, value in logits.items():
        scores[0, ids[word]] = value
    one, zero = torch.ones(1).long(), torch.zeros(1).long()
    return Rows(scores, zero, zero, zero > 0, zero, zero, one)


def test_numerals_are_no_common_tokens_of_llama_and_qwen() -> None:
    tables = numeral_tables()
    ids = {word: index for index, word in enumerate(tables.student_vocabulary)}
    common = set(tables.strict_pairs[:, 0].tolist())
    assert [len({ids[n] for n in numerals(d)} & common) for d in (1, 2, 3)] == [10, 0, 0]
    indices, weights = tables.projected
    spelled = [tables.teacher_vocabulary[t] for t in indices[ids[b"201"]] if t >= 0]
    assert spelled == [b"2", b"0", b"1"]
    assert weights[ids[b"201"]].tolist() == pytest.approx([0.9009, 0.0901, 0.0090, 0], abs=1e-4)


def test_p_kl_does_not_suppress_numerals_that_the_hybrid_losses_suppress() -> None:
    """The student expects any number of three digits, the teacher one that starts with 2. On 2xx a
    hybrid loss has the gradient p_S[j] * (the teacher's mass on the common tokens); `p-kl` raises
    it, and lowers the others."""
    tables = numeral_tables()
    words = [word for word in numerals(3) if word.startswith(b"2")]
    ids = {word: index for index, word in enumerate(tables.student_vocabulary)}
    own = [ids[word] for word in words]
    student = one_chunk(tables.student_vocabulary, dict.fromkeys(numerals(3), 10.0))
    teacher = one_chunk(tables.teacher_vocabulary, {b"2": 16.0})
    p, q = (side.scores().softmax(-1)[0] for side in (student, teacher))
    hybrid = [
        ("h-kl", {"partition": "strict", "uncommon_topk": 0}, tables.strict_pairs),
        ("gold", {"unmatched_weight": 0.0}, tables.shared),
    ]
    for name, options, pairs in hybrid:
        _, gradient = probe_gradient(name, student, teacher, tables, ce_weight=0.0, **options)
        expected = p[own] * q[pairs[:, 1]].sum()
        assert (gradient[0, own] > 0).all()
        np.testing.assert_allclose(gradient[0, own], expected, rtol=1e-3)
    _, gradient = probe_gradient("p-kl", student, teacher, tables, ce_weight=0.0)
    assert (gradient[0, own] < 0).all()
    others = [ids[word] for word in numerals(3) if not word.startswith(b"2")]
    assert (gradient[0, others] > 0).all()
