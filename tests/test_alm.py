"""`alm` against the authors' numbers, its formula chunk by chunk, and a streamed step."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from golden_rows import check_gradient, closed_form, golden
from harness_setup import llama_side
from hypothesis import given, settings
from hypothesis import strategies as st
from random_rows import Case, renumbered, reversed_documents
from random_texts import END, graph_size, made, text_cases, with_gradient
from torch import Tensor

from ctdbench.distill.setting import pair_tables
from ctdbench.errors import UserError
from ctdbench.method import (
    Method,
    PairTables,
    Rows,
    Scalars,
    bare,
    cross_entropy,
    mean,
    probe,
    probe_gradient,
)

LOSSES, LATENTS = golden("alm_losses"), golden("alm_latents")
LOSS_CASES = [pytest.param(case, id=case["name"]) for case in LOSSES["cases"]]
LATENT_CASES = [pytest.param(case, id=case["name"]) for case in LATENTS["cases"]]


def side_rows(inputs: dict[str, Any], side: str) -> Rows:
    """A row for every token but the first, and the row after the last; masked tokens have no
    chunk."""
    logits = closed_form(inputs[f"{side}_logits"])
    documents, length, columns = logits.shape
    ids, chunk, mask = (
        torch.tensor(inputs[f"{side}_{name}"]) for name in ("ids", "token_chunk", "loss_mask")
    )
    chunk = torch.where(mask > 0, chunk, -1)
    starts = torch.tensor([0, *(chunk.amax(1) + 1).cumsum(0)[:-1].tolist()])[:, None]
    chunk = torch.where(chunk >= 0, chunk + starts, -1)
    place = torch.arange(length).repeat(documents)
    return Rows(
        logits=logits.reshape(-1, columns),
        token=shifted(ids),
        chunk=shifted(chunk),
        supervised=shifted(mask - 1) >= 0,
        document=torch.arange(documents).repeat_interleave(length),
        byte_start=place,
        byte_end=place + 1,
    )


def shifted(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values[:, 1:], (0, 1), value=-1).flatten()


def tables(inputs: dict[str, Any]) -> PairTables:
    """Vocabularies whose boundary tokens are the golden ones: the end token and words."""
    words = [
        [
            b"" if v == inputs[f"{side}_eos_id"] else b" word" if v in starts else b"word"
            for v in range(inputs[f"{side}_logits"]["shape"][2])
        ]
        for side in ("student", "teacher")
        for starts in [inputs[f"{side}_boundary_ids"]]
    ]
    ends = (inputs["student_eos_id"], inputs["teacher_eos_id"])
    return PairTables.build(*words, [ends], [ends[0]], [ends[1]])


def settings_of(options: dict[str, Any]) -> dict[str, Any]:
    names = {"fn": "divergence", "merge_gamma": "gamma"}
    return {names.get(key, key): value for key, value in options.items()}


@pytest.mark.parametrize("case", LOSS_CASES)
def test_alm_reproduces_the_authors_numbers(case: dict[str, Any]) -> None:
    inputs, expected = LOSSES["inputs"][case["input"]], case["expected"]
    values, gradient = probe_gradient(
        made("alm", **settings_of(case["options"])),
        side_rows(inputs, "student"),
        side_rows(inputs, "teacher"),
        tables(inputs),
    )
    assert values["alm"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-8)
    assert values["loss"] == values["alm"]
    check_gradient(gradient, expected["grad"], inputs["student_logits"]["shape"])


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{case['debias']}-{case['merge_gamma']}")
        for case in LOSSES["merge_groups"]
    ],
)
def test_alm_merges_as_the_authors_do(case: dict[str, Any]) -> None:
    """Groups only: each one's two log-likelihoods and tokens, below the level of the loss."""
    check_groups(case["input"], case["groups"], debias=case["debias"], gamma=case["merge_gamma"])


@pytest.mark.parametrize("case", LOSS_CASES)
def test_alm_groups_are_the_authors(case: dict[str, Any]) -> None:
    options = settings_of(case["options"])
    check_groups(case["input"], case["expected"]["groups"], **options)


def check_groups(name: str, expected: list[list[list[float]]], **options: Any) -> None:
    inputs = LOSSES["inputs"][name]
    method: Any = made("alm", **options)
    student, teacher = scalars_of(
        method, side_rows(inputs, "student"), side_rows(inputs, "teacher"), tables(inputs)
    )
    groups = method._groups(student.rows, teacher)
    columns = [method._likelihoods(teacher, groups, 1), method._likelihoods(student, groups, 0)]
    found = torch.stack([*columns, groups.tokens], 1)
    torch.testing.assert_close(
        found,
        torch.tensor([*itertools.chain(*expected)], dtype=torch.float64),
        rtol=1e-5,
        atol=1e-8,
    )


