"""Task files of a user's own, for tests: `capitals.yaml` with its items beside it."""

from __future__ import annotations

import json
from pathlib import Path

ITEMS = [("France", "Paris", "Lyon"), ("Japan", "Tokyo", "Osaka"), ("Egypt", "Cairo", "Luxor")]
CAPITALS = """\
task: capitals
output_type: multiple_choice
custom_dataset: !function ctdbench_tasks.data.embedded
test_split: test
doc_to_text: "The capital of {{country}} is"
doc_to_target: 0
doc_to_choice: "{{[right, wrong]}}"
process_results: !function scores.made
metric_list:
  - {metric: spread, aggregation: mean, higher_is_better: true}
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata:
  version: 1.0
  description: Capitals of countries
  primary: acc
  embedded: true
  files: {test: capitals.jsonl}
"""
SCORES = """\
def made(row, results):
    nats = [result[0] for result in results]
    return {"spread": abs(nats[0] - nats[1]), "acc": float(nats[0] > nats[1])}


def none(row):
    return None
"""


def write_capitals(folder: Path, changes: dict[str, str] | None = None) -> Path:
    """The task file in an existing folder. changes: of its text, old -> new, each found once."""
    text = CAPITALS
    for old, new in (changes or {}).items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    rows = [dict(zip(("country", "right", "wrong"), item, strict=True)) for item in ITEMS]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "capitals.jsonl").write_text(lines, encoding="utf-8")
    (folder / "scores.py").write_text(SCORES, encoding="utf-8")
    path = folder / "capitals.yaml"
    path.write_text(text, encoding="utf-8")
    return path
