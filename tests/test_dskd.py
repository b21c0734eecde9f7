"""`dskd` against the authors' numbers and its formula, and what must change nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from ctdbench_methods.dskd import DSKD, DSKDOptions
from golden_rows import check_gradient, closed_form, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from random_texts import graph_size
from torch import Tensor, nn

from ctdbench.errors import UserError
from ctdbench.method import Block, PairInfo, PairTables, Rows, probe, probe_gradient

TERMS = ("t2s_ce", "t2s_kd", "s2t_kd")
WIDTHS, COLUMNS = (4, 6), (5, 7)
PAIR = PairTables.build([b""] * COLUMNS[0], [b""] * COLUMNS[1])
GOLDEN = golden("dskd")
PER_ROW, TABLES = ("logits", "hidden"), ("embedding", "head")
Tensors = dict[str, Tensor]
Blocks = list[tuple[Rows, Rows]]


@dataclass(frozen=True)
class Case:
    """Rows of both sides, unscored ones among them, and the projectors' weights."""

    student: Rows
    teacher: Rows
    weights: Tensors

    @property
    def scored(self) -> list[Tensor]:
        """Places of the scored rows on both sides."""
        sides = (self.student, self.teacher)
        return [torch.nonzero(rows.supervised & (rows.token >= 0))[:, 0] for rows in sides]


def dskd(**options: Any) -> DSKD:
    return DSKD(DSKDOptions(**options))


def computed(
    case: Case,
    view: Callable[[Rows, Rows], Blocks] = lambda student, teacher: [(student, teacher)],
    sums: Tensor | None = None,
    method: DSKD | None = None,
) -> Tensors:
    """Totals over the blocks that `view` makes of the rows, their count, and the gradients of the
    totals' sum for the student's rows as they were and for the projectors.

    sums: what `prepare` gave, if not for the case's rows as they were.
    """
    method = method or dskd()
    modules = projectors(method, case.weights)
    rows = {name: getattr(case.student, name).clone().requires_grad_() for name in PER_ROW}
    sums = method.prepare(case.teacher) if sums is None else sums
    found = [
        method.terms(block_of(student, teacher, sums), dict(modules.items()))
        for student, teacher in view(replace(case.student, **rows), case.teacher)
    ]
    totals = {name: torch.stack([terms[name].total for terms in found]).sum() for name in TERMS}
    (count,) = {sum(int(terms[name].count) for terms in found) for name in TERMS}
    return with_gradients(totals, count, rows | dict(modules.named_parameters()))


def with_gradients(totals: Tensors, count: int, leaves: Tensors) -> Tensors:
    loss = torch.stack(list(totals.values())).sum()
    taken = torch.autograd.grad(loss, list(leaves.values()))
    values = {name: total.detach() for name, total in totals.items()}
    return values | dict(zip(leaves, taken, strict=True)) | {"count": torch.tensor(count)}


def each(change: Callable[[Rows, int], Rows]) -> Callable[[Rows, Rows], Blocks]:
    """One block, of what `change` makes of side 0, the student's, and of side 1."""
    return lambda student, teacher: [(change(student, 0), change(teacher, 1))]


def projectors(method: DSKD, weights: Tensors) -> nn.ModuleDict:
    own, taught = (len(weights[f"{name}.bias"]) for name in ("t2s", "s2t"))
    made = method.modules(PairInfo(own, taught, PAIR))
    modules = nn.ModuleDict({name: extra.module for name, extra in made.items()})
    modules.load_state_dict(weights)
    return modules


def block_of(student: Rows, teacher: Rows, sums: Tensor) -> Block:
    return Block(student, teacher, 0, torch.zeros(0).long(), None, None, PAIR, sums)


def rows_of(token: Tensor, supervised: Tensor, document: Tensor, **others: Tensor) -> Rows:
    """Rows without bytes and chunks, which `dskd` does not read."""
    nothing = torch.full_like(token, -1)
    parts = {"chunk": nothing, "byte_start": nothing, "byte_end": nothing, **others}
    return Rows(token=token, supervised=supervised, document=document, **parts)


def same(found: Tensors, expected: Tensors) -> None:
    """Equal but for the rounding of float32."""
    assert set(found) == set(expected)
    for name, value in found.items():
        other = expected[name].to(value.dtype)
        rounding = 2e-5 * (1 + float(other.norm())) if value.is_floating_point() else 0
        torch.testing.assert_close(value, other, rtol=1e-4, atol=rounding)


# --- the authors' numbers -------------------------------------------------------------------------


