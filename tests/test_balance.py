"""Weights of the terms: the two rules, and the step that applies them, against plain autograd."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from golden_rows import golden
from harness_setup import (
    batch_of,
    examples,
    float64,
    float64_side,
    gradients,
    make_step,
    run_spec,
)
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from ctdbench.distill import balance
from ctdbench.distill.setting import balancing
from ctdbench.distill.step import Balance, Step
from ctdbench.errors import UserError
from ctdbench.method import Method, MethodOptions, create

NORMS = st.dictionaries(st.sampled_from("abcd"), st.floats(1e-4, 1e2), min_size=1)
CASES: list[tuple[Balance, str, dict[str, Any]]] = [
    ("ratio", "p-kl", {"vocab_topk": 100}),
    ("ratio", "gold", {"ce_weight": 1.0}),
    ("ratio", "alm", {"ce_weight": 1.0, "hidden_weight": 0.5}),
    ("gradmag", "alm", {"ce_weight": 1.0, "hidden_weight": 0.5}),
    ("gradmag", "h-kl", {}),
    ("gradmag", "bld", {"bytes": "mixed"}),
]
IDS = [f"{rule}-{name}" for rule, name, _ in CASES]


def test_ratio_scales_the_terms_to_cross_entropy() -> None:
    weights = balance.ratio(3.0, {"a": 0.5, "b": 2.0}, {"ce": 0.1, "a": 1.0, "b": 0.25})
    assert weights == {"a": 3.0, "b": 0.75}
    assert sum(weights[name] * value for name, value in {"a": 0.5, "b": 2.0}.items()) == 3.0
    assert balance.ratio(3.0, {"a": 0.0}, {"a": 2.0}) == {"a": 2.0}
    assert balance.ratio(3.0, {"a": -1.5}, {"a": 1.0}) == {"a": 2.0}


@pytest.mark.parametrize("case", golden("alm_losses")["gradmag"], ids=str)
def test_gradmag_is_tokenkits(case: dict[str, Any]) -> None:
    norms = {str(index): norm for index, norm in enumerate(case["grad_norms"])}
    found = list(balance.gradmag(norms, dict.fromkeys(norms, 1.0)).values())
    assert found == pytest.approx(case["weights"], rel=1e-5)


@given(NORMS, st.floats(0.1, 10))
def test_gradmag_evens_out_the_gradients(norms: dict[str, float], scale: float) -> None:
    ones = dict.fromkeys(norms, 1.0)
    weights = balance.gradmag(norms, ones)
    assert sum(weights.values()) == pytest.approx(1)
    pulls = [weights[name] * norm for name, norm in norms.items()]
    assert pulls == pytest.approx([pulls[0]] * len(pulls), rel=0.05)
    scaled = balance.gradmag({name: norm * scale for name, norm in norms.items()}, ones)
    assert scaled == pytest.approx(weights, rel=0.05)
    heavier = balance.gradmag(norms, {**ones, next(iter(norms)): 3.0})
    ratios = [heavier[name] / weights[name] for name in norms]
    assert ratios == pytest.approx([ratios[0], *[ratios[0] / 3] * (len(norms) - 1)])


def test_a_term_without_gradient_takes_nothing_from_the_others() -> None:
    ones = {"a": 1.0, "b": 1.0}
    assert balance.gradmag({"a": 0.0, "b": 2.0}, ones) == {"a": 0.0, "b": 1.0}
    assert balance.gradmag({"a": 1e-9, "b": 2.0}, ones) == {"a": 0.0, "b": 1.0}


def term_gradients(step: Step, batch: Any) -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    """Every term's mean and gradient by itself: the method with all other weights at zero."""
    own = type(step.method)
    names = ["ce", *step.method.weights()]
    found = {}
    for name in names:
        alone = own(step.method.options.model_copy(update={"ce_weight": float(name == "ce")}))
        alone.weights = lambda name=name: {n: float(n == name) for n in names[1:]}  # type: ignore[method-assign]
        single = Step(
            step.wrapped,
            step.teacher,
            alone,
            step.tables,
            accelerator=step.accelerator,
            block_rows=step.block_rows,
        )
        report, grads = gradients(single, [batch])
        found[name] = (report.terms[name], grads)
    return found


def expected_weights(rule: str, step: Step, parts: dict[str, Any]) -> dict[str, float]:
    own = {"ce": step.method.options.ce_weight, **step.method.weights()}
    if rule == "ratio":
        kd = sum(own[name] * parts[name][0] for name in parts if name != "ce")
        scale = abs(parts["ce"][0]) / abs(kd)
        return {name: 1.0 if name == "ce" else own[name] * scale for name in parts}
    last = {id(p) for p in step.network.model.get_decoder().h[-1].parameters()}
    names = [n for n, p in step.network.named_parameters() if id(p) in last]
    assert len(names) > 4
    norms = {
        name: math.sqrt(sum(float((grads[n] ** 2).sum()) for n in names if n in grads))
        for name, (_, grads) in parts.items()
        if own[name]
    }
    inverse = {name: own[name] / (norm + 1e-8) for name, norm in norms.items()}
    return {name: value / sum(inverse.values()) for name, value in inverse.items()}


