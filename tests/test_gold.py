"""`gold` against TRL's numbers, against its formula chunk by chunk, and on real vocabularies."""

from __future__ import annotations

import base64
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from golden_rows import check_gradient, closed_form, golden, labelled_rows
from hypothesis import given, settings
from random_rows import SHARED, Case, case_of, cases, check_graph, check_invariants, terms
from torch import Tensor
from wheel_tokenizers import wheel_file

from ctdbench.method import PairTables, Rows, create, probe, probe_gradient

GOLDEN = golden("gold_losses")
CONFIGURATIONS: list[dict[str, Any]] = [
    {},
    {"hybrid": False},
    {"beta": 1.0, "matched_weight": 0.3, "unmatched_weight": 0.7},
    {"top": 2},
    {"hybrid": False, "top": 3},
    {"beta": 0.5, "weighting": "adaptive", "temperature_student": 2.0, "temperature_teacher": 0.5},
]
OWN, TAUGHT = (list(ids) for ids in zip(*SHARED, strict=True))


def golden_tables(inputs: dict[str, Any]) -> PairTables:
    """<e> is a special on both sides, everything else its text."""
    words = (
        [b"" if word == "<e>" else word.encode() for word in inputs[side]["vocab"]]
        for side in ("student", "teacher")
    )
    return PairTables.build(*words, special_pairs=[(0, 0)])


def golden_options(options: dict[str, Any]) -> dict[str, Any]:
    adaptive = options["hybrid"] and options["matched_weight"] is None
    matched, unmatched = (
        options["distill_weight"] * (1.0 if options[name] is None else options[name])
        for name in ("matched_weight", "unmatched_weight")
    )
    return {
        "hybrid": options["hybrid"],
        "beta": options["beta"],
        "matched_weight": matched,
        "unmatched_weight": unmatched,
        "weighting": "adaptive" if adaptive else "fixed",
        "temperature_student": options["student_temperature"],
        "temperature_teacher": options["teacher_temperature"],
        "ce_weight": options["ce_weight"],
    }


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_gold_reproduces_the_authors_numbers(case: dict[str, Any]) -> None:
    inputs, expected, chunks = GOLDEN["inputs"][case["input"]], case["expected"], case["chunks"]
    student, teacher = (
        labelled_rows(
            closed_form(inputs[f"{side}_logits"]),
            inputs[side]["labels"],
            chunks[f"{side}_row_chunk"],
        )
        for side in ("student", "teacher")
    )
    tables, options = golden_tables(inputs), golden_options(case["options"])
    values, gradient = probe_gradient("gold", student, teacher, tables, **options)
    assert values["loss"] == pytest.approx(expected["total"], rel=1e-5)
    check_gradient(gradient, expected["grad_total"], inputs["student_logits"]["shape"])
    plain = {**options, "weighting": "fixed"}
    parts = probe("gold", student, teacher, tables, **plain)
    for name in ("matched", "unmatched") if options["hybrid"] else ():
        examples = [example[name] for example in expected["per_example"]]
        assert parts[name] == pytest.approx(np.mean(examples), rel=1e-5)
    if "ce" in expected:
        assert values["ce"] == pytest.approx(expected["ce"], rel=1e-5)


@pytest.mark.parametrize("case", GOLDEN["jsd"], ids=lambda case: f"beta={case['beta']}")
def test_gold_jsd_reproduces_the_authors_numbers(case: dict[str, Any]) -> None:
    """Rows that do not sum to 1 have the rest on a token of their own."""
    sides = []
    for given_rows in (case["student_probs"], case["teacher_probs"]):
        shared = torch.tensor(given_rows)
        whole = torch.cat([shared, (1 - shared.sum(1, keepdim=True)).clamp(min=0)], 1)
        count = len(whole)
        zeros = torch.zeros(count, dtype=torch.long)
        place = torch.arange(count)
        sides.append(Rows(whole.log(), zeros, place, place >= 0, zeros, place, place + 1))
    words = [bytes([97 + v]) for v in range(shared.shape[1])]
    tables = PairTables.build([*words, b"X"], [*words, b"Y"])
    values = probe("gold", *sides, tables, beta=case["beta"], unmatched_weight=0.0)
    assert values["loss"] == pytest.approx(case["value"], rel=1e-5)


def slow_gold(case: Case, logits: Tensor, options: dict[str, Any]) -> Tensor:
    """The loss, chunk by chunk."""
    chosen = create("gold", options).options
    teacher = case.teacher.scores().double()
    documents = []
    for chunks in case.chunks:
        losses = []
        for own_rows, taught_rows in chunks:
            p = slow_merged(logits / chosen.temperature_student, case.student, own_rows)
            q = slow_merged(teacher / chosen.temperature_teacher, case.teacher, taught_rows)
            losses.append(slow_distance(p, q, chosen))
        if losses:
            documents.append(torch.stack(losses).mean())
    return torch.stack(documents).mean() if documents else logits.sum() * 0


def slow_merged(logits: Tensor, rows: Rows, chunk: list[int]) -> Tensor:
    merged = logits[chunk[-1]].softmax(-1)
    for row in chunk[:-1]:
        merged = merged * logits[row].softmax(-1)[rows.token[row]].clamp(min=1e-8)
    return merged


