"""What a table may claim: ties, ranks, chance and the share of the gap, against closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from example_outcomes import crossed, outcomes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ctdbench.errors import UserError
from ctdbench.report.pairing import Outcomes, compare
from ctdbench.report.significance import (
    above_chance,
    gap_closed,
    holm,
    shaffer,
    standings,
)

SEEDS = st.integers(0, 2**32 - 1)


def random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


# Tables


@settings(max_examples=40, deadline=None)
@given(p=st.lists(st.floats(1e-6, 1), min_size=1, max_size=6))
def test_holm_is_closed_testing_with_bonferroni(p: list[float]) -> None:
    """Adjusted p = the largest Bonferroni p of any set of hypotheses that holds this one."""
    sets = [s for n in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), n)]
    wanted = [max(len(s) * min(p[j] for j in s) for s in sets if i in s) for i in range(len(p))]
    assert holm(p) == pytest.approx(np.minimum(1, wanted))


def test_shaffers_factors_are_the_published_ones() -> None:
    """Shaffer 1986: of 4 means 6, 3, 3, 3, 2, 1 pairs; the overall test spares the first step."""
    p = np.array([1e-5, 2e-5, 3e-5, 4e-5, 5e-5, 6e-5])
    assert shaffer(p, 4) / p == pytest.approx([3, 3, 3, 3, 2.4, 2])
    assert shaffer([0.01, 0.02, 0.04], 3) == pytest.approx([0.01, 0.02, 0.04])
    assert shaffer([0.03], 2) == pytest.approx([0.03])


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, count=st.integers(2, 7))
def test_shaffer_is_never_stricter_than_holm_and_keeps_order(seed: int, count: int) -> None:
    p = random(seed).random(count * (count - 1) // 2) ** 4
    sharper = shaffer(p, count)
    assert (sharper <= holm(p) + 1e-15).all()
    assert (sharper >= p - 1e-15).all()
    assert (np.diff(sharper[np.argsort(p)]) >= 0).all()


def table(scores: dict[str, float], seeds: int = 5, spread: float = 0.01) -> dict[str, Outcomes]:
    noise = crossed(random(0), (len(scores), seeds, 200), (0.05, spread, 0.05))
    return {
        label: outcomes(values + score)
        for (label, score), values in zip(scores.items(), noise, strict=True)
    }


def test_rows_fall_into_groups_of_ties() -> None:
    rows = table({"sft": 0.2, "bld": 0.5, "alm": 0.5, "uld": 0.21, "kd": 0.9})
    found = standings({"piqa": rows}, lambda column: False)["piqa"]
    assert [set(group) for group in found.groups] == [{"kd"}, {"bld", "alm"}, {"uld", "sft"}]
    assert found.best == ("kd",)
    assert [found.rank(label) for label in ("kd", "alm", "bld", "sft")] == [1, 2, 2, 4]
    assert found.seeds == 5
    assert found.p["bld", "alm"] == found.p["alm", "bld"] > 0.05
    turned = standings({"bpb": rows}, lambda column: True)["bpb"]
    assert [set(group) for group in turned.groups] == [{"uld", "sft"}, {"bld", "alm"}, {"kd"}]


def test_rows_of_fewer_than_three_seeds_have_no_rank() -> None:
    rows = table({"sft": 0.2, "bld": 0.5})
    rows |= {"one": outcomes(np.ones(200)), "two": outcomes(np.ones((2, 200)))}
    found = standings({"piqa": rows}, lambda column: False)["piqa"]
    assert found.groups == (("bld",), ("sft",))
    assert found.rank("one") is found.rank("two") is None
    assert standings({"piqa": {"sft": rows["sft"], "one": rows["one"]}}, lambda column: False) == {}
    assert standings({}, lambda column: False) == {}


def test_of_two_rows_the_gate_is_their_own_test() -> None:
    rows = table({"sft": 0.2, "bld": 0.23}, spread=0.03)
    found = standings({"piqa": rows}, lambda column: False)["piqa"]
    assert found.gate == pytest.approx(compare(rows["sft"], rows["bld"]).p)
    assert found.p["sft", "bld"] == pytest.approx(found.gate)


def test_the_gate_is_the_clearest_pair_times_the_pairs() -> None:
    """Each pair with its own variance: here documents agree, so Student's t over seeds."""
    means = random(0).random((4, 5)) + np.array([[0.0], [0.0], [0.0], [2.0]])
    rows = {str(i): outcomes(row[:, None] + np.zeros(30)) for i, row in enumerate(means)}
    found = standings({"piqa": rows}, lambda column: False)["piqa"]
    pairs = [stats.ttest_rel(a, b).pvalue for a, b in itertools.combinations(means, 2)]
    assert found.gate == pytest.approx(6 * min(pairs))
    assert found.gate < 1


def test_columns_share_one_table() -> None:
    """A column's gate is adjusted for the others, and opens for it alone."""
    different, equal = table({"sft": 0.2, "bld": 0.5, "alm": 0.5}), table(dict.fromkeys("abc", 0.0))
    alone = standings({1: different}, lambda column: False)[1]
    beside = standings({1: different, 2: equal, 3: equal}, lambda column: False)
    assert beside[1].gate == pytest.approx(3 * alone.gate, rel=1e-3)
    assert set(beside[1].best) == set(alone.best) == {"alm", "bld"}
    assert len(beside[2].groups) == 1


