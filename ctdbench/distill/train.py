"""The training loop: data order, schedule, budget in bytes, checkpoints, resume, metrics."""

from __future__ import annotations

import ctypes
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ctdbench.distill import checkpoint, processes
from ctdbench.distill.batches import Batch, collate, micro_batches
from ctdbench.distill.examples import Example
from ctdbench.distill.global_batch import reduced
from ctdbench.distill.metrics_file import MetricsFile
from ctdbench.distill.precision import resolve
from ctdbench.distill.setting import Setting, balancing, build_network, derived_seed, record
from ctdbench.distill.sources import OnPolicy, training_examples
from ctdbench.distill.step import Step, StepReport
from ctdbench.distill.teacher_cache import store_states
from ctdbench.distill.termination import deferred_sigterm
from ctdbench.distill.tracking import tracked
from ctdbench.distill.view import Network
from ctdbench.errors import RunError, Terminated, UserError
from ctdbench.results import CHECKPOINTS, METRICS
from ctdbench.rows import LOGGED
from ctdbench.spec import RunSpec

Score = Callable[[nn.Module], Mapping[str, float]]  # a student on the way -> its scores, by name


@dataclass
class Progress:
    """Counters of a run; they survive in its checkpoints."""

    step: int = 0
    text_bytes: int = 0
    student_tokens: int = 0
    teacher_tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory_bytes: int = 0
    generated: dict[str, int] = field(default_factory=dict)


COUNTED = LOGGED[:5]  # in metrics.jsonl, of `Progress`


@dataclass(frozen=True)
class TrainReport:
    """What training cost, over all processes; times and memory are of this process.

    teacher_tokens: of the documents as all teachers read them, where the method runs teachers; as
    the first teacher wrote them, where it asks for its text; else 0. cpu_seconds: processor time of
    the steps, of all threads. skipped, generated: documents by reason and by kind. prepare_seconds:
    before the first step, the teacher's writing included unless its text was in the cache. setup:
    what followed from the settings and the models (`setting.record`).
    """

    steps: int
    text_bytes: int
    student_tokens: int
    teacher_tokens: int
    train_seconds: float
    cpu_seconds: float
    flops: float
    peak_memory_bytes: int
    processes: int = 1
    skipped: dict[str, int] = field(default_factory=dict)
    generated: dict[str, int] = field(default_factory=dict)
    prepare_seconds: float = 0.0
    setup: dict[str, Any] = field(default_factory=dict)


def train(
    spec: RunSpec,
    setting: Setting,
    folder: Path,
    accelerator: Accelerator,
    *,
    score: Score | None = None,
    progress: bool = True,
) -> tuple[Network, TrainReport]:
    """Train the pair's student, resuming from the newest checkpoint under `folder`.

    score: what `eval.points` asks for before the end; its numbers go into metrics.jsonl.

    Raises UserError if the corpus is too small or leaves no usable document, RunError if the loss
    or its gradient stops being finite.
    """
    teachers, started = setting.teachers, time.monotonic()
    reset_peak_memory()  # the baselines were evaluated before, in this process
    examples, skipped = training_examples(
        spec,
        setting.corpus,
        setting.method,
        setting.student,
        teachers,
        accelerator,
        progress=progress and accelerator.is_main_process,
    )
    _store_teacher_states(spec, setting, examples, accelerator, progress=progress)
    prepared = time.monotonic()
    batches = list(_global_batches(examples, spec.train.batch_documents))
    network, optimizer = build_network(spec, setting)
    network.to(accelerator.device).eval()  # no dropout: a resumed run ends in the same numbers
    wrapped, whole = processes.wrap(network, optimizer, accelerator)
    done = Progress(**(checkpoint.load(folder / CHECKPOINTS, network, optimizer) or {}))
    step = Step(
        wrapped,
        setting.teacher,
        setting.method,
        setting.tables,
        accelerator=accelerator,
        others=setting.others,
        weight=spec.pair.teachers[0].weight,
        precision=resolve(spec.train.precision, accelerator.device),
        block_rows=spec.train.block_rows,
        balancing=balancing(spec, setting.method),
        compiled=spec.train.compile,
    )
    if (
        reduced({"step": float(done.step)}, accelerator)["step"]
        != done.step * accelerator.num_processes
    ):
        raise RunError(
            f"the processes find different checkpoints under {folder}",
            "put --store where all machines see it",
        )
    writer = OnPolicy.of(spec, setting.student, network.model, teachers, accelerator.device)
    loop = _Loop(spec, setting, step, optimizer, whole, folder, done, len(batches), writer, score)
    with tracked(accelerator, spec, folder, done.step):
        loop.run(batches, progress=progress and accelerator.is_main_process)
    sample = [batch for example in examples[:8] for batch in loop.batches([example])]
    report = _report(done, setting, network, skipped)
    report = replace(
        report, prepare_seconds=prepared - started, processes=accelerator.num_processes
    )
    return whole(), replace(report, setup=record(spec, setting, sample, accelerator.device))


