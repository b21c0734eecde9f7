"""Autocast: which precision a machine computes in, and the context that applies it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def resolve(precision: str, device: torch.device) -> str:
    """`auto` -> bfloat16 where the device multiplies matrices in it, else float32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # oneDNN emulates bfloat16 on older processors, which is slower than float32.
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if device.type == "cpu" and native else "float32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context for a resolved precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@contextmanager
def casts_kept(model: nn.Module, precision: str) -> Iterator[None]:
    """Many forward passes of one model without gradients, with its weights cast once for all.

    Autocast by itself keeps casts within one pass, and those of frozen weights not at all. What it
    keeps takes half of the weights in float32.
    """
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(precision == "bfloat16")
    try:
        # Casts last as long as the outermost autocast, and one that is not enabled counts, too.
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.clear_autocast_cache()  # casts made without gradient are for nobody else
        for parameter in frozen:
            parameter.requires_grad_(False)
