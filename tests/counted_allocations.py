"""What a computation costs, counted and not timed: storages, memory alive at once, work.

`Allocations` watches torch operations, those of a backward too, and through tracemalloc the NumPy
arrays beside them. Scratch memory inside one operation is not seen.
"""

from __future__ import annotations

import sys
import tracemalloc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):
    """Storages that are made while it is on; what existed before does not count.

    largest: elements of the largest one, and its `maker`. peak: most bytes alive at once, NumPy's
    among them. written: elements that all operations together wrote.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.maker = 0, ""
        self.peak, self.written = 0, 0
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._bytes = 0

    def __enter__(self) -> Allocations:
        tracemalloc.start()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._note_peak()
        tracemalloc.stop()
        self._alive.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = list(_tensors(args))
        if func._schema.is_mutable:  # it touches no more than what it is given
            others = [part.numel() for part in given[1:]]
            self.written += min(given[0].numel(), max(others, default=given[0].numel()))
        else:
            for tensor in _tensors((result,)):
                self._see(tensor, given, func)
        return result

    def _see(self, tensor: Tensor, given: list[Tensor], func: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or any(part.untyped_storage()._cdata == key for part in given):
            return  # a view
        elements = storage.nbytes() // tensor.itemsize
        self.written += elements
        if elements > self.largest:
            self.largest, self.maker = elements, f"{func} -> {list(tensor.shape)}"
        self._alive[key] = (weakref.ref(storage, lambda _: self._forget(key)), storage.nbytes())
        self._bytes += storage.nbytes()

    def _forget(self, key: int) -> None:
        self._note_peak()
        self._bytes -= self._alive.pop(key)[1]

    def _note_peak(self) -> None:
        """Called before torch's bytes get less; NumPy's come and go between its operations."""
        self.peak = max(self.peak, self._bytes + tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among the values, and in lists and tuples of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def bytecodes(call: Callable[[], object]) -> int:
    """Bytecodes that Python runs in a call: what a loop in Python costs."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


class Casts(TorchDispatchMode):
    """How often each weight of a model is cast to bfloat16."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.names = {p.data_ptr(): name for name, p in model.named_parameters()}
        self.found = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.names:
            self.found[self.names[args[0].data_ptr()]] += 1
        return func(*args, **(kwargs or {}))
