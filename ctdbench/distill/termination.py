"""SIGTERM comes before SIGKILL by a grace period: time to finish a step and write a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ctdbench.errors import Terminated


@contextmanager
def deferred_sigterm() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM ends nothing; what is yielded tells whether it came.

    Raises Terminated on leaving if it came and nothing was made of it: it must not get lost.
    Elsewhere it keeps its default: nothing of the store is ever half-written, so a process that
    does not train may end at once. A thread other than the main one cannot defer it.
    """
    came = False

    def note(*_: Any) -> None:
        nonlocal came
        came = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGTERM, before)
    if came:
        raise Terminated("stopped by SIGTERM", "the same command goes on from its last checkpoint")
