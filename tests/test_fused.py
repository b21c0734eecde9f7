"""Cross-entropy without logits: when, what the kernels are given, and the same gradients."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from harness_setup import batch_of, examples, gradients, llama_side, make_step
from torch import Tensor, nn

from ctdbench.distill import fused
from ctdbench.method import cross_entropy

BATCHES = [batch_of(examples(llama_side("student"), llama_side("teacher")))]
CUDA = torch.device("cuda")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Kernels that write the logits, for devices that the package has none for; what they got."""
    seen: list[dict[str, Any]] = []

    def linear_cross_entropy(
        e: Tensor, c: Tensor, targets: Tensor, *, softcap: float | None, ignore_index: int,
        reduction: str, filter_eps: float | None,
    ) -> Tensor:  # fmt: skip
        assert e.dtype == c.dtype == torch.bfloat16
        seen.append({"shape": (*e.shape, len(c)), "softcap": softcap, "eps": filter_eps})
        scores = (e @ c.T).float()
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        return nn.functional.cross_entropy(
            scores, targets, ignore_index=ignore_index, reduction=reduction
        )

    module = ModuleType(fused.PACKAGE)
    module.__spec__ = ModuleSpec(fused.PACKAGE, None)
    module.linear_cross_entropy = linear_cross_entropy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, fused.PACKAGE, module)
    monkeypatch.setattr(fused, "DEVICES", ("cpu",))
    return seen


def gradients_of(method: str, *, compiled: bool, precision: str = "bfloat16", **config: Any) -> Any:
    sides = {name: llama_side(name, **config) for name in ("student", "teacher")}
    step = make_step(method, **sides, block_rows=48, compiled=compiled)
    step.precision = precision
    return gradients(step, BATCHES)


@pytest.mark.parametrize("config", [{}, {"final_logit_softcapping": 0.5}])
def test_the_gradients_stay_as_they_were(
    calls: list[dict[str, Any]], config: dict[str, Any]
) -> None:
    (plain, expected), (report, found) = (
        gradients_of("sft", compiled=compiled, **config) for compiled in (False, True)
    )
    assert report.loss == pytest.approx(plain.loss, rel=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-7, msg=name)
    assert len(calls) > 1
    for call in calls:
        assert call["shape"][0] <= 48
        assert call["shape"][2] == len(llama_side("student").tokens.vocabulary)
        assert (call["softcap"], call["eps"]) == (config.get("final_logit_softcapping"), None)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("sft", {"compiled": False}),
        ("sft", {"compiled": True, "precision": "float32"}),
        ("sft", {"compiled": True, "logit_scale": 0.5}),
        ("simct", {"compiled": True}),
    ],
)
def test_logits_are_made_where_something_needs_them(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, method: str, settings: Any
) -> None:
    monkeypatch.setattr("ctdbench.distill.step._compiled", lambda terms: terms)
    gradients_of(method, **settings)
    assert not calls


def test_a_head_that_is_no_plain_matrix_is_not_taken(calls: list[dict[str, Any]]) -> None:
    def possible(head: nn.Module, device: str = "cpu") -> bool:
        model = llama_side("student").model
        model.set_output_embeddings(head)
        return fused.can_fuse(model, torch.device(device), "bfloat16")

    class Adapted(nn.Linear):
        """A head that does more than multiply."""

    assert possible(nn.Linear(4, 4, bias=False))
    assert not possible(nn.Linear(4, 4))
    assert not possible(Adapted(4, 4, bias=False))
    assert not possible(nn.Linear(4, 4, bias=False), "cuda")  # of which the fixture says: none


def test_nothing_is_taken_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama_side("student").model
    for there in (True, False):
        monkeypatch.setattr(fused, "find_spec", lambda name, there=there: there or None)
        assert fused.can_fuse(model, CUDA, "bfloat16") == there


@pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec(fused.PACKAGE) is None,
    reason="takes a GPU and cut-cross-entropy",
)
def test_the_packages_own_kernels_on_a_gpu() -> None:
    generator = torch.Generator().manual_seed(0)
    model = llama_side("student").model.to(CUDA)
    head = model.get_output_embeddings()
    count, (columns, width) = 64, head.weight.shape
    rows = SimpleNamespace(
        hidden=torch.randn(count, width, generator=generator).to(CUDA).requires_grad_(),
        token=torch.randint(columns, (count,), generator=generator).to(CUDA),
        scored=lambda: torch.arange(count, device=CUDA) % 3 > 0,
    )
    term = fused.cross_entropy(model, rows, columns)  # type: ignore[arg-type]
    rows.scores = lambda: head(rows.hidden)
    expected = cross_entropy(rows)  # type: ignore[arg-type]
    assert int(term.count) == int(expected.count)
    wanted = [rows.hidden, head.weight]
    for found, exact in zip(
        (term.total, *torch.autograd.grad(term.total, wanted)),
        (expected.total, *torch.autograd.grad(expected.total, wanted)),
        strict=True,
    ):
        torch.testing.assert_close(found.float(), exact.float(), rtol=2e-2, atol=2e-2)