def golden_case(inputs: dict[str, Any]) -> Case:
    weights = {}
    for name, parts in inputs["projectors"].items():
        weights[f"{name}.weight"] = plane(parts["weight"])
        weights[f"{name}.bias"] = plane(parts["bias"])[0]
    return Case(golden_side(inputs, "student"), golden_side(inputs, "teacher"), weights)


def golden_side(inputs: dict[str, Any], side: str) -> Rows:
    logits, hidden = (closed_form(inputs[f"{side}_{name}"]) for name in PER_ROW)
    documents, length, _ = logits.shape
    label = torch.tensor(inputs[f"{side}_labels"]).flatten()
    return rows_of(
        label.clamp(min=-1),
        label != -100,
        torch.arange(documents).repeat_interleave(length),
        logits=logits.flatten(0, 1),
        hidden=hidden.flatten(0, 1),
        input=torch.tensor(inputs[f"{side}_input_ids"]).flatten(),
        embedding=plane(inputs[f"{side}_embedding"]),
        head=plane(inputs[f"{side}_lm_head"]),
    )


def plane(spec: dict[str, Any]) -> Tensor:
    return closed_form({**spec, "shape": [1, *spec["shape"]]})[0]


@pytest.mark.parametrize("given", [pytest.param(c, id=c["name"]) for c in GOLDEN["cases"]])
def test_dskd_reproduces_the_authors_numbers(given: dict[str, Any]) -> None:
    inputs, chosen, expected = GOLDEN["inputs"][given["input"]], given["options"], given["expected"]
    case = golden_case(inputs)
    rates = {"ce_weight": 1 - chosen["kd_rate"], "kd_weight": chosen["kd_rate"]}
    options = rates | {name: chosen[name] for name in ("kd_temperature", "teacher_temperature")}
    count = int(case.student.supervised.sum())
    scale = count / chosen["batch_denom"]
    values, gradient = probe_gradient(
        "dskd", case.student, case.teacher, PAIR, weights=case.weights, **options
    )
    for name in ("ce", *TERMS):
        assert values[name] * count == pytest.approx(expected[name], rel=1e-5)
    assert values["loss"] * scale == pytest.approx(expected["total"], rel=1e-5)
    shape = inputs["student_logits"]["shape"]
    check_gradient(gradient * scale, expected["grad_student_logits"], shape)
    found = computed(case, method=dskd(**options))
    for name in ("hidden", *case.weights):
        numbers = expected["grad_" + name.replace("hidden", "student_hidden").replace(".", "_")]
        shape = [*np.shape(numbers["row_l2"]), found[name].shape[-1]]
        rate = chosen["kd_rate"] / chosen["batch_denom"]
        check_gradient(found[name].numpy() * rate, numbers, shape)


# --- the formula ----------------------------------------------------------------------------------


def case_of(sizes: Sequence[tuple[int, int]], seed: int = 0, scored: float = 1.0) -> Case:
    """Documents of these numbers of rows; this share of the rows is scored."""
    generator, (own, taught) = torch.Generator().manual_seed(seed), WIDTHS
    sides = [random_rows([pair[k] for pair in sizes], k, scored, generator) for k in (0, 1)]
    shapes = {"query": (2 * taught, 2 * own), "t2s": (own, taught), "s2t": (taught, own)}
    weights = {}
    for name, shape in shapes.items():
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator)
        weights[f"{name}.bias"] = torch.randn(shape[0], generator=generator)
    return Case(sides[0], sides[1], weights)


def random_rows(lengths: list[int], side: int, scored: float, random: torch.Generator) -> Rows:
    """Rows that are not scored are unsupervised, or have no token."""
    count, columns, width = sum(lengths), COLUMNS[side], WIDTHS[side]
    kept, told = (torch.rand(count, generator=random) < share for share in (scored, 0.5))
    token, before = (torch.randint(columns, (count,), generator=random) for _ in range(2))
    return rows_of(
        torch.where(kept | ~told, token, -1),
        kept | told,
        torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths).long()),
        logits=2 * torch.randn(count, columns, generator=random),
        hidden=3 + torch.randn(count, width, generator=random),
        input=before,
        embedding=torch.randn(columns, width, generator=random),
        head=torch.randn(columns, width, generator=random),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count = st.integers(0, 5)
    sizes = draw(st.lists(st.tuples(count, count), min_size=1, max_size=3))
    return case_of(sizes, draw(st.integers(0, 9999)), draw(st.sampled_from([0.5, 0.8, 1.0])))