def scalars_of(
    method: Method, student: Rows, teacher: Rows, pair: PairTables
) -> tuple[Scalars, Scalars]:
    return (
        Scalars(method.scalars(student, "student", pair, {}), bare(student)),
        Scalars(method.scalars(teacher, "teacher", pair, {}), bare(teacher)),
    )


def state_rows(inputs: dict[str, Any], side: str) -> Rows:
    """A row for *every* token, the first one too, and the row after the last: the state that the
    golden file gives for a token is the one that has read it, so it belongs to the next row."""
    hidden = closed_form(inputs[f"{side}_hidden"])
    documents, length, _ = hidden.shape
    chunk = torch.tensor(inputs[f"{side}_token_chunk"])
    starts = torch.tensor([0, *(chunk.amax(1) + 1).cumsum(0)[:-1].tolist()])[:, None]
    chunk = torch.nn.functional.pad(torch.where(chunk >= 0, chunk + starts, -1), (0, 1), value=-1)
    token = torch.where(chunk >= 0, 0, -1).flatten()
    place = torch.arange(length + 1).repeat(documents)
    return Rows(
        logits=torch.zeros(len(token), 2),
        token=token,
        chunk=chunk.flatten(),
        supervised=token >= 0,
        document=torch.arange(documents).repeat_interleave(length + 1),
        byte_start=place,
        byte_end=place + 1,
        hidden=torch.nn.functional.pad(hidden, (0, 0, 1, 0)).flatten(0, 1),
    )


@pytest.mark.parametrize("case", LATENT_CASES)
def test_alm_state_term_reproduces_the_authors_numbers(case: dict[str, Any]) -> None:
    inputs, options, expected = LATENTS["inputs"][case["input"]], case["options"], case["expected"]
    student, teacher = (state_rows(inputs, side) for side in ("student", "teacher"))
    chosen = {"hidden_weight": 1.0, "hidden_distance": options["normalization"]}
    pair = PairTables.build([b" ", b"a"], [b" ", b"a"])
    weights = {}
    if options["project"]:
        chosen["hidden_projection"] = "always"
        kernel = closed_form(options["projector_kernel"] | shape3(options["projector_kernel"]))[0]
        bias = closed_form(options["projector_bias"] | shape3(options["projector_bias"]))[0, 0]
        weights = {"projection.weight": kernel.T, "projection.bias": bias}
    found = probe(made("alm", **chosen), student, teacher, pair, weights=weights or None)
    assert found["hidden"] == pytest.approx(expected["loss"], rel=1e-5)
    gradient = state_gradient(made("alm", **chosen), student, teacher, pair, weights)
    documents, length, width = inputs["student_hidden"]["shape"]
    moved = gradient.reshape(documents, length + 1, width)[:, 1:]
    check_gradient(moved.numpy(), expected["grad_student_hidden"], [documents, length, width])


def shape3(spec: dict[str, Any]) -> dict[str, Any]:
    return {"shape": [1, *spec["shape"]]}


def state_gradient(
    method: Method, student: Rows, teacher: Rows, pair: PairTables, weights: dict[str, Tensor]
) -> Tensor:
    """Of the state term with respect to the student's states."""
    assert student.hidden is not None
    leaf = student.hidden.clone().requires_grad_()
    modules = {}
    if weights:
        width = leaf.shape[1]
        modules["projection"] = torch.nn.Linear(width, width)
        state = {name.partition(".")[2]: value for name, value in weights.items()}
        modules["projection"].load_state_dict(state)
    block = Case(replace(student, hidden=leaf), teacher, pair, []).block
    (gradient,) = torch.autograd.grad(mean(method.terms(block, modules)["hidden"]), leaf)
    return gradient


# --- a slow restatement ---------------------------------------------------------------------------


