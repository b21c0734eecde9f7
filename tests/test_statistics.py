"""The statistics against scipy, closed forms and their own invariants."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
from example_outcomes import crossed, documents, outcomes, rows
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from ctdbench.errors import UserError
from ctdbench.evaluate.outcomes import standard_error
from ctdbench.report import statistics
from ctdbench.report.pairing import Outcomes, compare, estimate, pair_outcomes
from ctdbench.report.statistics import Array, Items, Variance, critical, two_way

BITS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)
SPREAD = st.tuples(*[st.sampled_from([0.0, 0.1, 1.0, 10.0])] * 2, st.sampled_from([0.1, 1.0]))
SEEDS = st.integers(0, 2**32 - 1)


def random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


# One seed


@settings(max_examples=50, deadline=None)
@given(pairs=BITS)
def test_mcnemar_is_the_binomial_test_of_the_items_that_differ(pairs: Any) -> None:
    a, b = np.array(pairs, dtype=float).T
    better, worse = int((a > b).sum()), int((a < b).sum())
    wanted = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert statistics.mcnemar(a, b) == pytest.approx(wanted)
    assert statistics.mcnemar(b, a) == statistics.mcnemar(a, b)


@settings(max_examples=50, deadline=None)
@given(pairs=BITS)
def test_interval_of_accuracies_holds_their_difference_and_turns_with_it(pairs: Any) -> None:
    a, b = np.array(pairs, dtype=float).T
    low, high = statistics.accuracy_difference(a, b)
    assert -1 <= low <= a.mean() - b.mean() <= high <= 1
    assert statistics.accuracy_difference(b, a) == pytest.approx((-high, -low))


@pytest.mark.parametrize(("better", "worse"), [(0.1, 0.1), (0.3, 0.1), (0.05, 0.02), (0.5, 0.4)])
def test_interval_of_accuracies_covers_exactly_enumerated_samples(
    better: float, worse: float
) -> None:
    """Every possible table of 30 items with its probability; above 95 % where few differ."""
    size, covered = 30, 0.0
    for n, m in itertools.product(range(size + 1), repeat=2):
        if n + m <= size:
            a = np.repeat([1.0, 0.0, 0.0], [n, m, size - n - m])
            b = np.repeat([0.0, 1.0, 0.0], [n, m, size - n - m])
            low, high = statistics.accuracy_difference(a, b)
            chances = [better, worse, 1 - better - worse]
            weight = stats.multinomial.pmf([n, m, size - n - m], size, chances)
            covered += weight * (low <= better - worse <= high)
    assert covered >= 0.94


@pytest.mark.parametrize(("right", "size"), [(0, 10), (3, 10), (10, 10), (57, 200)])
def test_wilson_is_scipys(right: int, size: int) -> None:
    values = np.arange(size) < right
    interval = stats.binomtest(right, size).proportion_ci(method="wilson")
    assert statistics.wilson(values) == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_amount_of_0_or_1_is_no_accuracy(value: float) -> None:
    """The teacher's divergence from itself is 0 on every document, and certainly so."""
    samples = [{"id": f"{i}", "weight": 1.0, "jsd": value, "acc": value} for i in range(4)]
    jsd, acc = (Outcomes.from_rows("t", name, {0: samples}) for name in ("jsd", "acc"))
    assert acc.is_choice
    assert not jsd.is_choice
    assert estimate(acc).test == "Wilson"
    found = estimate(jsd)
    assert (found.test, found.low, found.high) == ("bootstrap", value, value)
    alone = estimate(Outcomes.from_rows("t", "jsd", {0: samples[:1]}))
    assert (alone.low, alone.high) == (-math.inf, math.inf)


def test_a_macro_average_that_is_all_wrong_is_not_certainly_0() -> None:
    subsets = ["a"] * 10 + ["b"] * 40
    weights = [1 / 20] * 10 + [1 / 80] * 40
    found = estimate(outcomes(np.zeros(50), weights=weights, subsets=subsets))
    effective = 1 / (10 / 20**2 + 40 / 80**2)
    assert effective == pytest.approx(32)
    expected = stats.binomtest(0, 32).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    right = estimate(outcomes(np.ones((3, 50)), weights=weights, subsets=subsets))
    assert right.low == pytest.approx(1 - expected.high)
    assert right.high == pytest.approx(1)


