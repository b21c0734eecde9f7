"""`simct` against its formula, unit by unit, in both scores and both segmentations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from random_rows import SHARED, Case, case_of, cases, check_graph, check_invariants, terms
from torch import Tensor

from ctdbench.errors import UserError
from ctdbench.method import PairTables, create, probe, probe_gradient

CONFIGURATIONS = [
    {"score": score, "segmentation": segmentation}
    for score in ("logprob", "logit")
    for segmentation in ("bytes", "code")
]
Unit = tuple[list[int], list[int]]
OWN, TAUGHT = (list(ids) for ids in zip(*SHARED, strict=True))


def slow_units(chunks: list[Unit], segmentation: str) -> list[Unit]:
    """The chunks, or as the public code walks: gather until a token that both sides have."""
    if segmentation == "bytes":
        return chunks
    units: list[Unit] = []
    own: list[int] = []
    taught: list[int] = []
    for left, right in chunks:
        own, taught = own + left, taught + right
        if len(left) == len(right) == 1:
            units.append((own, taught))
            own, taught = [], []
    return units


def slow_simct(case: Case, logits: Tensor, options: dict[str, Any]) -> Tensor:
    losses = []
    for chunks in case.chunks:
        for own, taught in slow_units(chunks, options["segmentation"]):
            scored = options["score"] == "logprob"
            student, teacher = logits, case.teacher.scores().double()
            if scored:
                student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
            sides = [student[own[0], OWN], teacher[taught[0], TAUGHT]]
            if len(own) > 1 or len(taught) > 1:
                means = [
                    torch.stack([scores[r, rows.token[r]] for r in unit]).mean()
                    for scores, rows, unit in (
                        (student, case.student, own),
                        (teacher, case.teacher, taught),
                    )
                ]
                sides = [torch.cat([s, m[None]]) for s, m in zip(sides, means, strict=True)]
            p, q = (scores.softmax(-1) for scores in sides)
            losses.append((p * (p / q).log()).sum())
    return torch.stack(losses).mean() if losses else logits.sum() * 0


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=lambda o: "-".join(o.values()))
@settings(max_examples=10, deadline=None)
@given(case=cases())
def test_simct_is_its_formula(options: dict[str, Any], case: Case) -> None:
    leaf = case.student.scores().double().requires_grad_()
    expected = slow_simct(case, leaf, options)
    (gradient,) = torch.autograd.grad(expected, leaf)
    values, found = probe_gradient("simct", case.student, case.teacher, case.pair, **options)
    assert values["loss"] == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(found, gradient.numpy(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=lambda o: "-".join(o.values()))
@settings(max_examples=10, deadline=None)
@given(case=cases())
def test_simct_invariants(options: dict[str, Any], case: Case) -> None:
    check_invariants(create("simct", options), case)


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=lambda o: "-".join(o.values()))
@settings(max_examples=8, deadline=None)
@given(case=cases(one_tokenizer=True))
def test_simct_of_the_teacher_itself_is_zero(options: dict[str, Any], case: Case) -> None:
    found = terms(create("simct", options), replace(case.block, teacher=case.student))
    assert found == {"simct": pytest.approx(0, abs=1e-6)}


def test_simct_code_joins_a_mismatch_with_the_next_shared_token() -> None:
    """Units of the code: 1, 2 + 3 (joined), and nothing of the tail; by bytes: five."""
    case = case_of([[(1, 1), (1, 2), (1, 1), (2, 1)], [(1, 1)]])
    for segmentation, expected in (("bytes", 5), ("code", 3)):
        counts = create("simct", {"segmentation": segmentation}).counts(case.block)
        assert counts is not None
        assert int(counts["simct"]) == expected


def test_simct_code_keeps_a_mismatch_out_of_the_next_document() -> None:
    tail = case_of([[(2, 1)], [(1, 1)]])
    method = create("simct", {"segmentation": "code"})
    assert terms(method, tail.block) == terms(method, tail.part(1, 2))
    assert method.needs.whole_documents
    assert not create("simct").needs.whole_documents


def test_simct_logprob_ignores_a_shift_of_a_rows_logits_and_logit_does_not() -> None:
    case = case_of([[(2, 1), (1, 3)]])
    shifted = case.student.scores() + torch.arange(len(case.student.token))[:, None] * 0.5
    student = replace(case.student, logits=shifted)
    for score, moves in (("logprob", False), ("logit", True)):
        values = [
            probe("simct", rows, case.teacher, case.pair, score=score)["loss"]
            for rows in (case.student, student)
        ]
        assert (abs(values[0] - values[1]) > 1e-5) == moves


def test_simct_does_not_loop_over_chunks() -> None:
    for options in CONFIGURATIONS:
        check_graph(create("simct", options))


@pytest.mark.parametrize("name", ["simct", "strict"])
def test_a_pair_without_common_tokens_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="share none") as caught:
        create(name).check(PairTables.build([b"a", b""], [b"b", b""]))
    assert caught.value.exit_code == 2
    create(name).check(PairTables.build([b"a", b""], [b"b", b""], special_pairs=[(1, 1)]))
