"""The commands. Nothing heavy is imported here: `--help` and `list` answer at once."""

from __future__ import annotations

from ctdbench.cli import cells, development, grid, models, show
from ctdbench.cli.application import app

__all__ = ["app", "cells", "development", "grid", "main", "models", "show"]


def main() -> None:
    """Entry point of the `ctdbench` command."""
    app()