def slow_distance(p: Tensor, q: Tensor, options: Any) -> Tensor:
    rest = [v for v in range(len(p)) if v not in OWN], [v for v in range(len(q)) if v not in TAUGHT]
    if not options.hybrid:
        return options.unmatched_weight * slow_sorted(p, q, options.top)
    unmatched = slow_sorted(p[rest[0]], q[rest[1]], options.top)
    matched = slow_jsd(p[OWN].clamp(min=1e-8), q[TAUGHT].clamp(min=1e-8), options.beta)
    part = len(SHARED) / len(q)
    first, second = (part, 1 - part) if options.weighting == "adaptive" else (1, 1)
    weights = (options.matched_weight * first, options.unmatched_weight * second)
    return weights[0] * matched + weights[1] * unmatched


def slow_jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    if beta == 0:
        return (q * (q / p).log()).sum()
    if beta == 1:
        return (p * (p / q).log()).sum()
    mix = (1 - beta) * p + beta * q
    return beta * (q * (q / mix).log()).sum() + (1 - beta) * (p * (p / mix).log()).sum()


def slow_sorted(p: Tensor, q: Tensor, top: int | None) -> Tensor:
    sides = (sorted(p, reverse=True)[:top], sorted(q, reverse=True)[:top])
    pairs = itertools.zip_longest(*sides, fillvalue=p.new_zeros(()))
    return torch.stack([(a - b).abs() for a, b in pairs]).sum()


@pytest.mark.parametrize("options", CONFIGURATIONS)
@settings(max_examples=8, deadline=None)
@given(case=cases())
def test_gold_is_its_formula(options: dict[str, Any], case: Case) -> None:
    leaf = case.student.scores().double().requires_grad_()
    expected = slow_gold(case, leaf, options)
    (gradient,) = torch.autograd.grad(expected, leaf)
    values, found = probe_gradient("gold", case.student, case.teacher, case.pair, **options)
    assert values["loss"] == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(found, gradient.numpy(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("options", CONFIGURATIONS)
@settings(max_examples=8, deadline=None)
@given(case=cases())
def test_gold_invariants(options: dict[str, Any], case: Case) -> None:
    check_invariants(create("gold", options), case)


@pytest.mark.parametrize("options", CONFIGURATIONS[:3])
@settings(max_examples=8, deadline=None)
@given(case=cases(one_tokenizer=True))
def test_gold_of_the_teacher_itself_is_zero(options: dict[str, Any], case: Case) -> None:
    method = create("gold", options)
    found = terms(method, replace(case.block, teacher=case.student))
    assert max(map(abs, found.values())) < 1e-6


def test_gold_does_not_loop_over_chunks() -> None:
    check_graph(create("gold"))


def test_gold_reads_the_row_before_the_token() -> None:
    """Off by one: the last token of a chunk came after its distribution and must not matter; the
    first one of a longer chunk must, and so must the first row of all."""
    case = case_of([[(1, 1), (2, 2)]])
    expected, gradient = probe_gradient("gold", case.student, case.teacher, case.pair)
    for row, matters in ((1, False), (2, True), (3, False)):
        token = case.student.token.clone()
        token[row] = (token[row] + 1) % 8
        student = replace(case.student, token=token)
        found = probe("gold", student, case.teacher, case.pair)
        assert (abs(found["loss"] - expected["loss"]) > 1e-6) == matters
    assert (np.abs(gradient).sum(1) > 0).tolist() == [False, True, True, True]


def test_the_shared_vocabulary_is_one_to_one() -> None:
    """Two ids with the same bytes, one special in two roles: an id is paired once."""
    tables = PairTables.build(
        [b"", b"a", b"b", b"a"], [b"b", b"a", b"a", b"", b""], special_pairs=[(0, 4), (0, 3)]
    )
    assert tables.shared.tolist() == [[1, 1], [2, 0], [0, 4]]


def test_gold_pushes_down_numbers_that_the_teacher_has_no_token_for() -> None:
    """Llama 3 has tokens of three digits, Qwen of one: gradient p_S[j] * (teacher's mass on C)."""
    words = [
        [base64.b64decode(line.split()[0]) for line in wheel_file(name).read_bytes().splitlines()]
        for name in ("llama3", "qwen")
    ]
    tables = PairTables.build(*words)
    own, taught = tables.shared.T
    place = torch.arange(2)
    student, teacher = (
        Rows(
            torch.randn(2, len(side), generator=torch.Generator().manual_seed(len(side))),
            place,
            place,
            place >= 0,
            place * 0,
            place,
            place + 1,
        )
        for side in words
    )
    _, gradient = probe_gradient("gold", student, teacher, tables, unmatched_weight=0.0)
    shared = set(own.tolist())
    numerals = [v for v, word in enumerate(words[0]) if len(word) == 3 and word.isdigit()]
    assert len(numerals) == 1000
    assert not shared & set(numerals)
    mass = teacher.scores().softmax(-1)[:, taught].sum(1, keepdim=True)
    expected = student.scores().softmax(-1)[:, numerals] * mass / 2
    assert (gradient[:, numerals] > 0).all()
    np.testing.assert_allclose(gradient[:, numerals], expected, rtol=1e-4)
