"""`kd` against the forward KL row by row, and the pairs that it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from random_rows import ENDS, STUDENT, TEACHER, Case, case_of, cases, check_graph, check_invariants
from torch import Tensor

from ctdbench.errors import UserError
from ctdbench.method import PairTables, create, probe, probe_gradient


def slow_kd(case: Case, logits: Tensor, temperature: float) -> Tensor:
    """T^2 times the mean over tokens of the sum over the vocabulary of q log(q / p)."""
    teacher = case.teacher.scores().double()
    losses = []
    for chunks in case.chunks:
        for own, taught in chunks:
            for row, other in zip(own, taught, strict=True):
                p = (logits[row] / temperature).softmax(-1)
                q = (teacher[other] / temperature).softmax(-1)
                losses.append(temperature**2 * (q * (q / p).log()).sum())
    return torch.stack(losses).mean() if losses else logits.sum() * 0


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@settings(max_examples=10, deadline=None)
@given(case=cases(one_tokenizer=True))
def test_kd_is_its_formula(temperature: float, case: Case) -> None:
    leaf = case.student.scores().double().requires_grad_()
    expected = slow_kd(case, leaf, temperature)
    (gradient,) = torch.autograd.grad(expected, leaf)
    sides = (case.student, case.teacher, case.pair)
    values, found = probe_gradient("kd", *sides, temperature=temperature)
    assert values["loss"] == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(found, gradient.numpy(), rtol=1e-3, atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(case=cases(one_tokenizer=True))
def test_kd_invariants(case: Case) -> None:
    check_invariants(create("kd", {"temperature": 2.0}), case)
    own = probe("kd", case.student, case.student, case.pair)
    assert own["kd"] == own["loss"] == 0


def test_kd_keeps_its_gradient_at_a_high_temperature() -> None:
    """What T^2 is for: without it the gradient falls as 1 / T^2."""
    case = case_of([[(1, 1)] * 4], one_tokenizer=True)
    norms = [
        np.linalg.norm(
            probe_gradient("kd", case.student, case.teacher, case.pair, temperature=heat)[1]
        )
        for heat in (50.0, 100.0)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


def test_kd_does_not_loop_over_chunks() -> None:
    check_graph(create("kd"), one_tokenizer=True)


@pytest.mark.parametrize(
    "teacher",
    [TEACHER, STUDENT[::-1], [*STUDENT, b""], [*STUDENT[:-1], b"z"]],
    ids=["other tokens", "other ids", "one more", "one differs"],
)
def test_kd_refuses_two_tokenizers(teacher: list[bytes]) -> None:
    with pytest.raises(UserError, match=r"tokenizers differ\. use a pair") as caught:
        create("kd").check(PairTables.build(STUDENT, teacher, ENDS))
    assert caught.value.exit_code == 2


def test_kd_refuses_other_specials() -> None:
    same = {"student_special": [0, 7], "teacher_special": [7, 0]}
    create("kd").check(PairTables.build(STUDENT, STUDENT, **same))
    with pytest.raises(UserError, match="tokenizers differ"):
        create("kd").check(PairTables.build(STUDENT, STUDENT, **same | {"teacher_special": [0]}))


def test_kd_refuses_tokens_that_differ() -> None:
    """Equal vocabularies, other merges: the ids say the same and the rows do not."""
    case = case_of([[(2, 2)]], one_tokenizer=True)
    teacher = replace(case.teacher, token=(case.teacher.token + 1) % 8)
    with pytest.raises(UserError, match="different tokens"):
        probe("kd", case.student, teacher, case.pair)


def test_probe_asks_the_method_about_the_pair() -> None:
    case = case_of([[(1, 1)]])
    with pytest.raises(UserError, match="tokenizers differ"):
        probe("kd", case.student, case.teacher, case.pair)
