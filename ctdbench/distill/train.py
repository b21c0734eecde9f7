"""The training loop: data order, schedule, budget in bytes, checkpoints, resume, metrics."""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from ctdbench.distill import checkpoint, models, references, rollouts
from ctdbench.distill.batches import Batch, collate
from ctdbench.distill.corpus import Corpus
from ctdbench.distill.examples import Example
from ctdbench.distill.models import Side
from ctdbench.distill.precision import resolve
from ctdbench.distill.sources import OnPolicy, training_examples
from ctdbench.distill.step import Balance, Step, StepReport
from ctdbench.distill.teacher import Teacher
from ctdbench.distill.view import Guide, Network
from ctdbench.errors import RunError
from ctdbench.method import Method, PairInfo, PairTables, Trainable
from ctdbench.results import write_jsonl_atomic
from ctdbench.spec import RunSpec
from ctdbench.text.edit_distance import minimum_edit_map
from ctdbench.text.projection import Projection, build_projection, encoder

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
MODULES = "modules.safetensors"
EDIT_MAP_VERSION = 1


@dataclass(frozen=True)
class Setting:
    """What a run trains with: both sides, the method, and the tables of the pair.

    others: further teachers, each with its tables.
    """

    student: Side
    teacher: Teacher
    method: Method
    tables: PairTables
    corpus: Corpus
    others: tuple[Guide, ...] = ()

    @property
    def teachers(self) -> list[Teacher]:
        """All teachers, the first one first."""
        return [self.teacher, *(guide.teacher for guide in self.others if guide.teacher)]


@dataclass
class Progress:
    """Counters of a run; they survive in its checkpoints."""

    step: int = 0
    text_bytes: int = 0
    student_tokens: int = 0
    teacher_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class TrainReport:
    """What training cost, over all processes; times are of this process.

    skipped, generated: documents by reason and by kind. setup: what followed from the settings and
    the models, for the record (`_setup`).
    """

    steps: int
    text_bytes: int
    student_tokens: int
    teacher_tokens: int
    train_seconds: float
    flops: float
    peak_memory_bytes: int
    skipped: dict[str, int] = field(default_factory=dict)
    generated: dict[str, int] = field(default_factory=dict)
    setup: dict[str, Any] = field(default_factory=dict)


def pair_tables(student: Side, teacher: Side) -> PairTables:
    """The tables of two loaded sides."""
    vocabularies = student.tokens.vocabulary, teacher.tokens.vocabulary
    special_pairs = student.specials.pairs(teacher.specials)

    def projection() -> Projection:
        return build_projection(
            *vocabularies,
            encode_student=encoder(student.tokens),
            encode_teacher=encoder(teacher.tokens),
            special_pairs=special_pairs,
        )

    return PairTables.build(
        *vocabularies,
        projection=projection,  # built by who asks for it: it takes seconds
        special_pairs=special_pairs,
        student_special=_special_ids(student),
        teacher_special=_special_ids(teacher),
        edit_mapping=cached_edit_map,
    )


def _special_ids(side: Side) -> list[int]:
    return [index for index, token in enumerate(side.tokens.vocabulary) if not token]


def cached_edit_map(
    queries: Sequence[bytes], others: Sequence[bytes], special_pairs: Sequence[tuple[int, int]]
) -> NDArray[np.int64]:
    """`minimum_edit_map`, kept in the cache by content: it takes up to minutes."""
    named = [[token.hex() for token in side] for side in (queries, others)]
    content = json.dumps([EDIT_MAP_VERSION, *named, [list(pair) for pair in special_pairs]])
    key = hashlib.sha256(content.encode()).hexdigest()
    path = references.cache_dir() / "edit_maps" / f"{key}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({"map": minimum_edit_map(queries, others, special_pairs)}, temporary)
        temporary.replace(path)
    return load_file(path)["map"]  # type: ignore[no-any-return]


