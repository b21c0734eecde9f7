"""`bld` against its formula, token by token; and the leak of a head that reads a later state."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from example_rows import (
    PAIR,
    STUDENT,
    TEACHER,
    WIDTH,
    block_of,
    byte_heads,
    head_weights,
    two_sides,
)
from torch import Tensor

from ctdbench.errors import UserError
from ctdbench.method import Rows, create, mean, probe


def slow_next_byte(row: Tensor, prefix: bytes) -> list[float]:
    return [
        sum(
            float(p)
            for p, w in zip(row, TEACHER, strict=True)
            if w and w.startswith(prefix + bytes([b]))
        )
        for b in range(256)
    ]


def slow_teacher_bytes(teacher: Rows, estimator: str) -> list[list[float]]:
    """METHODS section 4 for the rows in chunks, one byte at a time."""
    p = teacher.scores().softmax(-1).double()
    rows = []
    for r in (r for r in range(len(p)) if teacher.chunk[r] >= 0):
        token = TEACHER[int(teacher.token[r])]
        before = TEACHER[int(teacher.token[r - 1])] if r else b""
        for k in range(len(token)):
            masses = [*slow_next_byte(p[r], token[:k]), 0.0]
            follows = k == 0 and before and teacher.document[r - 1] == teacher.document[r]
            if estimator == "mixed" and follows:
                ended = float(p[r - 1, int(teacher.token[r - 1])])
                masses[256] = 1 - sum(masses)
                longer = [*slow_next_byte(p[r - 1], before), 0.0]
                masses = [g + ended * m for g, m in zip(longer, masses, strict=True)]
            rows.append([m / sum(masses) for m in masses])
    return rows


def slow_bld(
    student: Rows,
    teacher: Rows,
    weights: dict[str, Tensor],
    estimator: str,
    slots: int,
    reduction: str,
) -> dict[str, float]:
    """The loss token by token and byte by byte, in float64."""
    assert student.hidden is not None
    taught = slow_teacher_bytes(teacher, estimator)
    byte, kl, place = [], [], 0
    for r in range(len(student.token)):
        width = int(student.byte_end[r] - student.byte_start[r])
        covered = STUDENT[int(student.token[r])][-width:] if width else b""
        if student.supervised[r] and covered:
            scores = [
                (weights["heads.weight"][j] @ student.hidden[r] + weights["heads.bias"][j])
                .double()
                .log_softmax(-1)
                .tolist()
                for j in range(min(width, slots))
            ]
            byte.append([-score[covered[j]] for j, score in enumerate(scores)])
            if student.chunk[r] >= 0:
                targets = taught[place : place + len(scores)]
                kl.append([_kl(t, score) for t, score in zip(targets, scores, strict=True)])
        place += width if student.chunk[r] >= 0 else 0
    token_sum = reduction == "token_sum"
    numbers = {}
    for name, tokens in (("byte", byte), ("kl", kl)):
        count = len(tokens) if token_sum else sum(map(len, tokens))
        numbers[name] = sum(map(sum, tokens)) / count
    return numbers


def _kl(target: list[float], scores: list[float]) -> float:
    return sum(t * (math.log(t) - s) for t, s in zip(target, scores, strict=False) if t > 0)


@pytest.mark.parametrize("estimator", ["path", "mixed"])
@pytest.mark.parametrize("reduction", ["slot_mean", "token_sum"])
@pytest.mark.parametrize("slots", [10, 1])
def test_bld_is_its_formula(estimator: str, reduction: str, slots: int) -> None:
    student, teacher = two_sides()
    weights = head_weights(slots)
    found = probe(
        "bld",
        student,
        teacher,
        PAIR,
        weights=weights,
        bytes=estimator,
        reduction=reduction,
        slots=slots,
        byte_weight=0.7,
        kl_weight=0.3,
    )
    expected = slow_bld(student, teacher, weights, estimator, slots, reduction)
    assert found["byte"] == pytest.approx(expected["byte"], rel=1e-5)
    assert found["kl"] == pytest.approx(expected["kl"], rel=1e-5)
    whole = found["ce"] + 0.7 * expected["byte"] + 0.3 * expected["kl"]
    assert found["loss"] == pytest.approx(whole, rel=1e-5)


def test_bld_supervises_no_byte_past_the_last_head() -> None:
    student, teacher = two_sides()
    student.token[0], student.byte_end[0] = 7, 7  # a token of seven bytes
    weights = head_weights(slots=3)
    shorter = probe("bld", student, teacher, PAIR, weights=weights, slots=3, kl_weight=0)
    slots = [min(int(n), 3) for n in student.byte_end - student.byte_start]
    counted = create("bld", {"slots": 3, "kl_weight": 0}).counts(block_of(student, None))
    assert counted is not None
    assert int(counted["byte"]) == sum(slots)
    assert "kl" not in shorter


def test_bld_heads_read_the_state_before_the_token() -> None:
    """The leak: a head that reads row r + 1, a state that holds token r, would know its label."""
    student, teacher = two_sides()
    method = create("bld", {"kl_weight": 0})
    assert student.hidden is not None
    hidden = student.hidden.clone().requires_grad_()
    module = byte_heads(method)
    for r in torch.nonzero(student.byte_end > student.byte_start).flatten().tolist():
        alone = torch.zeros_like(student.supervised)
        alone[r] = True
        rows = replace(student, hidden=hidden, supervised=alone)
        total = method.terms(block_of(rows, teacher), {"heads": module})["byte"].total
        (gradient,) = torch.autograd.grad(total, hidden)
        assert torch.nonzero(gradient.abs().sum(1)).flatten().tolist() == [r]


def test_bld_heads_cannot_learn_random_labels_from_later_states() -> None:
    """States that encode the token before them say nothing about a random next token."""
    generator = torch.Generator().manual_seed(0)
    token = torch.randint(1, 3, (4000,), generator=generator)  # b"a" or b"b"
    before = torch.roll(token, 1)  # the state of row r has read token r - 1
    place = torch.arange(4000)
    student = Rows(
        logits=None,
        token=token,
        chunk=torch.full((4000,), -1),
        supervised=place > 0,
        document=torch.zeros(4000).long(),
        byte_start=place,
        byte_end=place + 1,
        hidden=torch.nn.functional.one_hot(before, WIDTH).float(),
    )
    method = create("bld", {"kl_weight": 0, "slots": 1})
    heads = byte_heads(method)
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.1)
    for _ in range(60):
        loss = mean(method.terms(block_of(student, None), {"heads": heads})["byte"])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    assert float(loss) > 0.98 * math.log(2)


def test_bld_end_bin_is_of_path_only() -> None:
    with pytest.raises(UserError, match="end_bin"):
        create("bld", {"end_bin": True})
    needs = create("bld", {"end_bin": True, "bytes": "path"}).needs
    assert needs.end_bin
    assert needs.bytes == "path"
