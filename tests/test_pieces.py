"""Totals in pieces: values and gradients are those of one sum over everything."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ctdbench.pieces import Part, summed

ROWS, COLUMNS = 7, 5
PARTS: dict[str, Sequence[Part]] = {
    "one": [slice(0, ROWS)],
    "runs": [slice(0, 3), slice(3, ROWS)],
    "out of order": [torch.tensor([5, 0, 2]), torch.tensor([1, 6, 4, 3])],
    "all of them out of order after none": [slice(0, 0), torch.tensor([6, 0, 2, 1, 3, 5, 4])],
    "some rows in none": [slice(1, 3), torch.tensor([5])],
}


def given() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    values = torch.randn(ROWS, COLUMNS, dtype=torch.float64, requires_grad=True)
    return values, torch.randn(COLUMNS, dtype=torch.float64, requires_grad=True)


def totals(values: Tensor, other: Tensor) -> dict[str, Tensor]:
    return {"curved": (values.softmax(-1) @ other).square().sum(), "linear": values.sum()}


def taken(parts: Sequence[Part]) -> Tensor:
    rows = [torch.arange(ROWS)[part] for part in parts]
    return torch.cat(rows)


@pytest.mark.parametrize("name", PARTS)
def test_values_and_gradients_are_those_of_one_sum(name: str) -> None:
    values, other = given()
    found = summed(lambda _, part, own: totals(part, own), PARTS[name], values, other)
    expected = totals(values[taken(PARTS[name])], other)
    for key, total in expected.items():
        assert found[key].item() == pytest.approx(total.item(), rel=1e-12)
    loss = 2 * found["curved"] + 3 * found["linear"]
    whole = 2 * expected["curved"] + 3 * expected["linear"]
    for mine, theirs in zip(
        torch.autograd.grad(loss, [values, other]),
        torch.autograd.grad(whole, [values, other]),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_a_gradient_can_be_taken_of_every_total_by_itself_and_again() -> None:
    values, other = given()
    found = summed(lambda _, part, own: totals(part, own), PARTS["runs"], values, other)
    expected = totals(values, other)
    for key in ("curved", "linear", "curved"):
        (mine,) = torch.autograd.grad(found[key], [values], retain_graph=True)
        (theirs,) = torch.autograd.grad(expected[key], [values], retain_graph=True)
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_without_gradients_nothing_is_kept() -> None:
    values, other = given()
    with torch.no_grad():
        found = summed(lambda _, part, own: totals(part, own), PARTS["runs"], values, other)
    assert not any(total.requires_grad for total in found.values())
