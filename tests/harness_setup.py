"""Two small models with unlike tokenizers, documents, and steps over them, for harness tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tiny_models import bpe_tokenizer, tiny_model
from torch import Tensor, nn

from ctdbench.distill import setting as setup
from ctdbench.distill import tiny, train
from ctdbench.distill.batches import Batch, collate
from ctdbench.distill.corpus import Corpus, Document, Segment
from ctdbench.distill.examples import Example, build_examples
from ctdbench.distill.models import Side
from ctdbench.distill.step import Balance, Step, StepReport
from ctdbench.distill.teacher import Teacher
from ctdbench.distill.view import Guide, Network
from ctdbench.method import Method, PairInfo, create
from ctdbench.spec import Lora, PairSpec, RunSpec, TrainSpec

METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sft", {}),
    ("uld", {}),
    ("uld", {"alignment": "chunks"}),
    ("bld", {"bytes": "path"}),
    ("bld", {"bytes": "mixed"}),
    ("bld", {"bytes": "mixed", "reduction": "token_sum"}),
    ("bld", {"kl_weight": 0.0}),
)
IDS = [name + "".join(f"-{value}" for value in options.values()) for name, options in METHODS]
WORDS = (
    "the fox jumps",
    "zwölf Häuschen",
    "42 + 17 = 59",
    "我们应选择",
    "again, and",
    "\n\tnaïve 👍",
)


@contextmanager
def float64() -> Iterator[None]:
    """Modules and quotients of counts in float64 within, so that only the order of sums differs."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@lru_cache
def tokenizer(name: str) -> Any:
    """Byte-level BPE: `student` (340 ids, no padding token) or `teacher` (400 ids)."""
    return bpe_tokenizer() if name == "student" else tiny.make_tokenizer(400)


def llama_side(name: str, **options: Any) -> Side:
    """A random Llama of two layers; options go to its config."""
    own = tokenizer(name)
    return Side.of(tiny_model(own, seed=len(name), **options).eval(), own)


def float64_side(name: str) -> Side:
    """A random GPT-2 in float64: unlike Llama's, its layers compute in the precision they have."""
    from transformers import GPT2Config, GPT2LMHeadModel

    own = tokenizer(name)
    torch.manual_seed(len(name))
    config = GPT2Config(
        vocab_size=len(own) + 5,  # padded, as real models are
        n_embd=24 if name == "student" else 32,
        n_layer=2,
        n_head=2,
        n_positions=1024,
        initializer_range=0.3,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
    )
    return Side.of(GPT2LMHeadModel(config).double().eval(), own)


def documents(count: int, *, prompts: bool = True) -> list[Document]:
    """Documents of different lengths; every third one has an unsupervised prompt."""
    made = []
    for index in range(count):
        words = [WORDS[(index + k) % len(WORDS)] for k in range(2 + 3 * index % 7)]
        segments = [Segment(" ".join(words) + f" {index}")]
        if prompts and index % 3 == 1:
            segments.insert(0, Segment("What comes next?", "user", supervised=False))
        made.append(Document(tuple(segments), complete=index % 4 != 3))
    return made


def examples(
    student: Side, teacher: Side, count: int = 8, others: Sequence[Side] = ()
) -> list[Example]:
    found, skipped = build_examples(documents(count), student, teacher, others=others)
    assert not skipped
    return found


def batch_of(found: Sequence[Example]) -> Batch:
    return collate(found, 0, 0, *(0 for _ in found[0].others))


def teacher_of(side: Side) -> Teacher:
    tables = setup.pair_tables(side, side)
    return Teacher(side, tables.teacher_trie, "float32", identity="test")


def network_of(method: Method, student: Side, *teachers: Side) -> Network:
    """Student and the method's modules, in the student's precision and all trained."""
    torch.manual_seed(3)
    modules = {}
    for number, teacher in enumerate(teachers, start=1):
        pair = PairInfo(student.width, teacher.width, setup.pair_tables(student, teacher))
        suffix = f"@{number}" if number > 1 else ""
        for name, extra in method.modules(pair).items():
            modules[name + suffix] = extra.module.to(student.model.dtype)
    for parameter in nn.ModuleDict(modules).parameters():
        nn.init.normal_(parameter, std=0.3)  # heads that start at zero would hide mistakes
    return Network(student.model, len(student.tokens.vocabulary), modules)


def make_step(
    method: str | Method,
    options: dict[str, Any] | None = None,
    *,
    student: Side,
    teacher: Side,
    others: Sequence[Side] = (),
    weights: Sequence[float] = (1.0, 1.0, 1.0),
    balancing: Balance = "fixed",
    block_rows: int = 64,
    compiled: bool = False,
) -> Step:
    found = create(method, options) if isinstance(method, str) else method
    return Step(
        network_of(found, student, teacher, *others),
        teacher_of(teacher),
        found,
        setup.pair_tables(student, teacher),
        accelerator=Accelerator(cpu=True),
        others=guides_of(student, others, weights[1:]),
        weight=weights[0],
        block_rows=block_rows,
        balancing=balancing,
        compiled=compiled,
    )


def guides_of(student: Side, others: Sequence[Side], weights: Sequence[float]) -> tuple[Guide, ...]:
    """Further teachers, as a step takes them."""
    return tuple(
        Guide(teacher_of(side), setup.pair_tables(student, side), f"@{number}", weight)
        for number, (side, weight) in enumerate(zip(others, weights, strict=False), start=2)
    )


def gradients(step: Step, batches: Sequence[Batch]) -> tuple[StepReport, dict[str, Tensor]]:
    """The report and every parameter's gradient, from zero."""
    step.network.zero_grad(set_to_none=True)
    report = step.gradients(batches)
    named = step.network.named_parameters()
    return report, {name: p.grad.clone() for name, p in named if p.grad is not None}


def run_spec(
    method: str, options: dict[str, Any] | None = None, *, lora: bool = False, **settings: Any
) -> RunSpec:
    pair = PairSpec(
        name="test",
        student={"model": "tiny:student"},  # type: ignore[arg-type]
        teachers=({"model": "tiny:teacher"},),  # type: ignore[arg-type]
        lora=Lora(rank=4, alpha=8) if lora else None,
        learning_rate=1e-2,
    )
    fixed = {"precision": "float32", "batch_documents": 8, "block_rows": 64, "budget": 2000}
    fixed["teacher_cache"] = None  # the teachers here have one name and many weights
    settings = {**fixed, **settings}
    found = create(method, options)
    return RunSpec(
        method=method,
        pair=pair,
        options=found.options.model_dump(mode="json"),
        train=TrainSpec(**settings),
    )


def setting_of(spec: RunSpec, student: Side, teacher: Side, count: int = 48) -> setup.Setting:
    corpus = Corpus("test", tuple(documents(count)), (), {})
    return setup.Setting(
        student,
        teacher_of(teacher),
        create(spec.method, spec.options),
        setup.pair_tables(student, teacher),
        corpus,
    )


def train_once(
    spec: RunSpec, folder: Path, student: Side | None = None, teacher: Side | None = None
) -> tuple[Network, train.TrainReport]:
    """Train a fresh student of the pair to the end of the budget."""
    student = student or llama_side("student", tie_word_embeddings=True)
    setting = setting_of(spec, student, teacher or llama_side("teacher"))
    return train.train(spec, setting, folder, Accelerator(cpu=True), progress=False)


def parameters_of(network: Network) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in network.named_parameters()}
