"""Two models' outcomes on one task, paired by document: `compare`; and one model's: `estimate`.

Within one seed the documents are random; over several, documents and seeds are (and McNemar's
test, which knows no seeds, is used only where neither seeds nor documents show any spread).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ctdbench.errors import UserError
from ctdbench.report import statistics
from ctdbench.report.statistics import Array, Interval, Items, Variance
from ctdbench.report.tables import Column

Bootstrap = Callable[[Array, Items], Interval]
ROUNDING = 1e-20  # a variance below is 0


@dataclass(frozen=True, eq=False)
class Outcomes:
    """One model's outcomes on a task, a value a document and seed.

    ids: of the n documents. values: [seeds, n]. seeds: of training, in the order of the values;
    empty for a model that was not trained here (start, teacher), whose values are [1, n]. amounts:
    of bits, of a divergence: where all are 0 or 1, that is no wrong and right.
    """

    task: str
    ids: tuple[str, ...]
    values: Array
    items: Items
    seeds: tuple[int, ...]
    amounts: bool = False

    @classmethod
    def from_rows(
        cls,
        task: str,
        metric: str,
        rows: Mapping[int, Sequence[Mapping[str, Any]]],
        *,
        trained: bool = True,
    ) -> Outcomes:
        """From the stored samples of each seed, any one where the model was not trained.

        Raises UserError where seeds saw different documents or a document has no number.
        """
        seeds = [cls._of_seed(task, metric, seed, samples) for seed, samples in rows.items()]
        aligned = [seeds[0], *(_on_documents_of(seeds[0], other) for other in seeds[1:])]
        values = np.concatenate([outcomes.values for outcomes in aligned])
        return replace(seeds[0], values=values, seeds=tuple(rows) if trained else ())

    @classmethod
    def _of_seed(
        cls, task: str, metric: str, seed: int, rows: Sequence[Mapping[str, Any]]
    ) -> Outcomes:
        values = np.array([row.get(metric, np.nan) for row in rows], dtype=np.float64)
        if not np.isfinite(values).all():
            culprit = rows[int(np.argmin(np.isfinite(values)))]["id"]
            raise UserError(f"{task}: document {culprit} of seed {seed} has no {metric}")
        items = Items([row["weight"] for row in rows], [row.get("subset", "") for row in rows])
        ids = tuple(row["id"] for row in rows)
        return cls(task, ids, values[None], items, (seed,), Column(task, metric).lower_is_better)

    @property
    def score(self) -> float:
        """Mean over seeds of the weighted mean over documents."""
        return float(self.items.mean(self.values).mean())

    @property
    def is_choice(self) -> bool:
        """Whether every outcome is wrong or right, 0 or 1, and counts alike."""
        return self.items.equal and self.is_right_or_wrong

    @property
    def is_right_or_wrong(self) -> bool:
        """Whether every outcome is 0 or 1 and no amount."""
        return not self.amounts and bool(np.isin(self.values, (0, 1)).all())

    def at(self, seeds: Sequence[int]) -> Outcomes:
        """The outcomes of these seeds, in this order."""
        places = [self.seeds.index(seed) for seed in seeds]
        return replace(self, values=self.values[places], seeds=tuple(seeds))


@dataclass(frozen=True)
class Estimate:
    """A model's score with its 95 % interval; seeds is 0 for one that was not trained here."""

    value: float
    low: float
    high: float
    seeds: int
    items: int
    test: str


@dataclass(frozen=True)
class Comparison:
    """Score of one model minus that of another, 95 % interval and p-value.

    Unadjusted: `significance.standings` adjusts for the size of a table. seeds: of the model that
    has fewest, 0 if neither was trained here.
    """

    difference: float
    low: float
    high: float
    p: float
    seeds: int
    items: int
    test: str

    @property
    def points(self) -> float:
        """Effect size in points: hundredths of the metric, percentage points of an accuracy."""
        return 100 * self.difference


def pair_outcomes(a: Outcomes, b: Outcomes) -> tuple[Outcomes, Outcomes]:
    """Both on the same documents in the same order, and on the same seeds where they have them.

    Raises UserError naming the task where the documents differ. A model that was not trained here
    goes with every seed. Where one has a single seed, that or else the first seed of the other is
    what it is compared with; otherwise seeds that differ stay as they are.
    """
    return _on_seeds_of(a, _on_documents_of(a, b))


def compare(a: Outcomes, b: Outcomes, *, bootstrap: Bootstrap = statistics.bootstrap) -> Comparison:
    """Score of `a` minus score of `b`, tested as their seeds and outcomes allow.

    One seed: exact McNemar for outcomes that are 0 or 1 and count alike, else the bootstrap over
    documents. Several: Student's t with seeds - 1 degrees of freedom for what
    seeds do (Welch's where the two have seeds of their own) and documents - 1 for what documents
    do (`statistics.Variance.half_width`).
    """
    return compare_all([(a, b)], bootstrap=bootstrap)[0]


