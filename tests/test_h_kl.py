"""`h-kl` against the authors' numbers and its formula, and how it treats what it cannot pair."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ctdbench_methods.h_kl import HKL, HKLOptions
from hypothesis import given, settings
from random_rows import Case, cases, check_graph, check_invariants, terms
from torch import Tensor
from xtoken_rows import RELAXED, STRICT, check_golden, golden_cases, identity, with_matrix

from ctdbench.method import probe_gradient

CONFIGURATIONS: list[dict[str, Any]] = [
    {},
    {"partition": "strict", "uncommon_topk": 1},
    {"reverse_kl": True, "temperature": 2.0, "uncommon_topk": 2, "ce_weight": 0.0},
]


@pytest.mark.parametrize("case", golden_cases("h_kl", "gold"))
def test_h_kl_reproduces_the_authors_numbers(case: dict[str, Any]) -> None:
    options = {
        "partition": "strict" if case["mode"] == "gold" else "relaxed",
        "uncommon_topk": case["options"]["uncommon_topk"],
    }
    parts = {"kl_common": "kl_common", "l1_uncommon": "l1_uncommon"}
    check_golden("h-kl", case, options, parts)


def h_kl(options: dict[str, Any]) -> HKL:
    return HKL(HKLOptions(**options))


def slow_h_kl(case: Case, logits: Tensor, chosen: HKLOptions) -> Tensor:
    """The loss without CE, chunk by chunk and token by token."""
    pairs = STRICT if chosen.partition == "strict" else RELAXED
    teacher, losses = case.teacher.scores().double(), []
    for own_rows, taught_rows in (chunk for chunks in case.chunks for chunk in chunks):
        log_p = torch.stack([(logits[r] / chosen.temperature).log_softmax(-1) for r in own_rows])
        log_q = torch.stack(
            [(teacher[r] / chosen.temperature).log_softmax(-1) for r in taught_rows]
        )
        log_p, log_q = log_p.mean(0), log_q.mean(0)
        loss = logits.new_zeros(())
        for s, t in pairs:
            first, second = (log_p[s], log_q[t]) if chosen.reverse_kl else (log_q[t], log_p[s])
            loss = loss + first.exp() * (first - second)
        rest = [
            sorted((row[v].exp() for v in range(len(row)) if v not in paired), reverse=True)
            for row, paired in zip((log_p, log_q), map(set, zip(*pairs, strict=True)), strict=True)
        ]
        for a, b in list(zip(*rest, strict=False))[: chosen.uncommon_topk]:
            loss = loss + (a - b).abs()
        losses.append(loss * chosen.temperature**2)
    return torch.stack(losses).mean() if losses else logits.sum() * 0


@pytest.mark.parametrize("options", CONFIGURATIONS)
@settings(max_examples=8, deadline=None)
@given(case=cases().map(with_matrix))
def test_h_kl_is_its_formula(options: dict[str, Any], case: Case) -> None:
    leaf = case.student.scores().double().requires_grad_()
    method = h_kl({**options, "ce_weight": 0.0})
    expected = slow_h_kl(case, leaf, method.options)
    (gradient,) = torch.autograd.grad(expected, leaf)
    values, found = probe_gradient(method, case.student, case.teacher, case.pair)
    assert values["loss"] == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(found, gradient.numpy(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("options", CONFIGURATIONS)
@settings(max_examples=5, deadline=None)
@given(case=cases())
def test_h_kl_invariants(options: dict[str, Any], case: Case) -> None:
    check_invariants(h_kl(options), case)


@pytest.mark.parametrize("options", CONFIGURATIONS)
@settings(max_examples=8, deadline=None)
@given(case=cases(one_tokenizer=True).map(identity))
def test_h_kl_of_the_teacher_itself_is_zero(options: dict[str, Any], case: Case) -> None:
    found = terms(h_kl(options), case.block)
    assert max(map(abs, found.values())) < 1e-6


def test_h_kl_does_not_loop_over_chunks() -> None:
    check_graph(h_kl({}))


@settings(max_examples=8, deadline=None)
@given(case=cases().map(with_matrix))
def test_h_kl_trains_the_student_alone(case: Case) -> None:
    leaf = case.teacher.scores().clone().requires_grad_()
    block = replace(case.block, teacher=replace(case.teacher, logits=leaf))
    assert not any(term.total.requires_grad for term in h_kl({}).terms(block, {}).values())