def derived_seed(*parts: object) -> int:
    """A seed from names, so that adding a method never changes another's numbers."""
    digest = hashlib.sha256("/".join(map(str, ("ctdbench", *parts))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def train(
    spec: RunSpec,
    setting: Setting,
    folder: Path,
    accelerator: Accelerator,
    *,
    progress: bool = True,
) -> tuple[Network, TrainReport]:
    """Train the pair's student, resuming from the newest checkpoint under `folder`.

    Raises UserError if the corpus is too small or leaves no usable document, RunError if the loss
    or its gradient stops being finite.
    """
    teachers = setting.teachers
    examples, skipped = training_examples(
        spec,
        setting.corpus,
        setting.method,
        setting.student,
        teachers,
        accelerator,
        progress=progress and accelerator.is_main_process,
    )
    batches = list(_global_batches(examples, spec.train.batch_documents))
    network, optimizer = build_network(spec, setting)
    network.to(accelerator.device).eval()  # no dropout: a resumed run ends in the same numbers
    done = Progress(**(checkpoint.load(folder / CHECKPOINTS, network, optimizer) or {}))
    step = Step(
        accelerator.prepare(network),
        setting.teacher,
        setting.method,
        setting.tables,
        accelerator=accelerator,
        others=setting.others,
        weight=spec.pair.teachers[0].weight,
        precision=resolve(spec.train.precision, accelerator.device),
        block_rows=spec.train.block_rows,
        balancing=balancing(spec, setting.method),
    )
    writer = OnPolicy.of(spec, setting.student, network.model, teachers, accelerator.device)
    loop = _Loop(spec, setting, step, optimizer, folder, done, len(batches), writer)
    loop.run(batches, progress=progress and accelerator.is_main_process)
    report = _report(done, setting, network, skipped)
    setup = _setup(spec, setting, loop.batches(examples[:8]))
    return network, replace(report, generated=dict(writer.counts), setup=setup)


def balancing(spec: RunSpec, method: Method) -> Balance:
    """How the terms are weighted: as asked for, or as the method was published."""
    return method.balance if spec.train.balance == "auto" else spec.train.balance


class _Loop:
    """One pass over the global batches from where `done` stands."""

    def __init__(
        self,
        spec: RunSpec,
        setting: Setting,
        step: Step,
        optimizer: torch.optim.Optimizer,
        folder: Path,
        done: Progress,
        steps: int,
        writer: OnPolicy,
    ) -> None:
        self.spec, self.setting, self.step, self.optimizer = spec, setting, step, optimizer
        self.writer = writer
        self.folder, self.done, self.steps = folder, done, steps
        self.accelerator = step.accelerator
        self.peaks = [group["lr"] for group in optimizer.param_groups]

    def run(self, batches: Sequence[list[Example]], *, progress: bool) -> None:
        from tqdm import tqdm

        metrics = _Metrics(self.folder / METRICS, self.done.step, self.accelerator.is_main_process)
        tokens = sum(len(example.student.chunk) for batch in batches for example in batch)
        label = f"{self.spec.method} on {self.spec.pair.name}"
        with tqdm(
            total=tokens,
            initial=self.done.student_tokens,
            desc=label,
            unit="tok",
            unit_scale=True,
            disable=not progress,
        ) as bar:
            for examples in batches[self.done.step :]:
                before = self.done.student_tokens
                values = self._optimise(examples)
                metrics.write({**asdict(self.done), **values})
                bar.update(self.done.student_tokens - before)
                bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
                self._checkpoint()

    def _optimise(self, examples: list[Example]) -> dict[str, float]:
        started = time.monotonic()
        # What a method draws at random depends on the step alone, so a resumed run draws the same.
        torch.manual_seed(derived_seed("step", self.spec.seed, self.done.step))
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = self.writer.examples(examples[rank::processes], self.done.step)
        # A process without a document borrows one and is idle.
        report = self.step.gradients(self.batches(mine or examples[:1]), idle=not mine)
        self._clip()
        scale = schedule(self.done.step, self.steps, self.spec.train.warmup)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * scale
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done.step += 1
        self._count(mine)
        self.done.seconds += time.monotonic() - started
        return {"loss": report.loss, **report.terms, **self._moving_weights(report)}

    def _count(self, mine: Sequence[Example]) -> None:
        """Text and tokens of this step, over all processes."""
        taught = [side for example in mine for side in (example, *example.others)]
        counted = {
            "text_bytes": sum(len(example.text) for example in mine),
            "student_tokens": sum(len(example.student.chunk) for example in mine),
            "teacher_tokens": sum(len(example.teacher.chunk) for example in taught),
        }
        for name, count in self.step.reduced(counted).items():
            setattr(self.done, name, getattr(self.done, name) + int(count))

    def _moving_weights(self, report: StepReport) -> dict[str, float]:
        """The terms' weights, where balancing sets them anew at every step."""
        if self.step.balancing == "fixed":
            return {}
        return {f"weight {name}": weight for name, weight in report.weights.items()}

    def _clip(self) -> None:
        """Clip the student as a whole and every extra module by itself."""
        for part in (self.step.network.model, *self.step.network.extra.values()):
            norm = torch.nn.utils.clip_grad_norm_(part.parameters(), self.spec.train.clip)
            if not torch.isfinite(norm):
                raise RunError("the gradient is not finite", "lower train.learning_rate")

    def batches(self, mine: Sequence[Example]) -> list[Batch]:
        """Examples as micro-batches on this process's device."""
        size = self.spec.train.micro_batch or len(mine)
        sides = [self.setting.student, *(teacher.side for teacher in self.setting.teachers)]
        pads = [side.specials.pad or 0 for side in sides]
        parts = [mine[start : start + size] for start in range(0, len(mine), size)]
        return [collate(part, *pads).to(self.accelerator.device) for part in parts]

    def _checkpoint(self) -> None:
        every = self.spec.train.checkpoint_every
        if every and self.done.step % every == 0 and self.done.step < self.steps:
            if self.accelerator.is_main_process:
                folder = self.folder / CHECKPOINTS
                network = self.step.network
                checkpoint.save(folder, network, self.optimizer, asdict(self.done))
            self.accelerator.wait_for_everyone()


class _Metrics:
    """metrics.jsonl, one line a step; lines past the checkpoint resumed from are dropped."""

    def __init__(self, path: Path, step: int, active: bool) -> None:
        self.path = path
        self.active = active
        if active:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            write_jsonl_atomic(path, map(json.loads, lines[:step]))

    def write(self, values: dict[str, Any]) -> None:
        if self.active:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(values) + "\n")


def schedule(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over a share of the steps, then linear decay: the factor of a step's rate."""
    rising = math.ceil(steps * warmup)
    if step < rising:
        return (step + 1) / (rising + 1)
    return (steps - step) / max(steps - rising, 1)


def build_network(spec: RunSpec, setting: Setting) -> tuple[Network, torch.optim.AdamW]:
    """The trained network and its optimizer, from the pair's start."""
    model = setting.student.model
    if spec.pair.lora is None:
        model.requires_grad_(True)
    else:
        model.requires_grad_(False)
        torch.manual_seed(derived_seed("lora", spec.seed))
        model = models.add_lora(model, spec.pair.lora)
    extras = extra_modules(spec, setting)
    network = Network(
        model,
        len(setting.student.tokens.vocabulary),
        {name: extra.module for name, extra in extras.items()},
    )
    return network, _optimizer(spec, network, extras)


def extra_modules(spec: RunSpec, setting: Setting) -> dict[str, Trainable]:
    """The method's modules, initialised from a seed of their own."""
    torch.manual_seed(derived_seed("modules", spec.method, spec.seed))
    found = {}
    for guide in guides(setting):
        assert guide.teacher is not None
        pair = PairInfo(setting.student.width, guide.teacher.side.width, guide.tables)
        for name, extra in setting.method.modules(pair).items():
            found[name + guide.suffix] = extra
    return found


def save_modules(spec: RunSpec, setting: Setting, network: Network, folder: Path) -> None:
    """The modules that a method wants kept (`Trainable.keep`), as FOLDER/modules.safetensors."""
    kept = {
        f"{name}.{key}": tensor.detach().cpu().contiguous()
        for name, extra in extra_modules(spec, setting).items()
        if extra.keep
        for key, tensor in network.extra[name].state_dict().items()
    }
    if kept:
        temporary = folder / f"{MODULES}.tmp"
        safetensors.torch.save_file(kept, temporary)
        temporary.replace(folder / MODULES)


def _optimizer(spec: RunSpec, network: Network, extras: dict[str, Trainable]) -> torch.optim.AdamW:
    """AdamW with one group for the body, one for embeddings and head, one for each extra module."""
    settings = spec.train
    rate = settings.learning_rate or spec.pair.learning_rate
    moved = spec.pair.student.tokenizer not in (None, spec.pair.student.model)
    table_rate = settings.embedding_learning_rate or (10 * rate if moved else rate)
    inner = models.base_model(network.model)
    tables = {
        id(p)
        for m in (inner.get_input_embeddings(), inner.get_output_embeddings())
        for p in m.parameters()
    }
    student = [p for p in network.model.parameters() if p.requires_grad]
    groups = [
        ([p for p in student if id(p) not in tables], rate),
        ([p for p in student if id(p) in tables], table_rate),
        *((list(e.module.parameters()), e.learning_rate or rate) for e in extras.values()),
    ]
    filled = [{"params": params, "lr": peak} for params, peak in groups if params]
    return torch.optim.AdamW(filled, weight_decay=settings.weight_decay)


def _global_batches(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    for start in range(0, len(examples), size):
        yield list(examples[start : start + size])


def _report(
    done: Progress, setting: Setting, network: Network, skipped: dict[str, int]
) -> TrainReport:
    """FLOPs (Kaplan et al.): 6 x parameters x tokens for the student, 2 x for live teachers.

    Generating text is not in them.
    """
    student = sum(p.numel() for p in network.model.parameters())
    sizes = [sum(p.numel() for p in t.side.model.parameters()) for t in setting.teachers]
    flops = 6.0 * student * done.student_tokens
    if setting.method.needs.teacher:  # teacher_tokens are of all teachers: near enough, evenly
        flops += 2.0 * (sum(sizes) / len(sizes)) * done.teacher_tokens
    return TrainReport(
        steps=done.step,
        text_bytes=done.text_bytes,
        student_tokens=done.student_tokens,
        teacher_tokens=done.teacher_tokens,
        train_seconds=done.seconds,
        flops=flops,
        peak_memory_bytes=peak_memory(),
        skipped=skipped,
    )


def _setup(spec: RunSpec, setting: Setting, sample: Sequence[Batch]) -> dict[str, Any]:
    """How the terms were balanced, how each side rendered prompts, and what X-Token's W reaches.

    projection: share of the teacher's columns, and of the probability that it gives on `sample`.
    """
    sides = {"student": setting.student}
    sides |= {
        f"teacher{guide.suffix}": guide.teacher.side for guide in guides(setting) if guide.teacher
    }
    template = spec.train.template
    setup: dict[str, Any] = {
        "balance": balancing(spec, setting.method),
        "rendering": {name: rollouts.rendering(side, template) for name, side in sides.items()},
    }
    for index, guide in enumerate(guides(setting)):
        assert guide.teacher is not None
        if guide.tables.projection_used:
            laid = [(batch, *batch.others)[index] for batch in sample]
            mass = torch.stack([guide.teacher.mean_prediction(b.teacher) for b in laid]).mean(0)
            setup[f"projection{guide.suffix}"] = guide.tables.reached(mass)._asdict()
    return setup


def guides(setting: Setting) -> list[Guide]:
    """All teachers with their tables."""
    return [Guide(setting.teacher, setting.tables), *setting.others]


def peak_memory() -> int:
    """Bytes: the accelerator's peak where there is one, else this process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