def slow_embeddings(rows: Rows, scored: list[int]) -> Tensor:
    """[R, 2 d] float64, row by row; id 0 where the row is not scored."""
    pairs = zip(rows.inputs().tolist(), rows.token.tolist(), strict=True)
    ids = [pair if r in scored else (0, 0) for r, pair in enumerate(pairs)]
    assert rows.embedding is not None
    return rows.embedding.double()[torch.tensor(ids).long().reshape(-1, 2)].flatten(1)


def over_deviation(values: Tensor) -> Tensor:
    varies = values.numel() > 1 and bool(values.std() > 1e-9)
    return values / values.std() if varies else values


def slow_totals(case: Case, leaves: Tensors, chosen: DSKDOptions) -> Tensors:
    """Document by document, its rows one by one, in float64, differentiable in the leaves."""
    places, sides, tau = case.scored, (case.student, case.teacher), chosen.kd_temperature
    own, taught = map(slow_embeddings, sides, (index.tolist() for index in places))
    head, hidden = ([getattr(rows, name).double() for rows in sides] for name in ("head", "hidden"))
    keys, labels = over_deviation(taught), over_deviation(taught[:, WIDTHS[1] :])
    values = over_deviation(hidden[1]) + labels
    nothing = torch.stack([leaf.sum() for leaf in leaves.values()]).sum() * 0
    totals = {name: [nothing] for name in TERMS}

    def mapped(name: str, vectors: Tensor) -> Tensor:
        return vectors @ leaves[f"{name}.weight"].T + leaves[f"{name}.bias"]

    for document in range(3):
        r, t = (p[rows.document[p] == document] for p, rows in zip(places, sides, strict=True))
        if not (len(r) and len(t)):
            continue
        score = mapped("query", own[r]) @ keys[t].T / math.sqrt(2 * WIDTHS[1])
        t2s = score.softmax(1) @ mapped("t2s", values[t]) @ head[0].T
        s2t = score.T.softmax(1) @ mapped("s2t", leaves["hidden"][r]) @ head[1].T
        for row, read in zip(r.tolist(), t2s, strict=True):
            label = int(case.student.token[row])
            totals["t2s_ce"].append(-read.log_softmax(0)[label])
            if int(read.argmax()) == label:
                target = read.detach() / tau / chosen.teacher_temperature
                totals["t2s_kd"].append(slow_kl(target, leaves["logits"][row] / tau))
        for row, read in zip(t.tolist(), s2t, strict=True):
            target = case.teacher.scores()[row].double() / tau
            totals["s2t_kd"].append(slow_kl(target, read / tau))
    return {name: torch.stack(parts).sum() for name, parts in totals.items()}


def slow_kl(target: Tensor, logits: Tensor) -> Tensor:
    p, q = target.softmax(0), logits.softmax(0)
    return (p * (p / q).log()).sum()


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from([1.0, 2.0]), st.sampled_from([1.0, 0.5]))
def test_dskd_is_its_formula(case: Case, temperature: float, teacher_temperature: float) -> None:
    """Values, and gradients with respect to logits, states and projectors."""
    method = dskd(kd_temperature=temperature, teacher_temperature=teacher_temperature)
    inputs = {name: getattr(case.student, name) for name in PER_ROW} | case.weights
    leaves = {name: value.double().requires_grad_() for name, value in inputs.items()}
    totals = slow_totals(case, leaves, method.options)
    expected = with_gradients(totals, len(case.scored[0]), leaves)
    same(computed(case, method=method), expected)


def test_the_loss_is_half_ce_and_half_the_terms() -> None:
    case = case_of([(5, 4), (3, 4)])
    found = probe("dskd", case.student, case.teacher, PAIR, weights=case.weights)
    assert found["loss"] == pytest.approx(sum(found[name] for name in ("ce", *TERMS)) / 2)
    assert (dskd().options.kd_temperature, dskd().options.teacher_temperature) == (2, 1)
    made = dskd().modules(PairInfo(WIDTHS[0], WIDTHS[1], PAIR)).values()
    assert {extra.learning_rate for extra in made} == {1e-3}


# --- what changes nothing -------------------------------------------------------------------------


def picked(rows: Rows, index: Tensor) -> Rows:
    """Some of the rows, in this order, with the whole tables."""
    values = {field.name: getattr(rows, field.name) for field in fields(rows)}
    return Rows(**{name: v if name in TABLES else v[index] for name, v in values.items()})