def test_rows_of_other_seeds_or_document_order_share_a_table() -> None:
    rows = table({"sft": 0.2, "bld": 0.5, "alm": 0.5})
    moved = rows["alm"]
    rows["alm"] = outcomes(moved.values[:4], seeds=(5, 6, 7, 8))
    found = standings({"piqa": rows}, lambda column: False)["piqa"]
    assert set(found.best) == {"bld", "alm"}
    assert found.seeds == 4


def test_a_table_of_different_documents_names_the_task() -> None:
    rows = {"a": outcomes(np.ones((3, 4))), "b": outcomes(np.ones((3, 5)))}
    with pytest.raises(UserError, match="piqa"):
        standings({"piqa": rows}, lambda column: False)


# Chance


@pytest.mark.parametrize(("right", "chance"), [(0, 0.25), (13, 0.25), (20, 0.25), (50, 0.5)])
def test_chance_is_the_binomial_test_within_one_seed(right: int, chance: float) -> None:
    values = (np.arange(50) < right).astype(float)
    wanted = stats.binomtest(right, 50, chance, alternative="greater").pvalue
    assert above_chance(outcomes(values), chance) == pytest.approx(wanted)


def test_chance_over_seeds_is_one_sided_and_does_not_pool() -> None:
    """Five seeds of one guess at 50 items are 50 items, not 250."""
    guess = (random(0).random(50) < 0.6).astype(float)
    same = outcomes(np.tile(guess, (5, 1)))
    wanted = stats.ttest_1samp(guess, 0.5, alternative="greater").pvalue
    assert above_chance(same, 0.5) == pytest.approx(wanted)
    assert above_chance(outcomes(1 - same.values), 0.5) == pytest.approx(1 - wanted)
    assert above_chance(same, np.full(50, 0.5)) == pytest.approx(wanted)


def test_chance_may_differ_by_document() -> None:
    generator = random(0)
    chance = generator.choice([0.25, 0.5], 80)
    values = (generator.random(80) < chance).astype(float)
    wanted = stats.ttest_1samp(values - chance, 0, alternative="greater").pvalue
    assert above_chance(outcomes(values), chance) == pytest.approx(wanted)


# Share of the gap


def test_share_of_the_gap_is_fiellers() -> None:
    """Its ends are the shares at which `compare` of the linear combination ends at 0."""
    generator = random(0)
    base, weights = generator.random(60), generator.random(60) + 0.2
    start = outcomes(base, seeds=(), weights=weights)
    teacher = outcomes(base + 0.3 + 0.5 * generator.random(60), seeds=(), weights=weights)
    noise = crossed(generator, (3, 60), (0.1, 0.03, 0.2))
    method = outcomes(base + 0.2 + noise, weights=weights)
    share = gap_closed(method, start, teacher)
    assert share is not None
    assert share.low < share.value < share.high
    assert share.seeds == 3
    for end in (share.low, share.high):
        line = start.values + end * (teacher.values - start.values)
        found = compare(method, outcomes(line, seeds=(), weights=weights))
        assert found.p == pytest.approx(0.05, rel=1e-6)


def test_share_turns_with_the_metric_and_is_told_only_of_a_clear_gap() -> None:
    generator = random(0)
    base = generator.random(40)
    start, teacher = outcomes(base, seeds=()), outcomes(base + generator.random(40), seeds=())
    assert gap_closed(teacher, start, start) is None
    assert gap_closed(start, start, teacher, lower_is_better=True) is None
    full = gap_closed(teacher, start, teacher)
    assert full is not None
    assert (full.value, full.low, full.high) == pytest.approx((1, 1, 1))
    none = gap_closed(start, start, teacher)
    assert none is not None
    assert (none.value, none.low, none.high) == pytest.approx((0, 0, 0))
    down = gap_closed(
        outcomes(-teacher.values, seeds=()),
        outcomes(-start.values, seeds=()),
        outcomes(-teacher.values, seeds=()),
        lower_is_better=True,
    )
    assert down == full
    noise = generator.standard_normal(40)
    for errors, told in ((2.9, False), (3.1, True)):
        shift = errors * noise.std(ddof=1) / math.sqrt(40) - noise.mean()
        near = outcomes(base + noise + shift, seeds=())
        assert (gap_closed(near, start, near) is not None) == told


def test_share_pairs_documents_in_any_order() -> None:
    generator = random(0)
    base = generator.random(30)
    start, teacher = outcomes(base, seeds=()), outcomes(base + generator.random(30), seeds=())
    method = outcomes(base + 0.3 * generator.random((3, 30)))
    order = generator.permutation(30)
    names = tuple(method.ids[i] for i in order)
    mixed = Outcomes("piqa", names, method.values[:, order], method.items, method.seeds)
    shares = gap_closed(mixed, start, teacher), gap_closed(method, start, teacher)
    assert shares[0] is not None
    assert shares[1] is not None
    assert vars(shares[0]) == pytest.approx(vars(shares[1]))
