"""Where what is computed once is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """CTDBENCH_CACHE, else ~/.cache/ctdbench. Whatever lies there can be removed at any time."""
    return Path(os.environ.get("CTDBENCH_CACHE") or Path.home() / ".cache" / "ctdbench")
