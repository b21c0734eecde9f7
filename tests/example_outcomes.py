"""Outcomes with known items' and seeds' variance, for tests of the statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ctdbench.report.pairing import Outcomes
from ctdbench.report.statistics import Array, Items


def outcomes(
    values: ArrayLike,
    *,
    seeds: tuple[int, ...] | None = None,
    weights: ArrayLike | None = None,
    subsets: ArrayLike | None = None,
    items: Items | None = None,
) -> Outcomes:
    """Of task "piqa"; values [seeds, n], or [n] for one seed. Seeds are 0, 1, ... by default."""
    grid = np.atleast_2d(np.asarray(values, dtype=np.float64))
    size = grid.shape[1]
    seeds = tuple(range(len(grid))) if seeds is None else seeds
    items = items or Items(np.ones(size) if weights is None else weights, subsets)
    return Outcomes("piqa", tuple(f"{i}-x" for i in range(size)), grid, items, seeds)


def crossed(
    generator: np.random.Generator,
    shape: tuple[int, ...],
    spread: tuple[float, float, float],
) -> Array:
    """[..., seeds, n] normal values of true mean 0: sd of items, of seeds, of their interaction."""
    items, seeds, both = spread
    out = both * generator.standard_normal(shape)
    out += items * generator.standard_normal((*shape[:-2], 1, shape[-1]))
    out += seeds * generator.standard_normal((*shape[:-1], 1))
    return out


def documents(
    generator: np.random.Generator, shape: tuple[int, ...], tail: float = 1.0
) -> tuple[Array, Array]:
    """Bytes and a difference of bits per byte of documents, [*shape] each.

    Lengths are log-normal (`tail` is their logarithm's sd, at most three of it above the median;
    held-out chat has 0.5, web text about 1). Differences have Student's tails (t, 3 degrees of
    freedom), vary more in short documents and depend on the length.
    """
    logs = np.minimum(tail * generator.standard_normal(shape), 3 * tail)
    noise = generator.standard_t(3, shape) * (0.5 + 0.5 * np.exp(-logs / 2))
    return 700 * np.exp(logs), 0.02 + 0.03 * noise - 0.01 * logs


def rows(values: ArrayLike, metric: str = "acc", **columns: Any) -> list[dict[str, Any]]:
    """Stored samples of one seed; further columns (weight, subset) by name, one value a row."""
    samples = [
        {"id": f"{index}-x", "weight": 1.0, metric: value}
        for index, value in enumerate(np.asarray(values).tolist())
    ]
    for name, column in columns.items():
        for sample, value in zip(samples, column, strict=True):
            sample[name] = value
    return samples