def test_bootstrap_computes_the_ratio_of_what_was_drawn() -> None:
    """Against a plain loop: bits over bytes, each draw studentised by its own standard error."""
    weights, difference = documents(random(0), (12,))
    items, score = Items(weights), float(weights @ difference / weights.sum())
    generator, pivots = random(5), []

    def error(w: Array, x: Array) -> float:
        residual = w * (x - w @ x / w.sum())
        return math.sqrt(residual @ residual * 12 / 11) / w.sum()

    observed = error(weights, difference)
    for picks in generator.integers(0, 12, (999, 12)):
        w, x = weights[picks], difference[picks]
        pivots.append(abs(w @ x / w.sum() - score) / max(error(w, x), 0.2 * observed))
    half = observed * sorted(pivots)[-50]  # floor(5 % of 1,000)
    interval = statistics.bootstrap(difference, items, 999, 5)
    assert interval[:2] == pytest.approx((score - half, score + half))
    reached = sum(pivot * observed >= abs(score) for pivot in pivots)
    student = Variance(float(np.sum(items.deviations(difference) ** 2)), 11).p_value(score)
    assert interval.p == pytest.approx(max((1 + reached) / 1000, student))


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, size=st.integers(2, 30), scale=st.floats(1e-3, 1e3), heavy=st.booleans())
def test_bootstrap_follows_scale_and_sign_and_agrees_with_its_p(
    seed: int, size: int, scale: float, heavy: bool
) -> None:
    weights, a = documents(random(seed), (size,))
    weights = weights if heavy else np.ones(size)
    zero = np.zeros(size)
    plain = statistics.paired_bootstrap(a, zero, weights, draws=200, seed=1)
    scaled = statistics.paired_bootstrap(zero, scale * a, 7 * weights, draws=200, seed=1)
    assert scaled.low == pytest.approx(-scale * plain.high)
    assert scaled.high == pytest.approx(-scale * plain.low)
    assert scaled.p == pytest.approx(plain.p)
    assert (plain.low <= 0 <= plain.high) == (plain.p > 0.05)
    student = Variance(float(np.sum(Items(weights).deviations(a) ** 2)), size - 1)
    assert plain.high - plain.low >= 2 * student.half_width() * (1 - 1e-9)


def test_bootstrap_is_seeded_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, difference = documents(random(1), (50,))
    first = statistics.paired_bootstrap(difference, np.zeros(50), weights, draws=500, seed=3)
    monkeypatch.setattr(statistics, "_CHUNK", 50 * 7)
    again = statistics.paired_bootstrap(difference, np.zeros(50), weights, draws=500, seed=3)
    assert again == pytest.approx(first)
    other = statistics.paired_bootstrap(difference, np.zeros(50), weights, draws=500, seed=4)
    assert other.high != first.high


def test_bootstrap_of_many_plain_values_is_students_interval() -> None:
    values = random(2).standard_normal(2000)
    interval = statistics.bootstrap(values, Items(np.ones(2000)), 4000)
    wanted = stats.ttest_1samp(values, 0).confidence_interval()
    assert interval[:2] == pytest.approx((wanted.low, wanted.high), abs=0.004)


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_documents_that_all_differ_alike_leave_nothing_to_chance(value: float) -> None:
    weights, _ = documents(random(0), (20,))
    interval = statistics.bootstrap(np.full(20, value), Items(weights), 999)
    assert interval[:2] == pytest.approx((value, value))
    assert interval.p == pytest.approx(1 if value == 0 else 0.001)


def test_few_items_that_differ_are_no_evidence_in_a_bootstrap() -> None:
    """Where a draw may hold none of them, the interval stays finite and holds 0."""
    values = np.zeros(60)
    values[:2] = 1
    interval = statistics.bootstrap(values, Items(np.ones(60), [0] * 30 + [1] * 30), 2000)
    assert interval.p > 0.1
    assert -1 < interval.low < 0 < interval.high < 1


