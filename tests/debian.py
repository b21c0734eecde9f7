"""Programs that slow tests run, from Debian's packages: Slurm, Chromium, TeX."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

LOCK = Path(tempfile.gettempdir()) / "ctdbench-apt-get.lock"


def need(programs: Sequence[str], packages: Sequence[str]) -> None:
    """Install the packages where a program is absent; skips where that cannot be done."""
    absent = ", ".join(program for program in programs if not shutil.which(program))
    if not absent:
        return
    install = f"apt-get install {' '.join(packages)}"
    if os.geteuid() or not shutil.which("apt-get"):
        pytest.skip(f"{absent} not installed; as root on Debian: {install}")
    with LOCK.open("w") as lock:  # apt-get does not wait for the other test process
        fcntl.flock(lock, fcntl.LOCK_EX)
        _apt_get("update")
        _apt_get("install", "--yes", "--no-install-recommends", *packages)


def _apt_get(*call: str) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "--quiet", *call]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"apt-get {call[0]}: {done.stderr.strip()[-200:]}")
