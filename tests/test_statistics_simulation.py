"""What the statistics promise, on simulated methods: coverage and false positives.

Spread is (items, seeds, interaction), the sd of each in a difference of two methods. The numbers
that a test prints (`pytest -rP`) are those of the documentation.
"""

from __future__ import annotations

import numpy as np
import pytest
from example_outcomes import crossed, documents, outcomes
from scipy import stats

from ctdbench.report import statistics
from ctdbench.report.figures.ranks import _apart, critical_difference
from ctdbench.report.pairing import Outcomes
from ctdbench.report.significance import gap_closed, standings
from ctdbench.report.statistics import Array, Items, Variance, two_way

Spread = tuple[float, float, float]
SPREADS: list[Spread] = [
    (0.05, 0.005, 0.1),
    (0.05, 0.1, 0.1),
    (0.05, 1.0, 0.1),
    (1.0, 0.005, 0.1),
    (1.0, 0.1, 0.1),
    (1.0, 1.0, 0.1),
    (0.05, 0.005, 1.0),
    (0.05, 0.1, 1.0),
    (1.0, 0.005, 1.0),
    (1.0, 0.1, 1.0),
]
TOTAL = 8000


NOISE = 0.005  # three standard errors of the coverage simulated


def coverage(arms: list[Array], items: Items, truth: float = 0.0) -> float:
    score = sum(items.mean(values).mean(-1) for values in arms)
    return float(np.mean(np.abs(score - truth) <= two_way(arms, items).half_width()))


