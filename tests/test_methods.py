"""`sft`, `uld` and `bld` through `probe`: ULD's golden numbers, and what must change no result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from example_rows import PAIR, WIDTH, block_of, byte_heads, head_weights, two_sides
from golden_rows import check_gradient, closed_form, golden, labelled_rows
from torch import Tensor

from ctdbench.method import PairTables, Rows, create, mean, probe, probe_gradient


def golden_cases() -> list[Any]:
    found = golden("uld_losses")
    inputs = found["inputs"]
    return [pytest.param(inputs[case["input"]], case, id=case["name"]) for case in found["cases"]]


@pytest.mark.parametrize(("inputs", "case"), golden_cases())
def test_uld_reproduces_the_authors_numbers(inputs: dict[str, Any], case: dict[str, Any]) -> None:
    options, expected, chunks = case["options"], case["expected"], case["chunks"]
    student, teacher = (
        labelled_rows(
            closed_form(inputs[f"{side}_logits"]),
            inputs[f"{side}_labels"],
            chunks[f"{side}_row_chunk"],
        )
        for side in ("student", "teacher")
    )
    # the golden chunks are the paired positions
    sides = [torch.argsort(rows.chunk)[(rows.chunk < 0).sum() :] for rows in (student, teacher)]
    settings = {
        "weight": options["distill_weight"],
        "temperature_student": options["student_temperature"],
        "temperature_teacher": options["teacher_temperature"],
    }
    for name in ("total", "uld_weighted"):
        ce_weight = options["ce_weight"] if name == "total" else 0.0
        for alignment in ("positions", "chunks"):  # chunks of one token each are positions
            values, gradient = probe_gradient(
                "uld",
                student,
                teacher,
                PairTables.build([b""] * 10, [b""] * 10),
                pairs=torch.stack(sides, 1),
                alignment=alignment,
                ce_weight=ce_weight,
                **settings,
            )
            if name == "total":
                assert values["loss"] == pytest.approx(expected["total"], rel=1e-5)
                assert values["uld"] == pytest.approx(expected["uld"], rel=1e-5)
                assert values["ce"] == pytest.approx(expected["ce"], rel=1e-5)
            check_gradient(gradient, expected[f"grad_{name}"], inputs["student_logits"]["shape"])


CONFIGURATIONS: list[tuple[str, dict[str, Any]]] = [
    ("sft", {}),
    ("uld", {}),
    ("uld", {"top": 3}),
    ("uld", {"alignment": "chunks"}),
    ("bld", {"bytes": "path", "end_bin": True}),
    ("bld", {"bytes": "mixed", "reduction": "token_sum"}),
]
PAIRS = torch.tensor([[0, 0], [1, 1], [2, 2], [6, 4], [7, 5]])


def probed(
    name: str, options: dict[str, Any], student: Rows, teacher: Rows, pairs: Tensor | None
) -> Any:
    weights = head_weights() if name == "bld" else None
    return probe(name, student, teacher, PAIR, pairs=pairs, weights=weights, **options)


@pytest.mark.parametrize(("name", "options"), CONFIGURATIONS)
def test_padding_rows_change_nothing(name: str, options: dict[str, Any]) -> None:
    student, teacher = two_sides()
    pairs = None if options.get("alignment") == "chunks" else PAIRS
    expected = probed(name, options, student, teacher, pairs)
    found = probed(name, options, padded(student), padded(teacher), pairs)
    assert found == pytest.approx(expected, rel=1e-6)


def padded(rows: Rows, count: int = 3) -> Rows:
    """The rows and some that are no one's: large logits, no token."""
    extra = {
        "logits": torch.full((count, rows.scores().shape[1]), 50.0),
        "token": torch.full((count,), -1),
        "chunk": torch.full((count,), -1),
        "supervised": torch.zeros(count).bool(),
        "document": torch.ones(count).long(),
        "byte_start": torch.zeros(count).long(),
        "byte_end": torch.zeros(count).long(),
    }
    if rows.hidden is not None:
        extra["hidden"] = torch.full((count, WIDTH), 9.0)
    return Rows(**{key: torch.cat([getattr(rows, key), value]) for key, value in extra.items()})


@pytest.mark.parametrize(("name", "options"), CONFIGURATIONS)
def test_the_order_of_documents_changes_nothing(name: str, options: dict[str, Any]) -> None:
    student, teacher = two_sides()
    pairs = None if options.get("alignment") == "chunks" else PAIRS
    expected = probed(name, options, student, teacher, pairs)
    swapped_pairs = (
        None if pairs is None else torch.tensor([[0, 0], [1, 1], [3, 3], [4, 4], [5, 5]])
    )
    found = probed(name, options, swapped(student, 6), swapped(teacher, 4), swapped_pairs)
    assert found == pytest.approx(expected, rel=1e-5)