def test_one_document_says_nothing() -> None:
    one = outcomes([0.4], weights=[3.0])
    assert estimate(one).low == -math.inf
    assert compare(one, outcomes([0.1], weights=[3.0])).p == 1
    several = outcomes([[0.4], [0.5], [0.7]], weights=[3.0])
    assert compare(several, outcomes([[0.1], [0.2], [0.2]], weights=[3.0])).p == 1


# Items


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, size=st.integers(2, 20))
def test_items_variance_is_the_jackknifes(seed: int, size: int) -> None:
    weights, x = documents(random(seed), (size,))
    kept = ~np.eye(size, dtype=bool)
    left_out = np.array([weights[keep] @ x[keep] / weights[keep].sum() for keep in kept])
    score = weights @ x / weights.sum()
    wanted = (size - 1) / size * np.sum((left_out - score) ** 2)
    assert np.sum(Items(weights).deviations(x) ** 2) == pytest.approx(wanted)


def test_items_variance_is_that_of_the_stored_standard_errors() -> None:
    """Plain means and macro-averages over subsets of different size."""
    values = random(3).random(30)
    names = ["a"] * 10 + ["b"] * 20
    weights = [1 / 20] * 10 + [1 / 40] * 20
    for items, stored in (
        (Items(np.ones(30)), rows(values)),
        (Items(weights, names), rows(values, weight=weights, subset=names)),
    ):
        wanted = standard_error(stored, "acc")
        assert math.sqrt(np.sum(items.deviations(values) ** 2)) == pytest.approx(wanted)


def test_a_subset_of_one_item_is_drawn_with_the_others() -> None:
    items = Items(np.ones(5), ["a", "b", "b", "c", "c"])
    assert len(items.subsets) == 1
    assert items.freedom == 4


# Several seeds


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, spread=SPREAD, shape=st.tuples(st.integers(2, 6), st.integers(2, 30)))
def test_two_way_is_the_analysis_of_variance(
    seed: int, spread: tuple[float, float, float], shape: tuple[int, int]
) -> None:
    values = crossed(random(seed), shape, spread)
    seeds, size = shape
    of_items, of_seeds, mean = values.mean(0), values.mean(1), values.mean()
    rest = values - of_items - of_seeds[:, None] + mean
    parts = two_way([values], Items(np.ones(size)))
    assert parts.items == pytest.approx(of_items.var(ddof=1) / size)
    assert parts.seeds == pytest.approx(of_seeds.var(ddof=1) / seeds)
    square = np.sum(rest**2) / ((seeds - 1) * (size - 1))
    assert parts.interaction == pytest.approx(square / (seeds * size))
    assert (parts.items_freedom, parts.seeds_freedom) == (size - 1, seeds - 1)


def test_variances_are_those_of_the_true_components_on_average() -> None:
    values = crossed(random(0), (4000, 4, 20), (0.7, 0.5, 0.9))
    parts = two_way([values], Items(np.ones(20)))
    total = np.mean(parts.items + parts.seeds - parts.interaction)
    assert total == pytest.approx(0.7**2 / 20 + 0.5**2 / 4 + 0.9**2 / 80, rel=0.03)
    assert total == pytest.approx(values.mean((1, 2)).var(), rel=0.05)


def test_without_spread_of_items_it_is_the_t_test_over_seeds() -> None:
    a, b = random(1).random((2, 5, 1)) + np.zeros((2, 5, 40))
    found = compare(outcomes(a), outcomes(b))
    wanted = stats.ttest_rel(a[:, 0], b[:, 0])
    interval = wanted.confidence_interval()
    assert found.p == pytest.approx(wanted.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.test == "t over documents and seeds, 4 df"
    assert (found.seeds, found.items) == (5, 40)


def test_without_spread_of_seeds_it_is_the_t_test_over_items() -> None:
    a, b = random(1).random((2, 1, 40)) + np.zeros((2, 3, 40))
    found = compare(outcomes(a), outcomes(b))
    wanted = stats.ttest_rel(a[0], b[0])
    assert found.p == pytest.approx(wanted.pvalue)
    assert found.high == pytest.approx(wanted.confidence_interval().high)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, spread=SPREAD, seeds=st.integers(2, 5))
