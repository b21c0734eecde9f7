"""One process at a time in a folder. The system frees the lock whatever ends the process."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

from ctdbench import atomic
from ctdbench.errors import PreflightError, RunError

NAME = ".lock"


@contextmanager
def exclusive(folder: Path, *, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold `folder`, which is made if need be and goes again if nothing was put into it.

    waiting: called before waiting for another process; without it the folder of another process is
    a RunError. Raises PreflightError where the folder cannot be made.
    """
    kept = next(path for path in folder.absolute().parents if path.is_dir())
    descriptor = _locked(folder, waiting)
    try:
        atomic.remove_leftovers(folder)
        yield
    finally:
        (folder / NAME).unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # not empty, or another process has just made it its own
            for path in takewhile(kept.__ne__, (folder, *folder.absolute().parents)):
                path.rmdir()


def is_locked(folder: Path) -> bool:
    """Whether a process holds the folder, or was killed while it did."""
    return (folder / NAME).exists()


def _locked(folder: Path, waiting: Callable[[], None] | None) -> int:
    """The open lock file. Who held it before has removed it: only the one in the folder counts."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # its holder removed the empty folder in between
            continue
        except OSError as error:
            raise PreflightError(
                f"{folder} cannot be written to: {error.strerror}", "choose another --store"
            ) from error
        try:
            _lock(descriptor, folder, waiting)
            if _is_named(descriptor, folder / NAME):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, waiting: Callable[[], None] | None) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        if waiting is None:
            raise RunError(
                f"another process computes the cell {folder}", "wait until it is done"
            ) from error
        waiting()
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        raise PreflightError(
            f"{folder} lies on a disk that knows no locks: {error.strerror}",
            "choose another --store",
        ) from error


def _is_named(descriptor: int, path: Path) -> bool:
    held = os.fstat(descriptor)
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    return (held.st_dev, held.st_ino) == (named.st_dev, named.st_ino)
