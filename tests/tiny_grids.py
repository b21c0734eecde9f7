"""Grids on the pair `tiny`, and a small text for their cells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ctdbench import registry, request
from ctdbench.launch import grid

CORPUS = "jsonl:corpus.jsonl"
TASKS = {"tasks": ["bpb_heldout"], "limit": 2}
TUNING = {"values": [0.1, 0.2, 0.3], "seed": 1000, "select": "bpb_heldout.bpb"}


def write_corpus(folder: Path) -> None:
    """What CORPUS names in that folder."""
    texts = [f"The fox counts {number} stones and {number + 3} more." for number in range(400)]
    rows = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "corpus.jsonl").write_text("".join(rows))


def make_grid(**fields: Any) -> grid.Grid:
    raw = {"pairs": ["tiny"], "rows": ["sft"], "eval": TASKS, **fields}
    return registry.validate(grid.Grid, raw, "grid")


def lines_of(**fields: Any) -> list[grid.Line]:
    train = {"corpus": CORPUS, "budget": "4kB", **fields.pop("train", {})}
    planned = grid.lines(make_grid(train=train, **fields), request.build_spec, {})
    return [line.resolved(request.resolve_options) for line in planned]
