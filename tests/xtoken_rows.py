"""The golden cases of X-Token's losses as rows, tables and options; both of its methods' tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from golden_rows import check_gradient, closed_form, golden, labelled_rows
from random_rows import Case
from torch import Tensor

from ctdbench.method import PairTables, Rows, probe_gradient

GOLDEN = golden("xtoken_losses")


def golden_cases(*modes: str) -> list[Any]:
    chosen = [case for case in GOLDEN["cases"] if case["mode"] in modes]
    return [pytest.param(case, id=case["name"]) for case in chosen]


def golden_tables(inputs: dict[str, Any]) -> PairTables:
    sizes = [inputs[f"{side}_vocab_size"] for side in ("student", "teacher")]
    projection = (inputs["W_indices"], inputs["W_weights"])
    return PairTables.build(*([b""] * size for size in sizes), projection=projection)


def golden_sides(inputs: dict[str, Any], options: dict[str, Any]) -> tuple[Rows, Rows]:
    """Rows of both sides; what does not count is in no chunk and not supervised."""
    valid = (
        torch.tensor(inputs["chunk_valid"]) & torch.tensor(inputs["sample_mask"])[:, None].bool()
    )
    if options["exact_chunks_only"]:
        valid &= torch.tensor(inputs["chunk_exact"])
    mask = torch.tensor(inputs["student_mask"]) * torch.tensor(inputs["sample_mask"])[:, None]
    labels = torch.where(mask > 0, torch.tensor(inputs["student_ids"]), -100)
    student = closed_form(inputs["student_logits"])
    teacher = closed_form(inputs["teacher_logits"])[..., : inputs["teacher_vocab_size"]]
    unlabelled = torch.full(teacher.shape[:2], -100)
    return (
        golden_side(student, labels, inputs["student_row_chunk"], valid),
        golden_side(teacher, unlabelled, inputs["teacher_row_chunk"], valid),
    )


def golden_side(logits: Tensor, labels: Tensor, row_chunk: list[list[int]], valid: Tensor) -> Rows:
    chunk = torch.tensor(row_chunk)
    kept = (chunk >= 0) & valid.gather(1, chunk.clamp(min=0))
    first = torch.arange(len(chunk))[:, None] * valid.shape[1]
    rows = labelled_rows(logits, labels.tolist(), row_chunk)
    return replace(rows, chunk=torch.where(kept, chunk + first, -1).flatten())


def check_golden(
    name: str, case: dict[str, Any], options: dict[str, Any], parts: dict[str, str]
) -> None:
    """kd, its gradient and parts; then the total, with kd_scale as the weight where it is one.

    parts: our term -> the golden file's; kd = T^2 times their sum.
    """
    inputs, given, expected = GOLDEN["inputs"][case["input"]], case["options"], case["expected"]
    sides, tables = golden_sides(inputs, given), golden_tables(inputs)
    shape = inputs["student_logits"]["shape"]
    options = {key: given[key] for key in ("temperature", "reverse_kl")} | options
    values, gradient = probe_gradient(name, *sides, tables, ce_weight=0.0, kd_weight=1.0, **options)
    tolerance = {"rel": 1e-5, "abs": 1e-8}
    assert values["loss"] == pytest.approx(expected["kd"], **tolerance)
    assert values["ce"] == pytest.approx(expected["ce"], **tolerance)
    kd = given["temperature"] ** 2 * sum(values[ours] for ours in parts)
    assert kd == pytest.approx(expected["kd"], **tolerance)
    for ours, theirs in parts.items():
        if theirs in expected:
            assert values[ours] == pytest.approx(expected[theirs], **tolerance)
    check_gradient(gradient, expected["grad_kd"], shape)
    weights = {"kd_weight": given["kd_weight"], "ce_weight": given["ce_weight"]}
    if given["dynamic_scaling"]:  # constant for the gradient, so a weight like another
        scale = values["ce"] / abs(kd) if kd else 1.0
        assert scale == pytest.approx(expected["kd_scale"], **tolerance)
        weights = {"kd_weight": scale, "ce_weight": 1.0}
    values, gradient = probe_gradient(name, *sides, tables, **weights, **options)
    assert values["loss"] == pytest.approx(expected["total"], **tolerance)
    check_gradient(gradient, expected["grad_total"], shape)


# A matrix for the vocabularies of `random_rows`; 3 and 6 both want the teacher's 4
INDICES = [[1, -1], [3, -1], [2, -1], [4, 3], [5, -1], [6, 0], [4, 0], [-1, -1]]
WEIGHTS = [[1, 0], [1, 0], [1, 0], [0.6, 0.4], [1, 0], [0.7, 0.3], [0.6, 0.4], [0, 0]]
STRICT = [(0, 1), (1, 3), (2, 2), (4, 5)]
RELAXED = [*STRICT, (3, 4), (5, 6)]


def with_matrix(case: Case) -> Case:
    """The case with the matrix above instead of the one that its vocabularies make."""
    return replace(case, pair=replace(case.pair, projection=(INDICES, WEIGHTS)))


def identity(case: Case) -> Case:
    """The case with every token projected to itself, those without bytes too."""
    size = len(case.pair.student_vocabulary)
    return replace(
        case,
        teacher=case.student,
        pair=replace(case.pair, projection=(torch.arange(size)[:, None], torch.ones(size, 1))),
    )