def compare_all(
    pairs: Iterable[tuple[Outcomes, Outcomes]], *, bootstrap: Bootstrap = statistics.bootstrap
) -> list[Comparison]:
    """`compare` of every pair; p-values over several seeds, a search each, are found together."""
    aligned = [pair_outcomes(a, b) for a, b in pairs]
    single = [len(a.values) == len(b.values) == 1 for a, b in aligned]
    crossed = [pair for pair, alone in zip(aligned, single, strict=True) if not alone]
    found = iter(_over_seeds(crossed, bootstrap))
    return [
        _one_seed(*pair, bootstrap) if alone else next(found)
        for pair, alone in zip(aligned, single, strict=True)
    ]


def _one_seed(a: Outcomes, b: Outcomes, bootstrap: Bootstrap) -> Comparison:
    left, right = a.values[0], b.values[0]
    if not (a.is_choice and b.is_choice):
        return _comparison(a, b, bootstrap(left - right, a.items), "paired bootstrap")
    ends = statistics.accuracy_difference(left, right)
    return _comparison(a, b, (*ends, statistics.mcnemar(left, right)), "exact McNemar")


def _over_seeds(
    pairs: Sequence[tuple[Outcomes, Outcomes]], bootstrap: Bootstrap
) -> list[Comparison]:
    if not pairs:
        return []
    variances = [difference_variance(a, b) for a, b in pairs]
    differences = np.array([a.score - b.score for a, b in pairs])
    stacked = Variance(*(np.array(part) for part in zip(*variances, strict=True)))
    half = stacked.half_width()
    bounds = (differences - half, differences + half, stacked.p_value(differences))
    intervals = zip(*(bound.tolist() for bound in bounds), strict=True)
    return [
        _one_seed(a, b, bootstrap)
        if _without_spread(a, b, variance)
        else _comparison(a, b, interval, _several(variance))
        for (a, b), variance, interval in zip(pairs, variances, intervals, strict=True)
    ]


def _without_spread(a: Outcomes, b: Outcomes, variance: Variance) -> bool:
    """Whether accuracies differ alike on every document and seed, which says nothing of others."""
    alike = variance.items < ROUNDING and variance.seeds < ROUNDING
    return a.is_choice and b.is_choice and bool(alike)


def _comparison(
    a: Outcomes, b: Outcomes, interval: tuple[float, float, float], test: str
) -> Comparison:
    seeds = min((len(side.seeds) for side in (a, b) if side.seeds), default=0)
    return Comparison(a.score - b.score, *interval, seeds, len(a.ids), test)


def estimate(a: Outcomes, *, bootstrap: Bootstrap = statistics.bootstrap) -> Estimate:
    """The model's own score: Wilson's interval or the bootstrap for one seed, else as `compare`."""
    if a.is_choice and (len(a.values) == 1 or np.ptp(a.values) == 0):
        (low, high), test = statistics.wilson(a.values[0]), "Wilson"
    elif a.is_right_or_wrong and np.ptp(a.values) == 0:  # a macro-average: nothing varies
        (low, high), test = statistics.wilson(a.values[0], a.items.effective), "Wilson"
    elif len(a.values) == 1:
        low, high, _ = bootstrap(a.values[0], a.items)
        test = "bootstrap"
    else:
        variance = statistics.two_way([a.values], a.items)
        half, test = float(variance.half_width()), _several(variance)
        low, high = a.score - half, a.score + half
        if a.is_right_or_wrong:  # no accuracy lies outside
            low, high = max(0.0, low), min(1.0, high)
    return Estimate(a.score, low, high, len(a.seeds), len(a.ids), test)


def difference_variance(a: Outcomes, b: Outcomes) -> Variance:
    """Variance of the difference of two models' scores, paired as by `pair_outcomes`.

    Seeds count as random where a model has several, documents always.
    """
    if len(a.values) == len(b.values) == 1:
        parts = a.items.deviations(a.values[0] - b.values[0])
        return Variance(float(parts @ parts), a.items.freedom)
    paired = a.seeds == b.seeds or not (a.seeds and b.seeds)
    arms = [a.values - b.values] if paired else [a.values, -b.values]
    return statistics.two_way(arms, a.items)


def _several(variance: Variance) -> str:
    return f"t over documents and seeds, {variance.seeds_freedom:.3g} df"


def _on_documents_of(a: Outcomes, b: Outcomes) -> Outcomes:
    if a.ids == b.ids and np.array_equal(a.items.share, b.items.share):
        return b
    places = {name: index for index, name in enumerate(b.ids)}
    order = [places[name] for name in a.ids if name in places]
    if not len(order) == len(a.ids) == len(b.ids):
        raise UserError(
            f"{a.task}: evaluated on different documents "
            f"({len(a.ids)} and {len(b.ids)}, {len(order)} in common)",
            "evaluate both with the same tasks, data and limit",
        )
    if not np.allclose(a.items.share, b.items.share[order]):
        raise UserError(f"{a.task}: the same documents were weighted differently")
    return replace(b, ids=a.ids, values=b.values[:, order], items=a.items)


def _on_seeds_of(a: Outcomes, b: Outcomes) -> tuple[Outcomes, Outcomes]:
    if not a.seeds or not b.seeds or a.seeds == b.seeds:
        return a, b
    if set(a.seeds) == set(b.seeds):
        return a, b.at(a.seeds)
    if min(len(a.seeds), len(b.seeds)) > 1:
        return a, b
    common = [seed for seed in a.seeds if seed in b.seeds]
    return a.at((common or a.seeds)[:1]), b.at((common or b.seeds)[:1])
