"""Tokens that a model writes after others: in batches, with a KV cache, drawn reproducibly.

A row's random numbers are drawn before its first token, from a generator of its own, and a token is
the place where the cumulative distribution passes its number. So neither the rest of the batch, nor
its size, nor the number of processes changes what is drawn, beyond the rounding of logits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from ctdbench.distill.growing_cache import growing_cache
from ctdbench.distill.precision import autocast, casts_kept
from ctdbench.errors import UserError

WIDTH_STEP = 32  # prompts are padded to multiples of it: few shapes, for which kernels are built


@dataclass(frozen=True)
class Decoding:
    """How text is drawn; what is drawn for a prompt depends on no other prompt.

    temperature: 0 takes the likeliest token. top_k: draw among that many likeliest; 0: among all.
    max_new_tokens: an answer that is longer is cut there. batch_size: prompts at a time; it changes
    what is drawn as little as rounding does. Raises UserError for a value out of range.
    """

    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    batch_size: int = 32

    def __post_init__(self) -> None:
        least = {"temperature": 0, "top_k": 0, "max_new_tokens": 1, "batch_size": 1}
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise UserError(f"decoding: {name} is {getattr(self, name)}, not at least {bound}")


def uniforms(decoding: Decoding, *names: str) -> Tensor:
    """[max_new_tokens] float64 in [0, 1); they follow from the seed and the names alone."""
    digest = hashlib.sha256("\0".join([str(decoding.seed), *names]).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(decoding.max_new_tokens, generator=generator, dtype=torch.float64)


def draw(scores: Tensor, uniform: Tensor, decoding: Decoding) -> Tensor:
    """The token [B, 1] at which the distribution of scores [B, V] passes uniform [B, 1]."""
    if decoding.temperature == 0:
        return scores.argmax(-1, keepdim=True)
    best = scores.topk(min(decoding.top_k, scores.shape[-1])) if decoding.top_k else None
    kept = scores if best is None else best.values
    passed = (kept.double() / decoding.temperature).softmax(-1).cumsum(-1)
    # The sum is 1 only up to rounding; right=True never stops at a token without probability.
    place = torch.searchsorted(passed, uniform * passed[:, -1:], right=True)
    place = place.clamp_max(kept.shape[-1] - 1)
    return place if best is None else best.indices.gather(1, place)


def write_tokens(
    model: Any,
    openings: Sequence[Sequence[int]],
    numbers: Tensor,
    decoding: Decoding,
    *,
    stops: Collection[int],
    columns: int,
    pad: int = 0,
) -> list[list[int]]:
    """The tokens that the model adds to each opening, up to and with one of `stops`.

    numbers: `uniforms` of each row, [B, max_new_tokens]. columns: logits past them are no tokens.
    The model is one of transformers', inside `writing`.
    """
    width = -(-max(map(len, openings)) // WIDTH_STEP) * WIDTH_STEP
    rows = [[pad] * (width - len(ids)) + list(ids) for ids in openings]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in openings]
    choice = _Draw(decoding, numbers.to(model.device), width, columns)
    output = model.generate(
        input_ids=torch.tensor(rows, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        logits_processor=LogitsProcessorList([choice]),
        **growing_cache(model),
        generation_config=GenerationConfig(
            max_new_tokens=decoding.max_new_tokens,
            do_sample=False,
            use_cache=True,
            disable_compile=True,
            pad_token_id=pad,
            eos_token_id=sorted(stops) or None,
        ),
    )
    return [_up_to(ids, stops) for ids in output[:, width:].tolist()]


def _up_to(ids: list[int], stops: Collection[int]) -> list[int]:
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))]


class _Draw:
    """`draw` as a step of the library's greedy search: rules out all tokens but the drawn one."""

    def __init__(self, decoding: Decoding, numbers: Tensor, start: int, columns: int) -> None:
        """start: tokens that stand before the first drawn one."""
        self.decoding, self.numbers, self.start, self.columns = decoding, numbers, start, columns

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [B, at least V] -> 0 at the drawn token, -inf elsewhere."""
        number = self.numbers[:, input_ids.shape[1] - self.start, None]
        drawn = draw(scores[:, : self.columns], number, self.decoding)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


@contextmanager
def writing(model: Any, precision: str) -> Iterator[Any]:
    """The model ready for `write_tokens`, by its logits alone; outside it is as it was found."""
    training = [module for module in model.modules() if module.training]
    settings = model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()  # no repetition penalty of the model's own
    try:
        with casts_kept(model, precision), autocast(model.device, precision):
            yield model
    finally:
        model.generation_config = settings
        for module in training:
            module.training = True