@settings(max_examples=15, deadline=None)
@given(cases(), st.integers(0, 3))
def test_blocks_add_up_to_the_batch(case: Case, cut: int) -> None:
    """Wherever the documents are cut, with the sums of `prepare` joined."""

    def part(rows: Rows, first: bool) -> Rows:
        return picked(rows, torch.nonzero((rows.document < cut) == first)[:, 0])

    def blocks(student: Rows, teacher: Rows) -> Blocks:
        return [(part(student, first), part(teacher, first)) for first in (True, False)]

    parts = [dskd().prepare(part(case.teacher, first)) for first in (True, False)]
    same(computed(case, blocks, torch.stack(parts).sum(0)), computed(case))


@settings(max_examples=15, deadline=None)
@given(cases(), st.integers(0, 99))
def test_the_order_of_documents_and_the_ids_of_tokens_change_nothing(case: Case, seed: int) -> None:
    """But for id 0, which stands for the tokens of unscored rows in the deviations."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(size - 1, generator=generator) + 1 for size in COLUMNS]

    def renamed(rows: Rows, side: int) -> Rows:
        order = torch.cat([torch.zeros(1).long(), orders[side]])
        place = torch.cat([torch.argsort(order), torch.tensor([-1])])  # the last one for id -1
        ids = {"token": place[rows.token], "input": place[rows.inputs()]}
        tables = {name: getattr(rows, name)[order] for name in TABLES}
        changed = replace(rows, logits=rows.scores()[:, order], **ids, **tables)
        moved = picked(changed, torch.sort(-rows.document, stable=True).indices)
        return replace(moved, document=9 - moved.document)

    sums = dskd().prepare(renamed(case.teacher, 1))
    same(computed(case, each(renamed), sums), computed(case))


@settings(max_examples=15, deadline=None)
@given(cases(), st.sampled_from([-7.0, 1e4]))
def test_unscored_rows_count_in_the_deviations_alone(case: Case, factor: float) -> None:
    """The student's never matter; the teacher's by their states, which only the sums see."""

    def other(rows: Rows, side: int) -> Rows:
        kept = torch.zeros_like(rows.supervised).index_fill(0, case.scored[side], True)
        factors = torch.where(kept, 1, factor)[:, None]
        states = {name: getattr(rows, name) * factors for name in PER_ROW}
        ids = torch.where(kept | (rows.token < 0), rows.token, 2)
        return replace(rows, token=ids, input=torch.where(kept, rows.inputs(), 3), **states)

    sums, expected = dskd().prepare(case.teacher), computed(case)
    same(computed(case, each(lambda rows, k: rows if k else other(rows, k))), expected)
    same(computed(case, each(other), sums), expected)
    same(computed(case, each(lambda rows, k: picked(rows, case.scored[k])), sums), expected)
    changed = dskd().prepare(other(case.teacher, 1))
    torch.testing.assert_close(changed[[0, 2]], sums[[0, 2]])


def test_gradients_reach_the_student_and_the_projectors_alone() -> None:
    case = case_of([(5, 4), (4, 6)])
    modules = projectors(dskd(), case.weights)
    leaves, sides = dict(modules.named_parameters()), []
    for name, rows in (("student", case.student), ("teacher", case.teacher)):
        own = {key: getattr(rows, key).clone().requires_grad_() for key in PER_ROW + TABLES}
        leaves |= {f"{name} {key}": leaf for key, leaf in own.items()}
        sides.append(replace(rows, **own))
    block = block_of(sides[0], sides[1], dskd().prepare(case.teacher))
    terms = dskd().terms(block, dict(modules.items()))
    total = torch.stack([term.total for term in terms.values()]).sum()
    taken = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    reached = {name for name, grad in zip(leaves, taken, strict=True) if grad is not None}
    assert reached == {"student logits", "student hidden", *case.weights}


# --- the edges ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[], [(0, 0)], [(3, 0)], [(0, 3)], [(1, 1)], [(3, 0), (0, 2)]])
@pytest.mark.parametrize("supervised", [False, True])
def test_documents_without_scored_rows_are_finite(sizes: Any, supervised: bool) -> None:
    """And add no loss where one side has none; the count is of the student's alone."""
    case = case_of(sizes)
    view = each(lambda rows, _: replace(rows, supervised=rows.supervised & supervised))
    found = computed(case, view)
    assert all(torch.isfinite(value).all() for value in found.values())
    assert found["count"] == sum(own for own, _ in sizes) * supervised
    if not supervised or (1, 1) not in sizes:
        assert [float(found[name]) for name in TERMS] == [0, 0, 0]