class _Loop:
    """One pass over the global batches from where `done` stands."""

    def __init__(
        self,
        spec: RunSpec,
        setting: Setting,
        step: Step,
        optimizer: torch.optim.Optimizer,
        whole: Callable[[], Network],
        folder: Path,
        done: Progress,
        steps: int,
        writer: OnPolicy,
        score: Score | None,
    ) -> None:
        self.spec, self.setting, self.step, self.optimizer = spec, setting, step, optimizer
        self.writer, self.score, self.whole = writer, score, whole
        self.folder, self.done, self.steps = folder, done, steps
        self.accelerator = step.accelerator
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.metrics = MetricsFile(folder / METRICS, done.step, self.accelerator.is_main_process)

    def run(self, batches: Sequence[list[Example]], *, progress: bool) -> None:
        from tqdm import tqdm

        tokens = sum(len(example.student.chunk) for batch in batches for example in batch)
        label = f"{self.spec.method} on {self.spec.pair.name}"
        bar = tqdm(
            total=tokens,
            initial=self.done.student_tokens,
            desc=label,
            unit="tok",
            unit_scale=True,
            disable=not progress,
        )
        with bar, deferred_sigterm() as was_asked_to_stop:
            for examples in batches[self.done.step :]:
                before = self.done.student_tokens
                with self._naming(examples):
                    values = self._optimise(examples)
                counters = {name: getattr(self.done, name) for name in COUNTED}
                values = {**counters, **values, **self._scores()}
                self.metrics.write(values)
                del values["step"]  # trackers have a place of their own for it
                self.accelerator.log(values, step=self.done.step)
                bar.update(self.done.student_tokens - before)
                bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
                self._checkpoint(stop=was_asked_to_stop())

    def _optimise(self, examples: list[Example]) -> dict[str, float]:
        started, worked = time.monotonic(), time.process_time()
        # What a method draws at random depends on the step alone, so a resumed run draws the same.
        torch.manual_seed(derived_seed("step", self.spec.seed, self.done.step))
        rank, size = self.accelerator.process_index, self.accelerator.num_processes
        mine, written = self._written(examples[rank::size])
        # A process without a document borrows one and is idle.
        report = self.step.gradients(self.batches(mine or examples[:1]), idle=not mine)
        self._clip()
        scale = schedule(self.done.step, self.steps, self.spec.train.warmup)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * scale
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done.step += 1
        self._count(mine, written)
        self.done.seconds += time.monotonic() - started
        self.done.cpu_seconds += time.process_time() - worked
        return {"loss": report.loss, **report.terms, **self._moving_weights(report)}

    def _written(self, mine: Sequence[Example]) -> tuple[list[Example], dict[str, int]]:
        """Documents with what the student writes in their place, where the run is on-policy."""
        writer = self.writer
        if self.spec.train.on_policy:
            student = replace(writer.student, model=self.whole().model)
            writer = replace(writer, student=student)
        return writer.examples(mine, self.done.step)

    def _scores(self) -> Mapping[str, float]:
        """Of the student where it stands, at a point before the end; not part of the cost."""
        points, step = self.spec.eval.points, self.done.step
        due = {self.steps * number // points for number in range(1, points)}
        if self.score is None or step not in due - {self.steps}:
            return {}
        self._note_memory()
        student, main = self.whole().model, self.accelerator.is_main_process
        found = self.score(student) if main else {}
        self.accelerator.wait_for_everyone()
        reset_peak_memory()
        return found

    def _note_memory(self) -> None:
        self.done.peak_memory_bytes = max(self.done.peak_memory_bytes, peak_memory())

    def _count(self, mine: Sequence[Example], written: Mapping[str, int]) -> None:
        """Text, tokens and what the student wrote at this step, over all processes."""
        for name, count in reduced(dict(written), self.accelerator).items():
            self.done.generated[name] = self.done.generated.get(name, 0) + int(count)
        taught = self._taught(mine)
        counted = {
            "text_bytes": sum(len(example.text) for example in mine),
            "student_tokens": sum(len(example.student.chunk) for example in mine),
            "teacher_tokens": sum(len(example.teacher.chunk) for example in taught),
        }
        for name, count in reduced(counted, self.accelerator).items():
            setattr(self.done, name, getattr(self.done, name) + int(count))

    def _taught(self, mine: Sequence[Example]) -> list[Example]:
        """The documents once for every teacher that reads or wrote them."""
        needs = self.setting.method.needs
        if needs.teacher:
            return [side for example in mine for side in (example, *example.others)]
        return list(mine) if needs.text == "teacher" else []

    def _moving_weights(self, report: StepReport) -> dict[str, float]:
        """The terms' weights, where balancing sets them anew at every step."""
        if self.step.balancing == "fixed":
            return {}
        return {f"weight {name}": weight for name, weight in report.weights.items()}

    def _clip(self) -> None:
        """Clip the student as a whole and every extra module by itself."""
        for part in (self.step.network.model, *self.step.network.extra.values()):
            norm = processes.clip(list(part.parameters()), self.spec.train.clip)
            if not torch.isfinite(norm):
                raise RunError("the gradient is not finite", "lower train.learning_rate")

    def batches(self, mine: Sequence[Example]) -> list[Batch]:
        """Examples as micro-batches on this process's device."""
        sides = [self.setting.student, *(teacher.side for teacher in self.setting.teachers)]
        pads = [side.specials.pad or 0 for side in sides]
        size, needs = self.spec.train.micro_batch, self.setting.method.needs
        parts = micro_batches(mine, size, self.accelerator, needs)
        return [collate(part, *pads).to(self.accelerator.device) for part in parts]

    def _checkpoint(self, *, stop: bool) -> None:
        """Where one is due: every so many steps, before the evaluation, and before stopping."""
        stop = (
            reduced({"stop": float(stop)}, self.accelerator)["stop"] > 0
        )  # all processes, or none
        every, step = self.spec.train.checkpoint_every, self.done.step
        if stop or (every and (step % every == 0 or step == self.steps)):
            self.metrics.flush()
            self._note_memory()
            checkpoint.save(
                self.folder / CHECKPOINTS,
                self.step.network,
                self.optimizer,
                asdict(self.done),
                writes=self.accelerator.is_main_process,
            )
            self.accelerator.wait_for_everyone()
        if stop:
            raise Terminated(
                f"stopped by SIGTERM after step {step} of {self.steps}, with a checkpoint",
                "the same command goes on from there",
            )

    @contextmanager
    def _naming(self, examples: Sequence[Example]) -> Iterator[None]:
        """What breaks within a step is told with the step and the documents of its batch."""
        try:
            yield
        except Exception as error:
            if isinstance(error, UserError) and not isinstance(error, RunError):
                raise
            told, hint = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", ""
            if isinstance(error, RunError):
                told, hint = error.message, error.hint
            first = self.done.step * self.spec.train.batch_documents + 1
            texts = [repr(example.text[:24].decode(errors="ignore")) for example in examples]
            shown = ", ".join(texts[:4]) + ", ..." * (len(texts) > 4)
            raise RunError(
                f"method {self.spec.method}: {told}, at step {self.done.step + 1} on documents "
                f"{first} to {first + len(texts) - 1} in their order ({shown})",
                hint,
            ) from error


def schedule(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over a share of the steps, then linear decay: the factor of a step's rate."""
    rising = math.ceil(steps * warmup)
    if step < rising:
        return (step + 1) / (rising + 1)
    return (steps - step) / max(steps - rising, 1)


def _store_teacher_states(
    spec: RunSpec,
    setting: Setting,
    examples: Sequence[Example],
    accelerator: Accelerator,
    *,
    progress: bool,
) -> None:
    """Let the teachers read their states of the documents from disk, as far as settings allow.

    What the student writes is not known beforehand.
    """
    limit, needs = spec.train.teacher_cache, setting.method.needs
    if limit is None or spec.train.on_policy or not needs.teacher_states:
        return
    laid = [[example, *example.others] for example in examples]
    for teacher, documents in zip(setting.teachers, zip(*laid, strict=True), strict=True):
        tokens = [document.teacher.sequence.ids for document in documents]
        store_states(teacher, tokens, needs, limit, accelerator, progress=progress)


def _global_batches(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    for start in range(0, len(examples), size):
        yield list(examples[start : start + size])


def _report(
    done: Progress, setting: Setting, network: Network, skipped: dict[str, int]
) -> TrainReport:
    """FLOPs (Kaplan et al.): 6 x parameters x tokens for the student, 2 x for the teachers, as if
    no other run had stored their states. Generating text is not in them.
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
        cpu_seconds=done.cpu_seconds,
        flops=flops,
        peak_memory_bytes=max(done.peak_memory_bytes, peak_memory()),
        skipped=skipped,
        generated=done.generated,
    )


def reset_peak_memory() -> None:
    """Let `peak_memory` count from here on, where the system can: what came before does not."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(AttributeError, OSError, TypeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)  # else what an evaluation has freed stays in the process
    with suppress(OSError):  # Linux alone has it
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int:
    """Bytes: the accelerator's peak where there is one, else this process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Linux: `ru_maxrss` begins at the peak of the process that started this one.
    with suppress(OSError, IndexError):
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
