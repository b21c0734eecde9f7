"""Reads the golden files: closed-form tensors, rows of labels and chunks, expected gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctdbench.method import Rows

FOLDER = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return loaded


def closed_form(spec: dict[str, Any]) -> Tensor:
    """x[b, p, v] = a * fn(ph + wb b + wp p + wv v + wpv p v), cast to float32 at the end."""
    rule, shape = spec["rule"], spec["shape"]
    b, p, v = np.meshgrid(*map(np.arange, shape), indexing="ij")
    phase = rule["ph"] + rule["wb"] * b + rule["wp"] * p + rule["wv"] * v + rule["wpv"] * p * v
    return torch.tensor(rule["a"] * getattr(np, rule["fn"])(phase), dtype=torch.float32)


def labelled_rows(logits: Tensor, labels: list[list[int]], row_chunk: list[list[int]]) -> Rows:
    """All rows of all documents; row r predicts token r + 1, so labels move up by one."""
    documents, length, columns = logits.shape
    token = torch.tensor([[max(v, -1) for v in row[1:]] + [-1] for row in labels]).flatten()
    chunk = torch.tensor(row_chunk)
    starts = torch.tensor([0, *(chunk.amax(1) + 1).cumsum(0)[:-1].tolist()])[:, None]
    place = torch.arange(length).repeat(documents)
    return Rows(
        logits=logits.reshape(-1, columns),
        token=token,
        chunk=torch.where(chunk >= 0, chunk + starts, -1).flatten(),
        supervised=token >= 0,
        document=torch.arange(documents).repeat_interleave(length),
        byte_start=place,
        byte_end=place + 1,
    )


def check_gradient(gradient: np.ndarray, expected: dict[str, Any], shape: list[int]) -> None:
    """Norm, norms of rows and entries, to 1e-5 (plus 1e-6 of the whole norm)."""
    tolerance = {"rtol": 1e-5, "atol": 1e-6 * expected["l2"]}
    whole = gradient.reshape(shape).astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(whole), expected["l2"], rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=-1), expected["row_l2"], **tolerance)
    for *index, value in expected["entries"]:
        np.testing.assert_allclose(whole[tuple(index)], value, **tolerance)
