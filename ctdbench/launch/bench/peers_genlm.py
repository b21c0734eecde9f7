"""genlm-bytes' beam over a model's tokens and our estimators of its byte distributions.

All read SmolLM2-135M from its wheel, in float32. Their beam runs as their README calls it:
`logp_next`, then prune, then the next byte; specials count as its end of text, as in ours. Building
the vocabulary's trie is left out on both sides (theirs takes seconds), and theirs starts every
repeat with an empty cache and gets all texts at once, for its model batches them. How good an
estimate is: mean Jensen-Shannon divergence, in bits, from our beam at a width of 60 that prunes
below 0.0001.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctdbench import ops, registry
from ctdbench.distill import models
from ctdbench.distill.byte_beam import beam_distributions
from ctdbench.distill.models import Side
from ctdbench.evaluate.divergence import jensen_shannon
from ctdbench.launch.bench.peers_comparison import Comparison, Settings, in_turns, missing, threads
from ctdbench.text.vocabulary import ByteTrie

TEXTS = (
    b"Maya bought three notebooks and a box of twelve pencils before her first day of school. "
    b"The shop on Harbour Street had raised its prices in June.",
    b"She paid 14.60 euros, 2.35 more than last year, and walked home along the river to save the "
    b"bus fare. A ferry passed her under the old bridge.",
    b"Rye bread needs a sourdough: yeast alone leaves the crumb sticky, because its enzymes go on "
    b"cutting starch while the loaf is in the oven.",
    b"A list in Python grows by about an eighth when it is full, so that appending n items copies "
    b"fewer than nine times n references in all.",
)
WIDTH, PRUNE = 10, 0.01
WIDE_WIDTH, WIDE_PRUNE = 60, 1e-4
TARGETS = {"path": (100.0, False), "beam": (5.0, True)}  # speed; divergence as theirs at most
THEIRS = "genlm-bytes"

Estimator = Callable[[], Tensor]  # -> [bytes, 257]


def compare(settings: Settings) -> list[Comparison]:
    """`path` on one text and `beam` on several, beside their beam on the same."""
    side = models.load_side(registry.load_pair("smol-mistral").teachers[0])
    trie = ByteTrie(side.tokens.vocabulary)
    several = [text[: settings.beam_bytes] for text in TEXTS]
    narrow = partial(beam, width=WIDTH, prune=PRUNE)
    asked: dict[str, tuple[Callable[..., Tensor], list[bytes]]] = {
        "path": (path, [b" ".join(several[:2])]),
        "beam": (narrow, several),
    }
    with threads(1), asyncio.Runner() as runner, torch.no_grad():
        return [
            _compared(
                name,
                partial(estimate, side, trie, texts),
                genlm_beam(side, texts, runner),
                beam(side, trie, texts, width=WIDE_WIDTH, prune=WIDE_PRUNE),
                settings,
            )
            for name, (estimate, texts) in asked.items()
        ]


def _compared(
    name: str, ours: Estimator, theirs: Estimator, wide: Tensor, settings: Settings
) -> Comparison:
    """wide [bytes, 257]: what both are held to."""
    estimators = {name: ours, THEIRS: theirs}
    apart = {
        key: float(jensen_shannon(estimate(), wide).mean()) for key, estimate in estimators.items()
    }
    timings = in_turns(estimators, settings.beam_repeats)
    rates = {key: len(wide) / timing.median for key, timing in timings.items()}
    size = f"{len(wide)} bytes, {settings.beam_repeats} repeats, 1 thread"
    least, bounded = TARGETS[name]
    return Comparison(
        f"bld {name} (genlm-bytes' beam)",
        (timings[name], timings[THEIRS]),
        least,
        f"{rates[name]:.2f} bytes/s (ours), {rates[THEIRS]:.2f} (theirs); mean divergence from "
        f"a wide beam {apart[name]:.3e} bits (ours), {apart[THEIRS]:.3e} (theirs); {size}",
        divergence=apart[name] / apart[THEIRS],
        bounded=bounded,
    )


def beam(side: Side, trie: ByteTrie, texts: Sequence[bytes], *, width: int, prune: float) -> Tensor:
    """Our beam."""
    assert side.specials.bos is not None
    bos = [side.specials.bos]
    found = beam_distributions(
        side.model,
        trie,
        texts,
        bos,
        width=width,
        prune=prune,
        encode=lambda text: side.tokens.encode(text).ids.tolist(),
    )
    return torch.cat(found)


def path(side: Side, trie: ByteTrie, texts: Sequence[bytes]) -> Tensor:
    """One forward over every text's own tokens."""
    return torch.cat([_path(side, trie, text) for text in texts])


def _path(side: Side, trie: ByteTrie, text: bytes) -> Tensor:
    encoding = side.tokens.encode(text)
    tokens = torch.from_numpy(encoding.ids)
    ids = torch.cat([torch.tensor([side.specials.bos]), tokens[:-1]])[None]
    states = models.hidden_states(side.model, ids, torch.ones_like(ids))[0]
    return ops.byte_distributions(
        trie,
        models.logits(side.model, states, trie.size).softmax(-1),
        tokens,
        torch.from_numpy(encoding.byte_end - encoding.byte_start),
        torch.zeros_like(tokens),
        estimator="path",
    )


def genlm_beam(side: Side, texts: Sequence[bytes], runner: asyncio.Runner) -> Estimator:
    """Their beam, with the trie of the vocabulary built."""
    try:
        from genlm.backend.llm import AsyncTransformer  # type: ignore[import-not-found]
        from genlm.bytes import BeamParams, ByteBeamState  # type: ignore[import-not-found]
    except ImportError as error:
        raise missing(error) from error
    model = AsyncTransformer(side.model, side.tokenizer)
    specials = [
        model.byte_vocab[place].byte_string
        for place, token in enumerate(side.tokens.vocabulary)
        if not token
    ]
    settings = BeamParams(K=WIDTH, prune_threshold=PRUNE, eos_byte_strings=specials)
    start = runner.run(ByteBeamState.initial(model, settings))

    def run() -> Tensor:
        model.clear_cache()
        return runner.run(_together(start, texts))

    return run


async def _together(state: Any, texts: Sequence[bytes]) -> Tensor:
    """All texts at once: their model batches what is asked for meanwhile."""
    return torch.cat(await asyncio.gather(*(_distributions(state, text) for text in texts)))


async def _distributions(state: Any, text: bytes) -> Tensor:
    """[bytes, 257]: theirs has the end of a token at 256, which is always empty, and that of the
    text at 257."""
    rows = []
    for byte in text:
        rows.append((await state.logp_next()).ps)
        state = await (state.prune() << byte)
    return torch.from_numpy(np.delete(np.exp(np.array(rows)), 256, axis=1))