def slow_alm(case: Case, gamma: float | None, debias: str, tau: float) -> tuple[float, int]:
    """The binary cross-entropy of a batch, chunk by chunk in float64, and the number of groups."""
    losses: list[float] = []
    both = sides(case)
    scores = [rows.scores().double().log_softmax(-1).tolist() for rows in both]
    for chunks in case.chunks:
        likelihoods = [0.0, 0.0]
        for index, rows in enumerate(chunks):
            after = [row_after(side, own) for side, own in zip(both, rows, strict=True)]
            known = None not in after
            debiasing = [0.0, 0.0]
            for k, side in enumerate(both):
                likelihoods[k] += sum(scores[k][r][int(side.token[r])] for r in rows[k])
                if known and debias != "none":
                    ids = boundary_ids(case, k) if debias == "boundary" else [END]
                    debiasing[k] = math.log(mass(scores[k], after[k], ids))
            ids = [END] if debias == "eos" else boundary_ids(case, 1)
            closes = mass(scores[1], after[1], ids) > (gamma or 0.0)
            if gamma is None or not known or closes or index == len(chunks) - 1:
                q, p = (
                    (value + extra) / tau - 1e-6
                    for value, extra in zip(likelihoods, debiasing, strict=True)
                )
                ce = -(math.exp(p) * q + (1 - math.exp(p)) * math.log(1 - math.exp(q)))
                losses.append(ce)
                likelihoods = [0.0, 0.0]
    return sum(losses) / max(len(losses), 1), len(losses)


def sides(case: Case) -> tuple[Rows, Rows]:
    return case.student, case.teacher


def row_after(rows: Rows, inside: list[int]) -> int | None:
    r = inside[-1] + 1
    return r if r < len(rows.token) and rows.document[r] == rows.document[r - 1] else None


def boundary_ids(case: Case, side: int) -> list[int]:
    words = (case.pair.student_vocabulary, case.pair.teacher_vocabulary)[side]
    specials = (case.pair.student_special, case.pair.teacher_special)[side]
    return [v for v, word in enumerate(words) if v in specials or word[:1] in (b" ", b"\n", b"\t")]


def mass(scores: list[list[float]], row: int | None, ids: list[int]) -> float:
    return 1.0 if row is None else sum(math.exp(scores[row][v]) for v in ids)


@settings(max_examples=30, deadline=None)
@given(
    text_cases(),
    st.sampled_from([None, 0.1, 0.5]),
    st.sampled_from(["boundary", "eos", "none"]),
    st.sampled_from([1.0, 100.0]),
)
def test_alm_is_its_formula(case: Case, gamma: float | None, debias: str, tau: float) -> None:
    options = {"gamma": gamma, "debias": debias, "tau": tau}
    method = made("alm", **options)
    found = probe(method, case.student, case.teacher, case.pair)
    expected, groups = slow_alm(case, gamma, debias, tau)
    assert found["alm"] == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert int(method.terms(case.block, {})["alm"].count) == groups


# --- what must change nothing ---------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"gamma": None, "debias": "eos", "chunk_weight": "tokens", "normalizer": "tokens"},
    {"divergence": "tvd", "tau": 5.0, "hidden_weight": 0.5, "hidden_distance": "l1"},
]
WIDTH = 3


def projection(method: Method) -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    return {"projection": torch.nn.Linear(WIDTH, WIDTH)} if method.needs.hidden else {}


def values(method: Method, case: Case) -> dict[str, float]:
    return {
        name: float(mean(term).detach())
        for name, term in method.terms(case.block, projection(method)).items()
    }


@settings(max_examples=15, deadline=None)
@given(text_cases(width=WIDTH), st.sampled_from(OPTIONS))
def test_order_ids_and_padding_change_nothing(case: Case, options: dict[str, Any]) -> None:
    method = made("alm", **options)
    expected = values(method, case)
    for other in (reversed_documents(case), with_specials(renumbered(case), case), padded(case)):
        assert values(method, other) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def with_specials(case: Case, original: Case) -> Case:
    """`renumbered` leaves the lists of specials out; the end tokens tell the new ids."""
    words = case.pair.teacher_vocabulary
    specials = [v for v, word in enumerate(words) if not word]
    pair = replace(
        case.pair, student_special=original.pair.student_special, teacher_special=tuple(specials)
    )
    return replace(case, pair=pair)


def padded(case: Case) -> Case:
    """Rows that are no one's, after all others."""
    moved = []
    for rows in sides(case):
        assert rows.hidden is not None
        extra = {
            "logits": torch.full((2, rows.scores().shape[1]), 9.0),
            "token": torch.tensor([-1, -1]),
            "chunk": torch.tensor([-1, -1]),
            "supervised": torch.zeros(2).bool(),
            "document": torch.full((2,), len(case.chunks)),
            "byte_start": torch.zeros(2).long(),
            "byte_end": torch.zeros(2).long(),
            "hidden": torch.full((2, rows.hidden.shape[1]), 9.0),
        }
        moved.append(
            Rows(**{key: torch.cat([getattr(rows, key), value]) for key, value in extra.items()})
        )
    return replace(case, student=moved[0], teacher=moved[1])