@pytest.mark.parametrize(("rule", "name", "options"), CASES, ids=IDS)
def test_the_step_weights_terms_over_the_global_batch(
    rule: Balance, name: str, options: dict[str, Any]
) -> None:
    """Equal to the weighted sum of the terms' own gradients, however the batch is split."""
    student, teacher = float64_side("student"), float64_side("teacher")
    with float64():
        step = make_step(name, options, student=student, teacher=teacher, balancing=rule)
        found = examples(student, teacher)
        parts = term_gradients(step, batch_of(found))
        weights = expected_weights(rule, step, parts)
        for batches in ([found], [found[:3], found[3:4], found[4:]]):
            report, grads = gradients(step, [batch_of(part) for part in batches])
            for term, weight in weights.items():
                assert report.weights[term] == pytest.approx(weight, rel=1e-5), term
            total = sum(weights[term] * parts[term][0] for term in weights)
            assert report.loss == pytest.approx(total, rel=1e-5)
            for key, gradient in grads.items():
                wanted = [w * parts[t][1][key] for t, w in weights.items() if key in parts[t][1]]
                torch.testing.assert_close(gradient, sum(wanted), rtol=1e-4, atol=1e-7)


def test_one_term_keeps_its_full_weight_under_gradmag() -> None:
    student, teacher = float64_side("student"), float64_side("teacher")
    with float64():
        batch = batch_of(examples(student, teacher))
        fixed = make_step("alm", student=student, teacher=teacher)
        moving = make_step("alm", student=student, teacher=teacher, balancing="gradmag")
        (plain, expected), (balanced, grads) = (gradients(s, [batch]) for s in (fixed, moving))
    assert balanced.loss == pytest.approx(plain.loss)
    for key, gradient in expected.items():
        torch.testing.assert_close(grads[key], gradient)


def test_ratio_needs_cross_entropy() -> None:
    for method, asked in (("simct", "ratio"), ("p-kl", "auto")):
        spec = run_spec(method, {"ce_weight": 0.0}, balance=asked)
        with pytest.raises(UserError, match=r"train.balance: ratio .*ce_weight=1"):
            balancing(spec, create(method, spec.options))
    spec = run_spec("p-kl", {"ce_weight": 0.0}, balance="fixed")
    assert balancing(spec, create("p-kl", spec.options)) == "fixed"


@pytest.mark.parametrize(
    ("method", "options", "idle"),
    [
        ("p-kl", {"ce_weight": 5.0}, "ce_weight"),
        ("h-kl", {"kd_weight": 7.0}, "kd_weight"),
        ("uld", {"weight": 3.0}, "weight"),
        ("h-kl", {"ce_weight": 1.0, "kd_weight": 0.0}, None),
        ("p-kl", {"temperature": 2.0}, None),
        ("gold", {"ce_weight": 1.0, "matched_weight": 2.0}, None),
        (
            "gold",
            {"ce_weight": 1.0, "matched_weight": 2.0, "unmatched_weight": 0.0},
            "matched_weight",
        ),
        ("alm", {"ce_weight": 1.0, "weight": 2.0, "hidden_weight": 0.5}, None),
    ],
)
def test_a_weight_that_ratio_takes_back_is_refused(
    method: str, options: dict[str, Any], idle: str | None
) -> None:
    found = create(method, options)
    rule = balancing(run_spec(method, options, balance="fixed"), found)
    assert rule == "fixed"
    spec = run_spec(method, options, balance="ratio")
    if idle is None:
        assert balancing(spec, found) == "ratio"
        return
    with pytest.raises(UserError, match=rf"^method.{idle} has no effect: train.balance=ratio"):
        balancing(spec, found)


def test_of_a_plugins_weights_nothing_is_refused() -> None:
    """It may have further terms, which weigh 1 as long as `weights` does not name them."""

    class Options(MethodOptions):
        own_weight: float = 1.0

    class Weighted(Method):
        def weights(self) -> dict[str, float]:
            return {"own": self.options.own_weight}  # type: ignore[attr-defined]

    method = Weighted(Options(own_weight=3.0))
    assert balancing(run_spec("sft", balance="ratio"), method) == "ratio"


def test_gradmag_without_cross_entropy_refuses_the_weight_of_its_only_term() -> None:
    options: dict[str, Any] = {"weight": 2.0}
    with pytest.raises(UserError, match=r"^method.weight has no effect: train.balance=gradmag"):
        balancing(run_spec("alm", options, balance="gradmag"), create("alm", options))
    options["ce_weight"] = 1.0
    spec = run_spec("alm", options, balance="gradmag")
    assert balancing(spec, create("alm", options)) == "gradmag"


def test_gradmag_takes_adapters_of_the_last_layer_and_refuses_a_frozen_one() -> None:
    side = float64_side("student")
    wrapped = get_peft_model(
        side.model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    chosen = balance.last_layer(wrapped)
    assert [p.numel() for p in chosen] == [2 * 24, 2 * 72]
    frozen = replace(side, model=wrapped.requires_grad_(False))
    with pytest.raises(UserError, match="last layer"):
        balance.last_layer(frozen.model)
