"""What a whole table may claim: who is best and tied, what is at chance, how much gap is closed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from ctdbench.report.pairing import Outcomes, difference_variance, pair_outcomes
from ctdbench.report.statistics import ALPHA, Array, Variance, critical, two_way

SEEDS_TO_RANK = 3
GAP_IN_STANDARD_ERRORS = 3
Column = TypeVar("Column")


@dataclass(frozen=True)
class Standing:
    """A column's ranked rows.

    groups: labels from best to worst; a group is a best row and those that do not differ from it,
    the next is formed of what is left. p: of both orders of every pair of rows, adjusted for all
    of the column's, and no smaller than gate: p of "all rows are equal", adjusted for the columns.
    seeds: of the row that has fewest.
    """

    groups: tuple[tuple[str, ...], ...]
    p: Mapping[tuple[str, str], float]
    gate: float
    seeds: int

    @property
    def best(self) -> tuple[str, ...]:
        """The best row and everything tied with it."""
        return self.groups[0]

    def rank(self, label: str) -> int | None:
        """1 for the best and its ties; None for a row that has too few seeds to be ranked."""
        before = 0
        for group in self.groups:
            if label in group:
                return before + 1
            before += len(group)
        return None


@dataclass(frozen=True)
class Share:
    """Share of the way from start to teacher that a method went, with its 95 % interval."""

    value: float
    low: float
    high: float
    seeds: int


def holm(p: ArrayLike) -> Array:
    """p-values adjusted so that any false rejection in the family is as rare as stated (1979)."""
    return _step_down(p, np.arange(np.size(p), 0, -1))


def shaffer(p: ArrayLike, rows: int) -> Array:
    """Holm's adjustment for all pairs of `rows` means, once it is known that not all are equal.

    Of three means with two unlike, one pair at most is equal, and so on: a p-value is multiplied
    by the number of pairs that can still be equal (Shaffer 1986, S1 after an overall test), not
    by the number that is left. Any false rejection stays as rare as stated.
    """
    left = np.arange(np.size(p), 0, -1)
    left[0] -= 1
    possible = np.array(sorted(_equal_pairs(rows)))
    return _step_down(p, np.maximum(1, possible[np.searchsorted(possible, left, "right") - 1]))


def standings(
    columns: Mapping[Column, Mapping[str, Outcomes]],
    lower_is_better: Callable[[Column], bool],
) -> dict[Column, Standing]:
    """Tie groups of every column in which two rows or more have enough seeds to be ranked.

    columns: trained models' outcomes by column and row label. Two gates: over the columns of the
    table, Holm on the smallest adjusted p of a column's pairs, so that a table of equal methods
    declares any two of them different at most once in twenty; within a column, `shaffer` on all
    pairs, so that this holds whichever of its rows are equal. A pair's p is the larger of both.
    Every test is a pair's own, with the variance of that pair: rows need not vary alike.
    Raises UserError naming the task where two rows were evaluated on different documents.
    """
    ranked = {
        column: {label: o for label, o in rows.items() if len(o.seeds) >= SEEDS_TO_RANK}
        for column, rows in columns.items()
    }
    ranked = {column: _aligned(rows) for column, rows in ranked.items() if len(rows) > 1}
    pairs = {column: _pair_p(list(rows.values())) for column, rows in ranked.items()}
    gates = holm([holm(p).min() for p in pairs.values()])
    return {
        column: _standing(rows, pairs[column], float(gate), lower_is_better(column))
        for (column, rows), gate in zip(ranked.items(), gates, strict=True)
    }


def told_apart(standings: Collection[Standing], first: str, second: str) -> bool:
    """Whether a column tells two rows apart at 5 %, corrected for the number of columns, too.

    Bonferroni over columns on what a standing says of the pair, which is adjusted for the column's
    pairs: any false claim over all pairs is as rare, however columns go together.
    """
    columns = len(standings)
    return any(columns * standing.p.get((first, second), 1.0) <= ALPHA for standing in standings)


def above_chance(outcomes: Outcomes, chance: ArrayLike) -> float:
    """One-sided p-value of "no better than chance"; a table marks a floor where it is above 5 %.

    chance: a guesser's expected outcome, one number or one a document ([n]). Exact binomial for
    one seed of 0/1 outcomes that count alike and one chance; else t over documents (and seeds).
    """
    level = np.broadcast_to(np.asarray(chance, dtype=np.float64), outcomes.values.shape[1:])
    if outcomes.is_choice and len(outcomes.values) == 1 and np.ptp(level) == 0:
        right, size = int(outcomes.values.sum()), len(level)
        return float(special.betainc(right, size - right + 1, level[0])) if right else 1.0
    guesser = Outcomes(outcomes.task, outcomes.ids, level[None], outcomes.items, ())
    excess, variance = _difference(outcomes, guesser)
    half = float(variance.p_value(excess)) / 2
    return half if excess > 0 else 1 - half


def gap_closed(
    method: Outcomes, start: Outcomes, teacher: Outcomes, *, lower_is_better: bool = False
) -> Share | None:
    """(method - start) / (teacher - start), paired by document, with Fieller's interval (1954).

    None unless the teacher is better than the start by more than three standard errors of that
    difference. The interval holds the shares r for which method - start - r (teacher - start) is
    not significant: documents are random in both differences, seeds in the first.
    """
    (start, teacher), (_, method) = pair_outcomes(start, teacher), pair_outcomes(start, method)
    gap, noise = _difference(teacher, start)
    better = -gap if lower_is_better else gap
    square = float(critical(noise.items_freedom))
    squared_error = float(noise.items)
    bound = gap**2 - square * squared_error
    if noise.items_freedom < 1 or bound <= 0:
        return None
    if better <= GAP_IN_STANDARD_ERRORS * math.sqrt(squared_error):
        return None
    gain, error = _difference(method, start)
    deviate = start.items.deviations
    gains, gaps = method.values.mean(0) - start.values[0], teacher.values[0] - start.values[0]
    common = float(deviate(gains) @ deviate(gaps))
    middle = gain * gap - square * common
    root = math.sqrt(max(0.0, middle**2 - bound * (gain**2 - float(error.half_width()) ** 2)))
    return Share(gain / gap, (middle - root) / bound, (middle + root) / bound, len(method.seeds))


def _difference(a: Outcomes, b: Outcomes) -> tuple[float, Variance]:
    a, b = pair_outcomes(a, b)
    return a.score - b.score, difference_variance(a, b)


def _aligned(rows: Mapping[str, Outcomes]) -> dict[str, Outcomes]:
    """All on the documents, and where it has the same seeds in their order, of the first."""
    first = next(iter(rows.values()))
    return {label: pair_outcomes(first, outcomes)[1] for label, outcomes in rows.items()}


def _pair_p(rows: Sequence[Outcomes]) -> Array:
    """[pairs], unadjusted; a row and all that follow it at once where all have the same seeds."""
    if any(outcomes.seeds != rows[0].seeds for outcomes in rows):
        tests = [_difference(a, b) for a, b in itertools.combinations(rows, 2)]
    else:
        values, items = np.stack([outcomes.values for outcomes in rows]), rows[0].items
        blocks = [row - values[place:] for place, row in enumerate(values[:-1], start=1)]
        tests = [(items.mean(block).mean(-1), two_way([block], items)) for block in blocks]
    differences, variances = zip(*tests, strict=True)
    sizes = [np.size(difference) for difference in differences]
    joined = [
        np.concatenate(list(map(np.broadcast_to, parts, sizes)))
        for parts in (differences, *zip(*variances, strict=True))
    ]
    return Variance(*joined[1:]).p_value(joined[0])


def _standing(
    rows: Mapping[str, Outcomes], pairs: Array, gate: float, lower_is_better: bool
) -> Standing:
    adjusted = np.maximum(gate, shaffer(pairs, len(rows))).tolist()
    p: dict[tuple[str, str], float] = {}
    for (a, b), value in zip(itertools.combinations(rows, 2), adjusted, strict=True):
        p |= {(a, b): value, (b, a): value}
    labels = sorted(rows, key=lambda label: rows[label].score, reverse=not lower_is_better)
    seeds = min(len(outcomes.seeds) for outcomes in rows.values())
    return Standing(tuple(_tie_groups(labels, p)), p, gate, seeds)


def _tie_groups(labels: Sequence[str], p: Mapping[tuple[str, str], float]) -> list[tuple[str, ...]]:
    groups: list[tuple[str, ...]] = []
    left = list(labels)
    while left:
        best = left[0]
        group = tuple(label for label in left if label == best or p[best, label] > ALPHA)
        groups.append(group)
        left = [label for label in left if label not in group]
    return groups


def _step_down(p: ArrayLike, factors: Array | NDArray[np.int64]) -> Array:
    """The smallest p-value times the first factor and so on, none below the one before it."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(factors * values[order]))
    return adjusted


@cache
def _equal_pairs(rows: int) -> frozenset[int]:
    """How many pairs of that many means can be equal at once, over all partitions of the means."""
    if rows < 2:
        return frozenset({0})
    sizes = range(1, rows + 1)
    return frozenset(
        size * (size - 1) // 2 + n for size in sizes for n in _equal_pairs(rows - size)
    )