@pytest.mark.parametrize("options", OPTIONS)
@settings(max_examples=8, deadline=None)
@given(case=text_cases(width=WIDTH, least=2), block_rows=st.integers(1, 7))
def test_a_streamed_step_has_the_same_loss_and_gradient(
    options: dict[str, Any], case: Case, block_rows: int
) -> None:
    """What a harness does: scalars block by block without gradient, two batches of whole documents,
    totals over both, `combine`, and the head once more per block with the scalars' gradient."""
    method = made("alm", ce_weight=0.3, **options)
    modules = projection(method)
    leaf = case.student.scores().clone().requires_grad_()
    terms = method.terms(replace(case.block, student=replace(case.student, logits=leaf)), modules)
    weights = method.weights()
    loss = sum(weights[name] * mean(term) for name, term in terms.items())
    loss = loss + 0.3 * mean(cross_entropy(replace(case.student, logits=leaf)))
    inputs = [leaf, *(p for module in modules.values() for p in module.parameters())]
    expected = torch.autograd.grad(loss, inputs, allow_unused=True)
    found_loss, found = streamed(method, case, modules, inputs, block_rows)
    assert found_loss == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-8)
    for gradient, other in zip(found, expected, strict=True):
        wanted = torch.zeros_like(gradient) if other is None else other
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)


def streamed(
    method: Method,
    case: Case,
    modules: dict[str, torch.nn.Module],
    inputs: list[Tensor],
    block_rows: int,
) -> tuple[float, list[Tensor]]:
    parts = [one_batch(case, d) for d in ([0], list(range(1, len(case.chunks))))]
    gathered = [
        [
            torch.cat(
                [
                    method.scalars(piece(rows, span), name, case.pair, modules).detach()
                    for span in torch.arange(len(rows.token)).split(block_rows)
                ]
            )
            for rows, name in zip(part, ("student", "teacher"), strict=True)
        ]
        for part in parts
        if len(part[0].token)
    ]
    parts = [part for part in parts if len(part[0].token)]
    teachers = [
        Scalars(found[1], bare(part[1])) for part, found in zip(parts, gathered, strict=True)
    ]
    totals: dict[str, Tensor] = {}
    for part, teacher in zip(parts, teachers, strict=True):
        for name, value in method.totals(bare(part[0]), teacher).items():
            totals[name] = totals.get(name, 0) + value
    loss, gradients = 0.0, [torch.zeros_like(value) for value in inputs]
    supervised = float(case.student.supervised.sum())
    for part, teacher, found in zip(parts, teachers, gathered, strict=True):
        value = found[0].requires_grad_()
        terms = method.combine(Scalars(value, bare(part[0])), teacher, totals)
        share = sum(
            method.weights()[name] * term.total / totals[name].clamp(min=1)
            for name, term in terms.items()
        )
        loss += float(share.detach())
        (signal,) = torch.autograd.grad(share, value)
        for span in torch.arange(len(value)).split(block_rows):
            rows = piece(part[0], span)
            place = rows.byte_start  # where the row lies in the whole batch
            rows = replace(rows, logits=inputs[0][place])
            again = method.scalars(rows, "student", case.pair, modules)
            ce = 0.3 * cross_entropy(rows).total / supervised if supervised else 0.0
            loss += float(ce.detach()) if supervised else 0.0
            taken = torch.autograd.grad(
                (again * signal[span]).sum() + ce, inputs, allow_unused=True
            )
            for total, gradient in zip(gradients, taken, strict=True):
                if gradient is not None:
                    total.add_(gradient)
    return loss, gradients


def one_batch(case: Case, documents: list[int]) -> tuple[Rows, Rows]:
    """These documents alone, chunks from 0; `byte_start` says where a row came from."""
    found = []
    for rows in sides(case):
        index = torch.nonzero(torch.isin(rows.document, torch.tensor(documents)))[:, 0]
        taken = replace(piece(rows, index), byte_start=index)
        first = sum(len(case.chunks[d]) for d in range(min(documents, default=0)))
        found.append(replace(taken, chunk=torch.where(taken.chunk >= 0, taken.chunk - first, -1)))
    return found[0], found[1]


def piece(rows: Rows, index: Tensor) -> Rows:
    return Rows(**{k: None if v is None else v[index] for k, v in vars(rows).items()})


