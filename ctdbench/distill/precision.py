"""Autocast: which precision a machine computes in, and the context that applies it."""

from __future__ import annotations

import torch


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
