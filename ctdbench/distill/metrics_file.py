"""metrics.jsonl: what every step of a run gave, in step with the run's checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ctdbench import atomic
from ctdbench.errors import RunError
from ctdbench.results import write_jsonl_atomic


class MetricsFile:
    """metrics.jsonl, one line a step; lines past the checkpoint resumed from are dropped."""

    def __init__(self, path: Path, step: int, active: bool) -> None:
        """step: where the run goes on; active: whether this process writes.

        Raises RunError if the file lacks a line of a step before.
        """
        self.path = path
        self.active = active
        if active:
            write_jsonl_atomic(path, self._until(step))

    def write(self, values: dict[str, Any]) -> None:
        """Add a step's line."""
        if self.active:
            with atomic.writing(self.path), self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(values) + "\n")

    def flush(self) -> None:
        """No checkpoint may outlive a power cut that the lines before it do not."""
        if self.active:
            with self.path.open("rb") as stream:
                os.fsync(stream.fileno())

    def _until(self, step: int) -> list[dict[str, Any]]:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines() if step else []
            if len(lines) < step:
                raise ValueError(f"it has {len(lines)} lines, the checkpoint is of step {step}")
            return list(map(json.loads, lines[:step]))
        except (OSError, ValueError) as error:
            raise RunError(
                f"{self.path} does not belong to its checkpoint ({error})",
                f"delete {self.path.parent} to compute the cell again",
            ) from error
