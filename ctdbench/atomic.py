"""Files and folders that are there whole or not at all, even after a power cut.

Written under a temporary name, flushed to the disk, renamed, and then the folder with the name is
flushed. A killed process leaves at most a temporary name behind, which no reader takes for a file:
it goes when its cell is computed next, or when the next process writes to the cache.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from ctdbench.cache import cache_dir
from ctdbench.errors import RunError

LOCK = ".lock"
YOUNG_SECONDS = 86_400.0  # a leftover that another machine may still write to
NONCE = 8  # digits of a temporary name
LEFTOVER = f".*.{'[0-9a-f]' * NONCE}.tmp"

_REFUSED = frozenset(
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EEXIST")
)


def write_bytes(path: Path, data: bytes) -> None:
    """`path` holds all of the data, or what it held before; raises RunError as `writing` does."""
    with new_file(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary name to write a file to, which becomes `path` at the end.

    On an error `path` stays as it was. Raises RunError as `writing` does.
    """
    temporary = _temporary(path)
    with writing(path), _shared(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _flush(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _flush(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` at the end, unless another one came first."""
    temporary = _temporary(path)
    with writing(path), _shared(path):
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for entry in (*temporary.rglob("*"), temporary):
                _flush(entry)
            _rename(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _flush(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise RunError naming `path` where the disk is full, read-only, or not the user's."""
    try:
        yield
    except Exception as error:
        reason = refusal(error)
        if reason is None or isinstance(error, RunError):
            raise
        raise RunError(
            f"cannot write {path}: {reason}", "make room or choose another place, then run it again"
        ) from error


def refusal(error: Exception) -> str | None:
    """Why the system let nothing be written, if that is what the error says.

    safetensors and tokenizers raise exceptions of their own with the system's number in the text.
    """
    stated = re.search(r"\(os error (\d+)\)", str(error))
    number: int | None = int(stated[1]) if stated else getattr(error, "errno", None)
    return os.strerror(number) if number is not None and number in _REFUSED else None


def remove_leftovers(folder: Path, older: float = 0.0) -> None:
    """Remove what killed processes left below a folder that no other process writes to.

    older: seconds that a leftover has lain there.
    """
    last = time.time() - older
    for path in sorted(folder.rglob(LEFTOVER)):
        if older and path.exists() and path.stat().st_mtime > last:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _shared(path: Path) -> Iterator[None]:
    """While it writes to the cache, a process holds it together with others that do."""
    folder = cache_dir()
    if not path.is_relative_to(folder):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    _tidy(folder)
    with (folder / LOCK).open("a+") as lock:  # NFS shares only what can be read
        with suppress(OSError):  # this disk knows no locks: then nobody tidies
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield


@cache
def _tidy(folder: Path) -> None:
    """Once a process: remove leftovers from the cache, unless another process writes to it.

    The system frees what a killed process held. Some file systems tell one machine nothing of
    another's locks, so what is young stays in any case.
    """
    with (folder / LOCK).open("a+") as lock, suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_leftovers(folder, older=YOUNG_SECONDS)


def _temporary(path: Path) -> Path:
    """Random, because process numbers repeat on the machines that share a folder."""
    return path.with_name(f".{path.name}.{secrets.token_hex(NONCE // 2)}.tmp")


def _rename(folder: Path, path: Path) -> None:
    try:
        folder.rename(path)
    except OSError as error:  # another one came first
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _flush(path: Path) -> None:
    """A folder holds the names in it: a rename is safe once the folder is flushed, too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