def simulated(seeds: int, spread: Spread, items: int = 60) -> float:
    """Coverage over `TOTAL` experiments."""
    generator, unweighted = np.random.default_rng(seeds), Items(np.ones(items))
    shape = (1000, seeds, items)
    parts = [crossed(generator, shape, spread) for _ in range(TOTAL // 1000)]
    return float(np.mean([coverage([part], unweighted) for part in parts]))


def at_most(rate: float, trials: int) -> int:
    """The count that is exceeded once in a thousand times at that rate."""
    return int(stats.binom.ppf(0.999, trials, rate))


@pytest.mark.parametrize("spread", SPREADS)
def test_coverage_at_five_seeds(spread: Spread) -> None:
    covered = simulated(5, spread)
    print(f"5 seeds, spread {spread}: {covered:.1%}")
    assert 0.93 - NOISE <= covered <= 0.98 + NOISE


@pytest.mark.parametrize("spread", SPREADS)
def test_coverage_at_three_seeds(spread: Spread) -> None:
    covered = simulated(3, spread)
    print(f"3 seeds, spread {spread}: {covered:.1%}")
    assert 0.94 - NOISE <= covered <= 0.99 + NOISE


@pytest.mark.parametrize(("seeds", "wanted"), [(3, 0.987), (5, 0.979), (10, 0.971)])
def test_coverage_is_largest_where_seeds_and_items_do_nothing_alone(
    seeds: int, wanted: float
) -> None:
    """Many items, interaction only, integrated over the chi-squared of the seeds' variance."""
    freedom = seeds - 1
    known, drawn = stats.norm.isf(0.025) ** 2, stats.t.isf(0.025, freedom) ** 2 / freedom
    tails = (np.arange(100_000) + 0.5) / 100_000
    squares = stats.chi2.ppf(tails, freedom)
    covered = stats.chi2.cdf(np.maximum(known, drawn * squares), 1).mean()
    assert covered == pytest.approx(wanted, abs=0.001)
    assert simulated(seeds, (0, 0, 1)) == pytest.approx(covered, abs=NOISE)


@pytest.mark.parametrize("seed_spread", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("counts", [(5, 5), (5, 3)])
def test_coverage_where_seeds_do_not_pair(counts: tuple[int, int], seed_spread: float) -> None:
    generator, items = np.random.default_rng(0), Items(np.ones(60))
    first, second = (
        crossed(generator, (3000, count, 60), (0.5, seed_spread, 0.5)) for count in counts
    )
    covered = coverage([first, -second], items)
    print(f"seeds {counts} that differ, seed sd {seed_spread}: {covered:.1%}")
    assert 0.93 <= covered <= 0.98


@pytest.mark.parametrize("size", [24, 300])
@pytest.mark.parametrize("spread", [(0.1, 0.02, 0.2), (1.0, 0.02, 0.2), (0.1, 0.3, 0.5)])
def test_coverage_of_accuracies(size: int, spread: Spread) -> None:
    """0/1 outcomes of two equally good methods: items of unlike difficulty, and flips."""
    generator = np.random.default_rng(1)
    difficulty = generator.standard_normal((1000, 1, size))
    right = [
        (crossed(generator, (1000, 5, size), spread) > difficulty).astype(float) for _ in range(2)
    ]
    covered = coverage([right[0] - right[1]], Items(np.ones(size)))
    print(f"accuracy, {size} items, 5 seeds, spread {spread}: {covered:.1%}")
    assert 0.93 <= covered <= (0.98 if size > 100 else 1)  # few items give few values


def bits_per_byte_truth(tail: float) -> float:
    weights, difference = documents(np.random.default_rng(99), (2_000_000,), tail)
    return float(weights @ difference / weights.sum())


@pytest.mark.parametrize("seed_spread", [0.0005, 0.01])
def test_coverage_of_bits_per_byte_over_seeds(seed_spread: float) -> None:
    generator, truth, hits = np.random.default_rng(3), bits_per_byte_truth(0.5), []
    for weights, difference in zip(*documents(generator, (600, 80), 0.5), strict=True):
        noise = crossed(generator, (5, 80), (0, seed_spread, 0.02))
        hits.append(coverage([difference + noise], Items(weights), truth))
    print(f"bits per byte, 80 documents, 5 seeds of sd {seed_spread}: {np.mean(hits):.1%}")
    assert 0.93 <= np.mean(hits) <= 0.985


def bootstrap_coverage(size: int, tail: float, trials: int, draws: int = 500) -> float:
    truth, hits = bits_per_byte_truth(tail), 0
    grid = documents(np.random.default_rng(size), (trials, size), tail)
    for trial, (weights, difference) in enumerate(zip(*grid, strict=True)):
        found = statistics.bootstrap(difference, Items(weights), draws, trial)
        hits += found.low <= truth <= found.high
    return hits / trials


@pytest.mark.parametrize("tail", [0.5, 1.0])
def test_bootstrap_covers_bits_per_byte(tail: float) -> None:
    covered = bootstrap_coverage(50, tail, 400)
    print(f"bootstrap, 50 documents, lengths' log sd {tail}: {covered:.1%}")
    assert 0.92 <= covered <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("tail", [0.5, 1.0])
@pytest.mark.parametrize("size", [16, 50, 200])
def test_bootstrap_covers_bits_per_byte_in_many_trials(size: int, tail: float) -> None:
    covered = bootstrap_coverage(size, tail, 1500, 500)
    print(f"bootstrap, {size} documents, lengths' log sd {tail}: {covered:.1%}")
    assert 0.925 <= covered <= 0.975


@pytest.mark.slow
def test_percentile_and_bca_intervals_would_cover_less() -> None:
    """Why the bootstrap is the studentised one."""
    truth = bits_per_byte_truth(1.0)
    grid = documents(np.random.default_rng(50), (600, 50), 1.0)
    hits = dict.fromkeys(("percentile", "BCa", "ours"), 0)
    for trial, (w, x) in enumerate(zip(*grid, strict=True)):
        for method in ("percentile", "BCa"):
            low, high = stats.bootstrap(
                (w, w * x),
                lambda w, wx, axis: wx.sum(axis) / w.sum(axis),
                paired=True,
                vectorized=True,
                method=method,
                n_resamples=500,
                rng=np.random.default_rng(trial),
            ).confidence_interval
            hits[method] += low <= truth <= high
        low, high, _ = statistics.bootstrap(x, Items(w), 500, trial)
        hits["ours"] += low <= truth <= high
    print(f"50 documents, 600 trials: {hits}")
    assert hits["ours"] >= 0.92 * 600 > max(hits["percentile"], hits["BCa"])


def test_false_positives_within_one_seed() -> None:
    generator, trials = np.random.default_rng(0), 1000
    a, b = (generator.random((2, trials, 60)) < 0.4).astype(float)
    found = sum(statistics.mcnemar(x, y) <= 0.05 for x, y in zip(a, b, strict=True))
    assert found <= at_most(0.05, trials)
    found = sum(
        statistics.bootstrap(x - y, Items(np.ones(60)), 199, trial).p <= 0.05
        for trial, (x, y) in enumerate(zip(a[:300], b[:300], strict=True))
    )
    assert found <= at_most(0.05, 300)


def table(
    generator: np.random.Generator,
    shape: tuple[int, int, int, int],
    spread: Spread,
    binary: bool = False,
    odd: Spread | None = None,
) -> dict[int, dict[str, Outcomes]]:
    """[columns, rows, seeds, items] of equally good methods; items differ in difficulty.

    odd: the spread of the first row, where it is not that of the others.
    """
    items = Items(np.ones(shape[-1]))
    values = crossed(generator, shape, spread)
    if odd is not None:
        values[:, 0] = crossed(generator, (shape[0], *shape[2:]), odd)
    values += generator.standard_normal((shape[0], 1, 1, shape[-1]))
    values = (values > 0).astype(float) if binary else values
    return {
        column: {str(row): outcomes(rows, items=items) for row, rows in enumerate(grid)}
        for column, grid in enumerate(values)
    }


def any_declared_different(rows: dict[int, dict[str, Outcomes]]) -> bool:
    return any(
        min(standing.p.values()) <= 0.05 or len(standing.groups) > 1
        for standing in standings(rows, lambda column: False).values()
    )


def false_positives(seeds: int, spread: Spread, trials: int, binary: bool = False) -> int:
    """Tables of 5 equal methods and 3 tasks in which any two methods are declared different."""
    generator = np.random.default_rng(0)
    return sum(
        any_declared_different(table(generator, (3, 5, seeds, 40), spread, binary))
        for _ in range(trials)
    )


def false_positives_beside_an_odd_row(rows: int, odd: Spread, trials: int) -> int:
    """The same of 7 tasks at 3 seeds, where one row varies more than all others."""
    generator, spread = np.random.default_rng(1), (0.05, 0.01, 0.05)
    return sum(
        any_declared_different(table(generator, (7, rows, 3, 40), spread, odd=odd))
        for _ in range(trials)
    )


TABLES = [
    pytest.param((0.01, 0.5, 0.1), False, id="seeds"),
    pytest.param((0.5, 0.0, 0.1), False, id="items"),
    pytest.param((0.3, 0.05, 0.3), True, id="both, accuracies"),
]


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(("spread", "binary"), TABLES)
def test_false_positives_of_a_table(spread: Spread, binary: bool, seeds: int) -> None:
    found = false_positives(seeds, spread, 60, binary)
    assert found <= at_most(0.05, 60)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(("spread", "binary"), TABLES)
def test_false_positives_of_many_tables(spread: Spread, binary: bool, seeds: int) -> None:
    found = false_positives(seeds, spread, 500, binary)
    print(f"{seeds} seeds, spread {spread}: {found / 500:.1%} of tables of equal methods")
    assert found <= at_most(0.05, 500)


def tasks_in_pairs(generator: np.random.Generator, rows: int) -> dict[int, dict[str, Outcomes]]:
    """Equal methods at 3 seeds on six tasks of three texts: two of a text differ by little."""
    noise = crossed(generator, (3, rows, 3, 40), (0.3, 0.2, 0.3)).repeat(2, axis=0)
    noise += 0.1 * generator.standard_normal(noise.shape)
    items = Items(np.ones(40))
    return {
        task: {str(row): outcomes(values, items=items) for row, values in enumerate(grid)}
        for task, grid in enumerate(noise)
    }


def ranks_tell_apart(tasks: dict[int, dict[str, Outcomes]]) -> tuple[bool, bool]:
    """Whether any two rows are told apart: by Nemenyi's test alone, and as the diagram does."""
    scores = np.array([[rows[label].score for label in tasks[0]] for rows in tasks.values()])
    means = stats.rankdata(scores, axis=1).mean(0).tolist()
    averages = dict(zip(tasks[0], means, strict=True))
    distance = critical_difference(len(averages), len(tasks))
    found = list(standings(tasks, lambda column: True).values())
    return max(means) - min(means) >= distance, bool(_apart(averages, distance, found).any())


@pytest.mark.parametrize(("rows", "trials"), [(3, 150), (8, 60)])
def test_average_ranks_of_tasks_that_go_together(rows: int, trials: int) -> None:
    generator = np.random.default_rng(2)
    found = [ranks_tell_apart(tasks_in_pairs(generator, rows)) for _ in range(trials)]
    nemenyi, both = (sum(told) for told in zip(*found, strict=True))
    print(f"{rows} rows: {nemenyi / trials:.1%} by Nemenyi's test, {both / trials:.1%} by both")
    assert both <= at_most(0.05, trials) < nemenyi


ODD_ROWS = [
    pytest.param((0.05, 0.5, 0.05), id="noisy seeds"),
    pytest.param((1.0, 0.01, 0.05), id="other items"),
]


@pytest.mark.parametrize("odd", ODD_ROWS)
def test_false_positives_of_a_table_where_one_row_varies_more(odd: Spread) -> None:
    """An F-test, with one variance for all rows, finds three to five times as many as may be."""
    assert false_positives_beside_an_odd_row(3, odd, 200) <= at_most(0.05, 200)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [3, 4])
@pytest.mark.parametrize("odd", ODD_ROWS)
def test_false_positives_of_many_tables_where_one_row_varies_more(odd: Spread, rows: int) -> None:
    found = false_positives_beside_an_odd_row(rows, odd, 500)
    print(f"{rows} rows, one of spread {odd}: {found / 500:.1%} of tables of equal methods")
    assert found <= at_most(0.05, 500)


def equal_rows_parted(trials: int) -> int:
    """Tables of three equal methods and two worse ones, equal too, in which equals are parted."""
    generator, parted = np.random.default_rng(4), 0
    for _ in range(trials):
        rows = table(generator, (1, 5, 5, 40), (0.1, 0.3, 0.1))[0]
        for label in "34":
            rows[label] = outcomes(rows[label].values - 20, items=rows[label].items)
        found = standings({0: rows}, lambda column: False)[0]
        parted += min(found.p[a, b] for a, b in ("01", "02", "12", "34")) <= 0.05
        assert {*found.groups[-1]} <= {"3", "4"}
    return parted


def test_equal_rows_are_not_parted_because_others_are_worse() -> None:
    assert equal_rows_parted(100) <= at_most(0.05, 100)


@pytest.mark.slow
def test_equal_rows_are_not_parted_in_many_tables() -> None:
    parted = equal_rows_parted(1000)
    print(f"three equal rows beside two worse ones: {parted / 1000:.1%} parted")
    assert parted <= at_most(0.05, 1000)


@pytest.mark.parametrize("spread", [(0.5, 0.01, 0.1), (0.5, 0.2, 0.1), (0.1, 0.01, 1.0)])
def test_coverage_of_the_share_of_the_gap(spread: Spread) -> None:
    """True share 0.4; documents are drawn anew for each trial, for start and teacher as well."""
    generator, items, hits, told = np.random.default_rng(0), Items(np.ones(60)), 0, 0
    for noise in crossed(generator, (400, 5, 60), spread):
        start, gap = generator.standard_normal(60), 1 + generator.standard_normal(60)
        models = (outcomes(x, seeds=(), items=items) for x in (start, start + gap))
        share = gap_closed(outcomes(start + 0.4 * gap + noise, items=items), *models)
        if share is not None:
            told += 1
            hits += share.low <= 0.4 <= share.high
    print(f"share of the gap, spread {spread}: {hits / told:.1%} of {told}")
    assert told > 390
    assert 0.925 <= hits / told <= 0.985


def test_clear_differences_are_found_at_three_seeds() -> None:
    generator = np.random.default_rng(0)
    rows = table(generator, (6, 5, 3, 500), (0.3, 0.02, 0.5))
    better = rows[2]["1"]
    rows[2]["1"] = outcomes(better.values + 1.0, items=better.items)
    found = standings(rows, lambda column: False)
    assert found[2].best == ("1",)
    assert all(len(found[column].groups) == 1 for column in (0, 1, 3, 4, 5))


def test_items_alone_would_be_too_sure() -> None:
    """What the seeds' part is for: without it the 95 % interval covers half of the time."""
    generator, items = np.random.default_rng(0), Items(np.ones(100))
    values = crossed(generator, (1000, 5, 100), (1.0, 0.3, 0.1))
    parts = two_way([values], items)
    naive = Variance(parts.items, parts.items_freedom).half_width()
    assert np.mean(np.abs(values.mean((1, 2))) <= naive) < 0.9
    assert coverage([values], items) > 0.94
