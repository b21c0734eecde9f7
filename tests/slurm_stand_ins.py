"""Jobs in folders of their own, and programs that stand in for Slurm's."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctdbench.launch.local import Job


def job(folder: Path, name: str, code: str = "", **fields: Any) -> Job:
    """A command in a folder of its own, as a cell has one."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    return Job(name, (sys.executable, "-S", "-c", code), folder / name / "log.txt", **fields)


def put_on_path(folder: Path, patch: pytest.MonkeyPatch, **programs: str) -> Path:
    """Programs in Bash that stand in for Slurm's; each adds its call to the file `calls`."""
    folder.mkdir(exist_ok=True)
    for name, text in programs.items():
        (folder / name).write_text(f'#!/bin/bash\ncd {folder}\necho {name} "$@" >>calls\n{text}\n')
        (folder / name).chmod(0o755)
    patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