@example(seed=10240, spread=(1.0, 1.0, 1.0), seeds=2)  # p is nearly 1
def test_p_is_the_level_at_which_the_interval_ends_at_0(
    seed: int, spread: tuple[float, float, float], seeds: int
) -> None:
    values = crossed(random(seed), (seeds, 12), spread)
    parts = two_way([values], Items(np.ones(12)))
    score = abs(values.mean())
    p = parts.p_value(score)
    assert parts.half_width(p) <= score <= parts.half_width(p * (1 - 1e-8))
    widths = parts.half_width(np.geomspace(1e-9, 0.999, 40))
    assert (np.diff(widths) <= 0).all()
    assert parts.half_width() >= math.sqrt(parts.items * critical(11)) * (1 - 1e-12)


@pytest.mark.parametrize("freedom", [1, 2, 4, 30, 1000])
def test_critical_values_are_students(freedom: int) -> None:
    alpha = np.array([0.9, 0.05, 1e-3])
    assert critical(freedom, alpha) == pytest.approx(stats.t.isf(alpha / 2, freedom) ** 2)
    assert critical(freedom, 1e-12) == pytest.approx(stats.t.isf(5e-13, freedom) ** 2, rel=1e-6)


# Pairing


def test_documents_are_paired_by_id_whatever_their_order() -> None:
    values = random(0).random((2, 3, 15))
    a, b = (outcomes(v, weights=np.arange(1, 16)) for v in values)
    order = random(1).permutation(15)
    names = tuple(b.ids[i] for i in order)
    mixed = Outcomes("piqa", names, b.values[:, order], Items(np.arange(1, 16)[order]), b.seeds)
    assert compare(a, mixed) == compare(a, b)
    paired = pair_outcomes(a, mixed)[1]
    assert paired.ids == a.ids
    assert np.array_equal(paired.values, b.values)


def test_different_documents_name_the_task() -> None:
    with pytest.raises(UserError, match=r"piqa: .*\(3 and 4, 3 in common\).*limit"):
        compare(outcomes([0, 1, 1]), outcomes([0, 1, 1, 0]))
    with pytest.raises(UserError, match="piqa: the same documents were weighted differently"):
        compare(outcomes([0, 1, 1]), outcomes([0, 1, 1], weights=[1, 2, 1]))


def test_rows_become_outcomes() -> None:
    values = np.array([[0, 1, 1, 0], [1, 1, 0, 0]])
    stored = {7: rows(values[0]), 3: rows(values[1])[::-1]}
    read = Outcomes.from_rows("piqa", "acc", stored)
    assert read.seeds == (7, 3)
    assert np.array_equal(read.values, values)
    assert read.score == 0.5
    assert Outcomes.from_rows("piqa", "acc", {0: rows(values[0])}, trained=False).seeds == ()
    with pytest.raises(UserError, match="piqa: document 1-x of seed 7 has no acc"):
        Outcomes.from_rows("piqa", "acc", {7: rows([0, None, 1])})
    with pytest.raises(UserError, match="piqa: document 0-x of seed 7 has no f1"):
        Outcomes.from_rows("piqa", "f1", stored)


def test_seeds_pair_where_both_have_them() -> None:
    values = crossed(random(0), (2, 3, 20), (1, 1, 1))
    a, b = outcomes(values[0]), outcomes(values[1])
    turned = outcomes(values[1][::-1], seeds=(2, 1, 0))
    assert compare(a, turned) == compare(a, b)


def test_seeds_that_differ_count_as_independent() -> None:
    values = crossed(random(0), (2, 4, 20), (0, 1, 0))
    values += np.zeros(20)
    a, b = outcomes(values[0]), outcomes(values[1][:3], seeds=(4, 5, 6))
    found = compare(a, b)
    means = values[0, :, 0], values[1, :3, 0]
    error = math.sqrt(means[0].var(ddof=1) / 4 + means[1].var(ddof=1) / 3)
    difference = means[0].mean() - means[1].mean()
    assert found.difference == pytest.approx(difference)
    assert found.p == pytest.approx(stats.ttest_ind(*means, equal_var=False).pvalue)
    assert found.high - found.difference > 2 * error
    assert found.seeds == 3


