"""L1 distance of rows by rank, and its gradient, by the fastest sort that a device has.

On a CPU that is NumPy's, which sorts with SIMD instructions; it is eight times as fast as torch's.
Its argsort is not, so places are sorted along as the low bits of the values: a float32 leaves 29 of
a float64's bits empty.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KEYS = 1 << 17  # that are sorted in one call: a MB stays in the cache
PLACE = (1 << 29) - 1  # the bits of a key that hold the place

Float32s = NDArray[np.float32]


def sorted_l1(student: Tensor, teacher: Tensor, top: int | None = None) -> Tensor:
    """L1 distance of rows sorted descending, the shorter zero-padded: [P, Vs], [P, Vt] -> [P].

    Differentiable in `student` only. Keeps P x Vs bytes for the backward.

    top: compare the `top` largest of either side alone, which is cheaper. For masses that is too
    little by at most the two rests' sums: sum over k > top of |p_k - q_k| <= sum of p_k + q_k.
    """
    distance: Tensor = _SortedDistance.apply(student, teacher.detach(), top)  # type: ignore[no-untyped-call]
    return distance


class _SortedDistance(torch.autograd.Function):
    """Keeps one byte an entry for the backward: the sign of the difference, back at its place."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, top: int | None) -> Tensor:
        on_cpu = student.device.type == "cpu" and student.dtype == teacher.dtype == torch.float32
        ranked = _ranked_by_numpy if on_cpu else _ranked_by_torch
        distance, signs = ranked(student, teacher, top)
        ctx.save_for_backward(signs)
        return distance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (signs,) = ctx.saved_tensors
        return signs * gradient[:, None], None, None


def _ranked_by_torch(student: Tensor, teacher: Tensor, top: int | None) -> tuple[Tensor, Tensor]:
    """Distances [P] and signs [P, Vs] int8."""
    ranked, place = (part[:, :top] for part in student.sort(-1, descending=True))
    other = teacher.sort(-1, descending=True).values[:, :top].to(ranked.dtype)
    common = min(ranked.shape[-1], other.shape[-1])
    rest = other[:, common:].sum(-1)
    ranked[:, :common] -= other[:, :common]  # past the shorter side the difference is the value
    signs = torch.zeros_like(student, dtype=torch.int8)
    signs.scatter_(-1, place, ranked.sign().to(torch.int8))
    return ranked.abs().sum(-1) + rest, signs


def _ranked_by_numpy(student: Tensor, teacher: Tensor, top: int | None) -> tuple[Tensor, Tensor]:
    """The same of float32 on a CPU, a few rows at a time in every thread that torch may use."""
    own, taught = student.detach().contiguous().numpy(), teacher.contiguous().numpy()
    distances = np.empty(len(own), np.float32)
    signs = np.zeros(own.shape, np.int8)
    most = max(1, KEYS // max(own.shape[1], 1))

    def work(start: int) -> None:
        rows = slice(start, start + most)
        distances[rows] = _rank(own[rows], taught[rows], signs[rows], top)

    _in_threads(work, range(0, len(own), most))
    return torch.from_numpy(distances), torch.from_numpy(signs)


def _in_threads(work: Callable[[int], None], starts: range) -> None:
    workers = min(torch.get_num_threads(), len(starts))
    if workers < 2:
        for start in starts:
            work(start)
        return
    with ThreadPoolExecutor(workers) as pool:  # NumPy lets go of the interpreter while it sorts
        list(pool.map(work, starts))


def _rank(own: Float32s, taught: Float32s, signs: NDArray[np.int8], top: int | None) -> Float32s:
    """Distances of a few rows; fills their signs."""
    columns = own.shape[1]
    keys = own.astype(np.float64)
    bits = keys.view(np.int64)
    bits |= np.arange(columns)
    keys, other = _largest(keys, top), _largest(taught.copy(), top)
    gaps = keys.astype(np.float32)
    place = keys.view(np.int64) & PLACE
    place += columns * np.arange(len(own))[:, None]
    common = min(gaps.shape[1], other.shape[1])
    gaps[:, gaps.shape[1] - common :] -= other[:, other.shape[1] - common :]
    signs.reshape(-1)[place.reshape(-1)] = ((gaps > 0).view(np.int8) - (gaps < 0)).reshape(-1)
    rest = other[:, : other.shape[1] - common].sum(1)
    distances: Float32s = np.abs(gaps, out=gaps).sum(1) + rest
    return distances


def _largest(values: NDArray[Any], top: int | None) -> NDArray[Any]:
    """The largest of every row ascending, or all; in the same memory."""
    columns = values.shape[1]
    if top is not None and top < columns:
        if top:
            values.partition(columns - top, axis=1)
        values = values[:, columns - top :]
    values.sort(1)
    return values
