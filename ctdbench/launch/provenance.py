"""Where a result comes from: code, versions, hardware. No folders, no names of people or hosts."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ctdbench import __version__
from ctdbench.results import Hardware, Provenance

PACKAGES = ("torch", "transformers", "peft", "accelerate", "lm-eval", "datasets", "tokenizers")
CODE = ("ctdbench", "methods", "tasks", "pyproject.toml")  # what lies beside it does not count
SECRET = re.compile(
    r".*(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|KEY)"
)  # names in the environment
SHORTEST_SECRET = 8  # characters: a shorter value would be found in innocent text


def provenance() -> Provenance:
    """Of this process; its code is what was there when it was asked for the first time."""
    state = _git()
    return {
        "created": now(),
        "versions": dict(_versions()),
        "hardware": _hardware(),
        "git": state and dict(state),
    }


def now() -> str:
    """The time in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def without_private(data: Any) -> Any:
    """JSON data with `~` for the user's home and `***` for the values of secrets.

    `~` is read as the home again wherever a request names a folder.
    """
    if isinstance(data, dict):
        return {_cleaned(key): without_private(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [without_private(value) for value in data]
    return _cleaned(data) if isinstance(data, str) else data


def _cleaned(text: str) -> str:
    for name, value in os.environ.items():
        if SECRET.fullmatch(name) and len(value) >= SHORTEST_SECRET:
            text = text.replace(value, "***")
    home = str(Path.home())
    return (
        re.sub(r"(?<![\w.-])" + re.escape(home) + r"(?!\w)", "~", text) if len(home) > 1 else text
    )


@cache
def _versions() -> dict[str, str]:
    found = {"ctdbench": __version__, "python": platform.python_version()}
    return found | {name: metadata.version(name) for name in PACKAGES}


def _hardware() -> Hardware:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_bytes": memory,
        "gpus": gpus,
    }


@cache
def _git() -> dict[str, Any] | None:
    """Commit of the clone that the engine runs from, and whether it changed; None in a wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    commands = (("rev-parse", "HEAD"), ("status", "--porcelain", "--", *CODE))
    try:
        commit, status = (
            subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "changed": bool(status)}
