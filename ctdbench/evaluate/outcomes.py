"""From per-sample outcomes to a score: always their weighted mean, so that pairing is never lost.

One row a document: "id", "weight", the metrics, and "output" where text was generated, "chance"
where an answer was chosen; "subset" in a group. Weights are 1 for items, bytes for documents, and
in a group 1 / (subsets * items of the subset), which makes the mean over all rows the
macro-average over subsets.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ctdbench.errors import UserError

Row = dict[str, Any]
NOT_METRICS = frozenset({"id", "weight", "subset", "output", "chance"})


def metric_names(rows: Sequence[Row]) -> list[str]:
    """The metrics that the rows carry."""
    return [name for name in rows[0] if name not in NOT_METRICS] if rows else []


def score(rows: Sequence[Row], metric: str) -> float:
    """Weighted mean of a metric over the rows."""
    weights, values = _columns(rows, metric)
    return float(weights @ values / weights.sum())


def standard_error(rows: Sequence[Row], metric: str) -> float | None:
    """Standard error of `score`, items drawn within their subset; None where a subset has one item.

    With equal weights it is s / sqrt(n); in a group, that of an unweighted mean of subset means.
    """
    weights, values = _columns(rows, metric)
    subsets = np.array([row.get("subset", "") for row in rows])
    variance = 0.0
    for subset in np.unique(subsets):
        inside = subsets == subset
        size = int(inside.sum())
        if size < 2:
            return None
        w, x = weights[inside], values[inside]
        residual = w * (x - w @ x / w.sum())
        variance += float(residual @ residual) * size / (size - 1)
    return float(np.sqrt(variance) / weights.sum())


def group_rows(by_subset: Mapping[str, Sequence[Row]]) -> list[Row]:
    """The rows of a group's subsets under one name, weighted for the macro-average."""
    return [
        row
        | {
            "id": f"{subset}/{row['id']}",
            "subset": subset,
            "weight": 1 / (len(by_subset) * len(rows)),
        }
        for subset, rows in by_subset.items()
        for row in rows
    ]


def sample_id(index: int, *contents: Any) -> str:
    """Index and content hash: equal in two runs exactly where both saw the same item."""
    text = json.dumps(contents, ensure_ascii=False, sort_keys=True, default=str)
    return f"{index}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def digest(rows: Iterable[Row]) -> str:
    """Hash of all sample ids in order: equal data, prompts and limit give equal digests."""
    return hashlib.sha256("\n".join(row["id"] for row in rows).encode()).hexdigest()[:16]


def collect(samples: Sequence[Mapping[str, Any]], byte_weighted: bool) -> list[Row]:
    """Rows from lm-eval's logged samples of one leaf task, filters merged into one row a document.

    With several filters (a stranger's task), a metric's name gets the filter's appended.
    """
    filters = {sample["filter"] for sample in samples}
    rows: dict[int, Row] = defaultdict(dict)
    for sample in samples:
        row = rows[sample["doc_id"]]
        if not row:
            shown = [
                [part for part in args if isinstance(part, str)] for args in sample["arguments"]
            ]
            row["id"] = sample_id(sample["doc_id"], shown, sample["target"])
            row["weight"] = float(len(shown[0][0].encode())) if byte_weighted else 1.0
            accuracies = [name for name in sample["metrics"] if name.startswith("acc")]
            if accuracies and len(sample["resps"]) > 1:
                row["chance"] = _chance(sample)
        suffix = f",{sample['filter']}" if len(filters) > 1 else ""
        row |= {name + suffix: _number(name, sample[name]) for name in sample["metrics"]}
        generated = sample["resps"][0][0]
        if isinstance(generated, str):
            row["output"] = generated[:500]
    return list(rows.values())


def _chance(sample: Mapping[str, Any]) -> float:
    """How often a guesser among the choices is right: several answers can be."""
    target, choices = sample["target"], len(sample["resps"])
    if "acc_mutual_info" in sample["metrics"]:
        choices //= 2  # each was asked without its question, too
    return (len(target) if isinstance(target, list) else 1) / choices


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(
            f"metric {name}: of one item it is {value!r}, no number",
            "let the task's process_results give a number for every metric",
        ) from None


def _columns(rows: Sequence[Row], metric: str) -> tuple[np.ndarray, np.ndarray]:
    weights = np.array([row["weight"] for row in rows], dtype=np.float64)
    return weights, np.array([row[metric] for row in rows], dtype=np.float64)