# --- edges ----------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(text_cases(one_tokenizer=True), st.sampled_from(["reverse_binary_kl", "tvd", "abs"]))
def test_a_student_that_is_the_teacher_has_no_loss(case: Case, divergence: str) -> None:
    twin = replace(case.teacher, logits=case.student.logits)
    method = made("alm", divergence=divergence, tau=2.0)
    values, gradient = probe_gradient(method, case.student, twin, case.pair)
    assert values["alm"] == pytest.approx(0, abs=1e-9)
    if divergence == "reverse_binary_kl":
        assert np.abs(gradient).max() < 1e-6
    _, gradient = probe_gradient(made("alm"), case.student, twin, case.pair)
    assert np.abs(gradient).max() < 1e-6  # at the floor, which is the teacher's entropy


def long_document(length: int, chunks: bool = True) -> tuple[Rows, Rows, PairTables]:
    """Words without any boundary before the end, as in Chinese."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = [b"", b" a", b"b", b"c"]
    place = torch.arange(length)
    logits = torch.randn(length, 4, generator=generator) - torch.tensor([9.0, 9.0, 0.0, 0.0])
    student = Rows(
        logits=logits,
        token=torch.full((length,), 2),
        chunk=place if chunks else torch.full((length,), -1),
        supervised=place >= 0,
        document=torch.zeros(length).long(),
        byte_start=place,
        byte_end=place + 1,
    )
    teacher = replace(student, logits=torch.roll(logits, 1, 0))
    return student, teacher, PairTables.build(vocabulary, vocabulary, [(0, 0)], [0], [0])


def test_a_document_without_boundaries_is_one_chunk() -> None:
    student, teacher, pair = long_document(3000)
    method = made("alm")
    block = Case(student, teacher, pair, []).block
    assert int(method.terms(block, {})["alm"].count) == 1
    for options in ({}, {"tau": 1.0}, {"debias": "none"}, {"divergence": "reverse_binary_kl"}):
        values, gradient = probe_gradient(made("alm", **options), student, teacher, pair)
        assert math.isfinite(values["alm"])
        assert np.isfinite(gradient).all()
    half = [replace(rows, logits=rows.scores().bfloat16()) for rows in (student, teacher)]
    assert math.isfinite(probe(made("alm"), *half, pair)["alm"])


@pytest.mark.parametrize("options", OPTIONS)
def test_a_batch_without_chunks_has_no_loss(options: dict[str, Any]) -> None:
    student, teacher, pair = long_document(4, chunks=False)
    hidden = torch.ones(4, WIDTH)
    student, teacher = (replace(rows, hidden=hidden) for rows in (student, teacher))
    for size in (4, 0):
        sized = [piece(rows, torch.arange(size)) for rows in (student, teacher)]
        found = probe(made("alm", **options), *sized, pair)
        assert found["alm"] == 0
        assert found.get("hidden", 0.0) == 0
    single = [replace(rows, chunk=torch.tensor([-1, 0, -1, -1])) for rows in (student, teacher)]
    assert math.isfinite(probe(made("alm", **options), *single, pair)["loss"])


def test_nothing_loops_over_chunks_or_documents() -> None:
    nodes = []
    for count in (3, 30):
        student, teacher, pair = long_document(count)
        block, _ = with_gradient(Case(student, teacher, pair, []))
        nodes.append(graph_size(made("alm").terms(block, {})["alm"].total))
    assert nodes[0] == nodes[1]


def test_a_vocabulary_without_boundaries_is_finite() -> None:
    student, teacher, pair = long_document(5)
    bare_pair = PairTables.build([b"x", b"a", b"b", b"c"], pair.teacher_vocabulary)
    values, gradient = probe_gradient(made("alm"), student, teacher, bare_pair)
    assert math.isfinite(values["alm"])
    assert np.isfinite(gradient).all()


def test_eos_debiasing_needs_end_tokens() -> None:
    student, teacher, _ = long_document(3)
    words = [b"", b"a", b"b", b"c"]
    only_a_start = PairTables.build(words, words, [(0, 0)], [0], [0], ends_first=False)
    for pair in (PairTables.build(words, words), only_a_start):
        with pytest.raises(UserError, match="end token"):
            probe("alm", student, teacher, pair, debias="eos")


def test_a_side_without_end_token_has_no_end_pair() -> None:
    """The harness' tables: what stands first then is the pair of another role."""
    sides = llama_side("student"), llama_side("teacher")
    found = pair_tables(*sides)
    assert found.end_pair == (sides[0].specials.eos, sides[1].specials.eos)
    endless = replace(sides[1], specials=replace(sides[1].specials, eos=None))
    for pair in (pair_tables(sides[0], endless), pair_tables(endless, sides[0])):
        assert pair.special_pairs
        assert pair.end_pair is None
