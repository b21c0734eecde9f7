"""Several teachers: every one over its own chunks, one cross-entropy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness_setup import (
    batch_of,
    examples,
    float64,
    float64_side,
    gradients,
    make_step,
)
from test_balance import term_gradients

from ctdbench.distill.models import Side

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("gold", {"ce_weight": 0.5}),
    ("p-kl", {"vocab_topk": 100}),
    ("alm", {"ce_weight": 0.5, "hidden_weight": 0.5, "hidden_projection": "always"}),
    ("bld", {"bytes": "mixed"}),
    ("uld", {}),
]
every_method = pytest.mark.parametrize(("name", "options"), METHODS, ids=[n for n, _ in METHODS])


def sides() -> tuple[Side, Side, Side]:
    """A student and two teachers; the second teacher has the student's tokenizer."""
    student, first, second = map(float64_side, ("student", "teacher", "student"))
    for parameter in second.model.parameters():
        parameter.data.mul_(1.5)
    return student, first, second


@every_method
def test_two_teachers_add_up_and_cross_entropy_counts_once(
    name: str, options: dict[str, Any]
) -> None:
    student, first, second = sides()
    with float64():
        both = make_step(
            name, options, student=student, teacher=first, others=[second], weights=(0.7, 0.2)
        )
        found = examples(student, first, others=[second])
        assert any(example.chunks != example.others[0].chunks for example in found)
        report, grads = gradients(both, [batch_of(found[:5]), batch_of(found[5:])])
        ce = both.method.options.ce_weight
        alone = {}
        for suffix, teacher, weight in (("", first, 0.7), ("@2", second, 0.2)):
            single = make_step(name, options, student=student, teacher=teacher)
            # The same modules as in the step of both.
            state = {
                key.removesuffix(suffix): both.network.extra[key].state_dict()
                for key in both.network.extra
                if ("@" in key) == bool(suffix)
            }
            for key, values in state.items():
                single.network.extra[key].load_state_dict(values)
            terms = term_gradients(single, batch_of(examples(student, teacher)))
            own = single.method.weights()
            for term, (value, gradient) in terms.items():
                if term != "ce":
                    alone[term + suffix] = (own[term] * weight, value, gradient, suffix)
            ce_value, ce_gradient = terms["ce"]
        assert report.terms["ce"] == pytest.approx(ce_value)
        total = ce * ce_value
        for term, (weight, value, _, _) in alone.items():
            assert report.terms[term] == pytest.approx(value, rel=1e-6)
            assert report.weights[term] == pytest.approx(weight)
            total += weight * value
        assert report.loss == pytest.approx(total, rel=1e-6)
        for key, gradient in grads.items():
            expected = torch.zeros_like(gradient)
            if key in ce_gradient and not key.startswith("extra."):
                expected += ce * ce_gradient[key]
            for weight, _, found_gradient, suffix in alone.values():
                inner = key
                if key.startswith("extra."):
                    module, _, rest = key.removeprefix("extra.").partition(".")
                    if ("@" in module) != bool(suffix):
                        continue
                    inner = f"extra.{module.removesuffix(suffix)}.{rest}"
                if inner in found_gradient:
                    expected += weight * found_gradient[inner]
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_every_teacher_gets_its_own_modules() -> None:
    student, first, second = sides()
    with float64():
        step = make_step("bld", student=student, teacher=first, others=[second])
    assert sorted(step.network.extra) == ["heads", "heads@2"]
    assert step.guides[1].suffix == "@2"
