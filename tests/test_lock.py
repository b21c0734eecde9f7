"""A cell's folder belongs to one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from ctdbench.errors import PreflightError, RunError
from ctdbench.launch.lock import exclusive, is_locked


def test_a_held_folder_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "cell"
    with exclusive(folder):
        assert is_locked(folder)
        with pytest.raises(RunError, match="another process computes the cell"), exclusive(folder):
            pass
    assert not folder.exists()


def test_a_disk_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(PreflightError, match="knows no locks: No locks"), exclusive(tmp_path / "c"):
        pass
