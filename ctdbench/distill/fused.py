"""Cross-entropy straight from states and head on a GPU: cut-cross-entropy (arXiv 2411.09009).

It pays where nothing else wants the logits, that is for `sft`. The package is Apple's own.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ctdbench.distill import models
from ctdbench.method import Rows, Term

PACKAGE = "cut_cross_entropy"
DEVICES = ("cuda",)  # its kernels are written in Triton
LEFT_OUT = -100  # the label of a row that does not count


def can_fuse(model: Any, device: torch.device, precision: str) -> bool:
    """Whether the package is there and takes this head, on this device, in this precision."""
    suits = device.type in DEVICES and precision == "bfloat16"
    return suits and find_spec(PACKAGE) is not None and models.is_plain_head(model)


def cross_entropy(model: Any, rows: Rows, columns: int) -> Term:
    """As `method.cross_entropy`, from `rows.hidden` [R, d] and the head's first `columns` rows.

    Differentiable in both, whose gradients are computed in bfloat16, as autocast would.
    """
    from cut_cross_entropy import linear_cross_entropy

    assert rows.hidden is not None
    head = models.base_model(model).get_output_embeddings()
    scored = rows.scored()
    nll: Tensor = linear_cross_entropy(
        rows.hidden.bfloat16(),
        head.weight[:columns].bfloat16(),
        rows.token.masked_fill(~scored, LEFT_OUT),
        ignore_index=LEFT_OUT,
        softcap=models.softcap(model),
        reduction="sum",
        filter_eps=None,  # no gradient is left out for being small
    )
    return Term(nll.float(), scored.sum())