def test_a_single_seed_is_compared_with_the_same_seed() -> None:
    values = random(0).integers(0, 2, (3, 30)).astype(float)
    other = random(1).integers(0, 2, 30).astype(float)
    found = compare(outcomes(values), outcomes(other, seeds=(2,)))
    assert found.test == "exact McNemar"
    assert found.seeds == 1
    assert found.p == statistics.mcnemar(values[2], other)
    assert found.difference == pytest.approx(values[2].mean() - other.mean())
    elsewhere = compare(outcomes(values), outcomes(other, seeds=(9,)))
    assert elsewhere.p == statistics.mcnemar(values[0], other)


def test_a_model_that_was_not_trained_goes_with_every_seed() -> None:
    values = random(0).random((3, 30))
    start = outcomes(random(1).random(30), seeds=())
    found = compare(outcomes(values), start)
    parts = two_way([values - start.values], start.items)
    assert found.high - found.low == pytest.approx(2 * parts.half_width())
    assert found.seeds == 3
    assert compare(start, start).seeds == 0
    assert compare(start, start).p == 1


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, seeds=st.integers(1, 4), kind=st.sampled_from(["0/1", "mean", "bytes"]))
def test_a_comparison_turns_around(seed: int, seeds: int, kind: str) -> None:
    generator = random(seed)
    weights = generator.random(15) + 0.1 if kind == "bytes" else np.ones(15)
    values = generator.random((2, seeds, 15))
    values = values.round() if kind == "0/1" else values
    a, b = (outcomes(v, weights=weights) for v in values)
    quick = partial(statistics.bootstrap, draws=300)
    one, other = compare(a, b, bootstrap=quick), compare(b, a, bootstrap=quick)
    assert other.difference == pytest.approx(-one.difference)
    assert (other.low, other.high) == pytest.approx((-one.high, -one.low))
    assert other.p == pytest.approx(one.p)
    assert one.points == 100 * one.difference
    assert one.low <= one.difference <= one.high
    several = f"t over documents and seeds, {seeds - 1} df"
    names = {"0/1": "exact McNemar", "mean": "paired bootstrap", "bytes": "paired bootstrap"}
    assert one.test == (several if seeds > 1 else names[kind])


@pytest.mark.parametrize("theirs", [1.0, 0.0])
def test_accuracies_that_differ_alike_everywhere_are_not_certain(theirs: float) -> None:
    """20 items tell no more than 20 items, however many seeds answer them alike."""
    right, others = np.ones((3, 20)), np.full((3, 20), theirs)
    for seeds in ((0, 1, 2), (7, 8, 9)):
        found = compare(outcomes(right), outcomes(others, seeds=seeds))
        assert (found.low, found.high) == statistics.accuracy_difference(right[0], others[0])
        assert found.p == statistics.mcnemar(right[0], others[0])
        assert found.high - found.low > 0.1
        assert found.seeds == 3


def test_estimates_choose_their_interval() -> None:
    generator = random(0)
    bits = generator.integers(0, 2, (4, 50)).astype(float)
    one = estimate(outcomes(bits[0]))
    assert (one.low, one.high) == statistics.wilson(bits[0])
    assert estimate(outcomes(np.zeros((3, 50)))).high > 0.05  # never right is not certainly 0
    weights, x = documents(generator, (50,))
    seeded = partial(statistics.bootstrap, seed=4)
    ratio = estimate(outcomes(x, weights=weights), bootstrap=seeded)
    assert ratio.test == "bootstrap"
    assert (ratio.low, ratio.high) == statistics.bootstrap(x, Items(weights), seed=4)[:2]
    two = estimate(outcomes([[0.0] * 9 + [1.0], [1.0] * 5 + [0.0] * 5]))  # t of one degree
    assert (two.low, two.high) == (0, 1)
    several = estimate(outcomes(bits))
    half = two_way([bits], Items(np.ones(50))).half_width()
    assert several.high - several.value == pytest.approx(half)
    assert (several.seeds, several.items) == (4, 50)