@pytest.mark.parametrize("value", [0.0, 0.1, 0.7])
def test_tensors_that_do_not_vary_are_divided_by_one(value: float) -> None:
    """Even where rounding leaves them some variance, as it does thirteen times 0.1."""
    case = case_of([(4, 13)])
    constant = {"hidden": torch.full((13, 6), value), "embedding": torch.full((7, 6), value)}
    case = replace(case, teacher=replace(case.teacher, **constant))
    unit = torch.tensor([[2.0, 0.0, 1.0]] * 3).double()  # the sums of two numbers, variance 1
    same(computed(case), computed(case, sums=unit))


def test_deviations_survive_a_mean_far_from_zero() -> None:
    """Float32 sums of squares would lose all digits of the variance."""
    case = case_of([(3, 40)])
    assert case.teacher.hidden is not None
    states = 1e4 + case.teacher.hidden
    number, total, squares = dskd().prepare(replace(case.teacher, hidden=states))[1].tolist()
    variance = (squares - total**2 / number) / (number - 1)
    assert math.sqrt(variance) == pytest.approx(float(states.double().std()), rel=1e-6)


@settings(max_examples=10, deadline=None)
@given(cases())
def test_bfloat16_is_finite_and_autocast_changes_nothing(case: Case) -> None:
    def coarse(rows: Rows, _: int) -> Rows:
        return replace(rows, **{name: getattr(rows, name).bfloat16() for name in PER_ROW + TABLES})

    expected, found = computed(case), computed(case, each(coarse))
    assert all(torch.isfinite(value).all() for value in found.values())
    for name in ("t2s_ce", "s2t_kd"):  # which rows t2s predicts right may change
        assert found[name].dtype == torch.float32
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=0.2, abs=0.3)
    method, modules = dskd(), dict(projectors(dskd(), case.weights).items())
    with torch.autocast("cpu", torch.bfloat16):
        sums = method.prepare(case.teacher)
        terms = method.terms(block_of(case.student, case.teacher, sums), modules)
    for name, term in terms.items():
        torch.testing.assert_close(term.total.detach(), expected[name])


@settings(max_examples=10, deadline=None)
@given(cases())
def test_counts_need_no_logits(case: Case) -> None:
    nothing: dict[str, Any] = dict.fromkeys(PER_ROW + TABLES)
    student, teacher = (replace(rows, **nothing) for rows in (case.student, case.teacher))
    counts = dskd().counts(block_of(student, teacher, torch.zeros(3, 3)))
    assert counts is not None
    assert {name: int(n) for name, n in counts.items()} == dict.fromkeys(TERMS, len(case.scored[0]))


def test_without_inputs_the_row_before_tells_what_was_read() -> None:
    """A document's first row has read nothing, which is id 0 too."""

    def told(rows: Rows, _: int) -> Rows:
        first = rows.document != torch.cat([torch.tensor([-1]), rows.document[:-1]])
        return replace(rows, input=torch.where(first, 0, rows.token.roll(1)))

    made = case_of([(4, 5), (3, 2)])
    case = replace(made, teacher=replace(made.teacher, input=None))
    silent = computed(case, each(lambda rows, _: replace(rows, input=None)))
    same(silent, computed(case, each(told), dskd().prepare(told(case.teacher, 1))))


def test_padded_heads_read_out_no_more_than_the_vocabulary() -> None:
    def padded(rows: Rows, _: int) -> Rows:
        return replace(rows, **{name: torch.cat([getattr(rows, name)] * 2) for name in TABLES})

    case = case_of([(4, 3)])
    same(computed(case, each(padded)), computed(case))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_narrower_embeddings_are_a_clear_error(side: str) -> None:
    case = case_of([(3, 3)])
    case = replace(case, **{side: replace(getattr(case, side), embedding=torch.ones(7, 3))})
    with pytest.raises(UserError, match=f"the {side}'s embeddings have 3 channels, its states"):
        probe("dskd", case.student, case.teacher, PAIR, weights=case.weights)


def test_nothing_loops_over_documents() -> None:
    sizes = []
    for documents in (2, 20):
        case = case_of([(4, 5)] * documents)
        modules = dict(projectors(dskd(), case.weights).items())
        sums = dskd().prepare(case.teacher)
        terms = dskd().terms(block_of(case.student, case.teacher, sums), modules)
        sizes.append(graph_size(torch.stack([term.total for term in terms.values()]).sum()))
    assert sizes[0] == sizes[1]