def swapped(rows: Rows, boundary: int) -> Rows:
    """Document 1 before document 0."""
    order = torch.cat([torch.arange(boundary, len(rows.token)), torch.arange(boundary)])
    moved = {key: getattr(rows, key)[order] for key in vars(rows) if getattr(rows, key) is not None}
    moved["document"] = 1 - moved["document"]
    moved["chunk"] = torch.where(moved["chunk"] >= 0, (moved["chunk"] + 1) % 4, -1)
    return Rows(**moved)


@pytest.mark.parametrize(("name", "options"), CONFIGURATIONS)
def test_counts_need_no_logits_and_agree_with_the_terms(name: str, options: dict[str, Any]) -> None:
    student, teacher = two_sides()
    method = create(name, options)
    distributions = torch.full((9, 257), 1 / 257)
    block = replace(block_of(student, teacher, distributions), pairs=PAIRS)
    modules = {"heads": byte_heads(method)} if name == "bld" else {}
    terms = method.terms(block, modules)
    bare = replace(
        block,
        student=replace(student, logits=None, hidden=None),
        teacher=replace(teacher, logits=None),
        bytes=None,
    )
    counts = method.counts(bare)
    assert counts is not None
    assert set(counts) == set(terms)
    for key, term in terms.items():
        assert float(counts[key]) == pytest.approx(float(term.count))


@pytest.mark.parametrize(("name", "options"), CONFIGURATIONS)
def test_empty_blocks_are_finite(name: str, options: dict[str, Any]) -> None:
    student, teacher = (
        Rows(**{key: value[:0] for key, value in vars(rows).items() if value is not None})
        for rows in two_sides()
    )
    method = create(name, options)
    modules = {"heads": byte_heads(method)} if name == "bld" else {}
    terms = method.terms(block_of(student, teacher, torch.zeros(0, 257)), modules)
    assert all(float(mean(term)) == 0 for term in terms.values())


def test_uld_blocks_add_up_to_the_batch() -> None:
    """A document split over two blocks: totals and counts add to those of the whole."""
    student, teacher = two_sides()
    method = create("uld", {})
    whole = replace(block_of(student, teacher), pairs=PAIRS, document_chunks=torch.tensor([3, 2]))
    parts = [method.terms(replace(whole, pairs=part), {})["uld"] for part in (PAIRS[:2], PAIRS[2:])]
    term = method.terms(whole, {})["uld"]
    assert float(term.count) == pytest.approx(2)
    assert float(parts[0].total + parts[1].total) == pytest.approx(float(term.total))
    assert float(parts[0].count + parts[1].count) == pytest.approx(2)


def test_uld_over_chunks_is_the_chain_rule() -> None:
    student, teacher = two_sides()
    p, q = (rows.scores().softmax(-1) for rows in (student, teacher))
    merged = {
        0: (p[0], q[0]),
        1: (p[2] * p[1, 1], q[1]),
        2: (p[4] * p[3, 4], q[2]),
        3: (p[6], q[5] * q[4, 3]),
    }
    distances = []
    for left, right in merged.values():
        ranked = torch.zeros(2, 10)
        ranked[0] = left.sort(descending=True).values
        ranked[1, :9] = right.sort(descending=True).values
        distances.append(float((ranked[0] - ranked[1]).abs().sum()))
    expected = (sum(distances[:3]) / 3 + distances[3]) / 2
    found = probe("uld", student, teacher, PAIR, alignment="chunks")
    assert found["uld"] == pytest.approx(expected, rel=1e-5)


def test_sft_is_cross_entropy_alone() -> None:
    student, teacher = two_sides()
    assert set(probe("sft", student, teacher, PAIR)) == {"ce", "loss"}
    assert not create("sft").needs.teacher


@pytest.mark.parametrize(
    ("name", "options", "missing"),
    [
        ("uld", {}, "pairs rows by position"),
        ("bld", {}, "reads the student's states"),
        ("alm", {"hidden_weight": 1.0}, "state term reads states"),
        ("p-kl", {}, "from the whole batch"),
    ],
)
def test_a_block_without_what_the_method_asked_for_is_refused(
    name: str, options: dict[str, Any], missing: str
) -> None:
    """A harness that forgets something is told what, instead of a number being made up."""
    student, teacher = (replace(rows, hidden=None) for rows in two_sides())
    block = replace(block_of(student, teacher), pairs=None, batch=None)
    with pytest.raises(TypeError, match=missing):
        create(name, options).terms(block, {})
