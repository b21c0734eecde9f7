"""`strict` against its formula, chunk by chunk."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from random_rows import SHARED, Case, case_of, cases, check_graph, check_invariants, terms
from torch import Tensor

from ctdbench.method import PairTables, create, probe, probe_gradient

CONFIGURATIONS: list[dict[str, Any]] = [
    {},
    {"top": 2},
    {"top": 3, "renormalise": False},
]
OWN, TAUGHT = (list(ids) for ids in zip(*SHARED, strict=True))


def slow_strict(case: Case, logits: Tensor, options: dict[str, Any]) -> Tensor:
    chosen = create("strict", options).options
    teacher = case.teacher.scores().double()
    losses = []
    for own, taught in (unit for chunks in case.chunks for unit in chunks):
        if len(own) != 1 or len(taught) != 1:
            continue
        p, q = logits[own[0]].softmax(-1), teacher[taught[0]].softmax(-1)
        best = q[TAUGHT].argsort(descending=True)[: chosen.top]
        a, b = p[OWN][best], q[TAUGHT][best]
        if chosen.renormalise:
            a, b = a / a.sum(), b / b.sum()
        losses.append((a * (a / b).log()).sum())
    return torch.stack(losses).mean() if losses else logits.sum() * 0


@pytest.mark.parametrize("options", CONFIGURATIONS)
@settings(max_examples=12, deadline=None)
@given(case=cases())
def test_strict_is_its_formula(options: dict[str, Any], case: Case) -> None:
    leaf = case.student.scores().double().requires_grad_()
    expected = slow_strict(case, leaf, options)
    (gradient,) = torch.autograd.grad(expected, leaf)
    values, found = probe_gradient("strict", case.student, case.teacher, case.pair, **options)
    assert values["loss"] == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(found, gradient.numpy(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("options", CONFIGURATIONS)
@settings(max_examples=10, deadline=None)
@given(case=cases())
def test_strict_invariants(options: dict[str, Any], case: Case) -> None:
    check_invariants(create("strict", options), case)


@pytest.mark.parametrize("options", CONFIGURATIONS)
@settings(max_examples=8, deadline=None)
@given(case=cases(one_tokenizer=True))
def test_strict_of_the_teacher_itself_is_zero(options: dict[str, Any], case: Case) -> None:
    found = terms(create("strict", options), replace(case.block, teacher=case.student))
    assert found == {"strict": pytest.approx(0, abs=1e-6)}


def test_strict_reads_sixteen_tokens_of_a_larger_vocabulary() -> None:
    """Only the teacher's 16 likeliest shared tokens have a gradient, at 1:1 chunks only."""
    words = [bytes([65 + v]) for v in range(40)]
    case = case_of([[(1, 1), (2, 1)]])
    generator = torch.Generator().manual_seed(3)
    student, teacher = (
        replace(
            rows,
            logits=torch.randn(len(rows.token), 41, generator=generator),
        )
        for rows in (case.student, case.teacher)
    )
    tables = PairTables.build([*words, b"own"], [*words, b"other"])
    teacher.scores()[1, 40] = 9.0  # likely, but no token of the student
    _, gradient = probe_gradient("strict", student, teacher, tables)
    best = set(teacher.scores()[1, :40].topk(16).indices.tolist())
    assert {(int(r), int(v)) for r, v in np.argwhere(gradient)} == {(1, v) for v in best}


def test_strict_without_renormalising_can_be_negative() -> None:
    """Both sides certain outside the compared tokens, the student less so than the teacher."""
    case = case_of([[(1, 1)]])
    for rows, mass in ((case.student, 0.1), (case.teacher, 0.2)):
        shared = [s if rows is case.student else t for s, t in SHARED]
        rows.scores().fill_(-30.0)
        rows.scores()[1, shared] = math.log(mass / len(shared))
        rows.scores()[1, 6] = math.log(1 - mass)
    values = probe("strict", case.student, case.teacher, case.pair, renormalise=False)
    assert values["loss"] == pytest.approx(0.1 * math.log(0.1 / 0.2), rel=1e-4)
    assert probe("strict", case.student, case.teacher, case.pair)["loss"] == pytest.approx(
        0, abs=1e-6
    )


def test_strict_does_not_loop_over_chunks() -> None:
    for options in CONFIGURATIONS:
        check_graph(create("strict", options))
