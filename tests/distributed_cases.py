"""Trainings on which one process and several must agree; as a program, a worker that runs some.

FSDP2 is what `accelerate launch --use_fsdp --fsdp_version 2` asks for. Accelerate offers it on
accelerators alone, so on a processor its plugin is put in by hand: all else is as on a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from harness_setup import (
    documents,
    float64,
    guides_of,
    llama_side,
    parameters_of,
    run_spec,
    setting_of,
    tokenizer,
)
from safetensors.torch import save_file
from tiny_models import tiny_model
from torch.distributed.tensor import DTensor

from ctdbench import registry
from ctdbench.distill import models, processes, train
from ctdbench.distill.corpus import Corpus
from ctdbench.distill.models import Side
from ctdbench.distill.setting import Setting
from ctdbench.errors import Terminated
from ctdbench.spec import RunSpec

DOCUMENTS = 11  # with 5 a step the last step has one document, and the second process none
STOPPED = 2  # of 3 steps
Kind = Literal["ddp", "fsdp"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Case:
    """What is trained; `train` are settings."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tied: bool = False
    lora: bool = False
    teachers: int = 1
    train: Mapping[str, Any] = field(default_factory=dict)


GENERATED = {"generated_tokens": 8}
# A random teacher does not write much.
SETTINGS = {"seqkd": {"generated_tokens": 64, "budget": 150}}
EVERY = {name: Case(name, train=SETTINGS.get(name, {})) for name in registry.methods()}
FURTHER = {
    "bld-tied": Case("bld", tied=True),
    "bld-lora": Case("bld", tied=True, lora=True),
    "bld-lora-untied": Case("bld", lora=True),
    "alm-gradmag": Case("alm", {"ce_weight": 1.0, "hidden_weight": 0.5}),
    "alm-gradmag-lora": Case("alm", {"ce_weight": 1.0, "hidden_weight": 0.5}, lora=True),
    "p-kl-learned": Case("p-kl", {"projection": "learned"}),
    "p-kl-two-teachers": Case("p-kl", teachers=2),
    "strict-on-policy": Case("strict", train={"on_policy": 0.6, **GENERATED}),
    "gold-on-policy-lora": Case("gold", lora=True, train={"on_policy": 0.6, **GENERATED}),
}
CASES = {**EVERY, **FURTHER}
# FSDP2 wants one type of number, and W's weights are float32 beside a student in float64.
SHARDED = [name for name in CASES if name != "p-kl-learned"]


def accelerator_of(kind: Kind, **settings: Any) -> Accelerator:
    """An accelerator on the processor that is told to train so."""
    made = Accelerator(cpu=True, **settings)
    if made.num_processes > 1:
        sharded = kind == "fsdp"
        made.state.distributed_type = DistributedType[("MULTI_CPU", "FSDP")[sharded]]
        made.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2) if sharded else None
    return made


def exact(side: Side) -> Side:
    return replace(side, model=side.model.double())


def teacher_of_case(case: Case) -> Side:
    """`kd` compares ids, and so needs a teacher with the student's tokenizer."""
    if case.method == "kd":
        return exact(Side.of(tiny_model(tokenizer("student"), seed=9).eval(), tokenizer("student")))
    return exact(llama_side("teacher"))


@contextmanager
def one_thread() -> Iterator[None]:
    """Models so small are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def stopping() -> Iterator[None]:
    """Within, a run stops after the step `STOPPED` as on SIGTERM, with a checkpoint."""
    own = train._Loop._checkpoint

    def checkpoint(loop: train._Loop, *, stop: bool) -> None:
        own(loop, stop=stop or loop.done.step == STOPPED)

    train._Loop._checkpoint = checkpoint  # type: ignore[method-assign]
    try:
        with suppress(Terminated):
            yield
    finally:
        train._Loop._checkpoint = own  # type: ignore[method-assign]


def setting_of_case(case: Case) -> tuple[RunSpec, Setting]:
    """The case's request, and models as they start, in float64."""
    corpus = Corpus("test", tuple(documents(DOCUMENTS)), (), {})
    settings = {
        "budget": sum(document.size for document in corpus.train),
        "batch_documents": 5,
        "micro_batch": 2,  # so that the processes have unequal numbers of micro-batches
        "learning_rate": 1e-3,
        "clip": 0.01,  # of every step and part
        "checkpoint_every": 2,
        **case.train,
    }
    spec = run_spec(case.method, dict(case.options), lora=case.lora, **settings)
    student = exact(llama_side("student", tie_word_embeddings=case.tied))
    setting = replace(setting_of(spec, student, teacher_of_case(case)), corpus=corpus)
    if case.teachers == 2:
        second = exact(llama_side("student"))
        setting = replace(setting, others=guides_of(student, [second], [0.5]))
    return spec, setting


@one_thread()
@float64()
def train_case(name: str, folder: Path, kind: Kind = "ddp") -> dict[str, torch.Tensor]:
    """Train a case with this process's share, from its checkpoint if there is one.

    Returns the parameters at the end, whole, and of adapters what they are merged to. In float64,
    so that only the order of sums differs: agreement within 1e-5 is then no matter of rounding.
    """
    case, accelerator = CASES[name], accelerator_of(kind)
    processes.check(accelerator)
    spec, setting = setting_of_case(case)
    before = setting.student.model.get_output_embeddings().weight.detach().clone()
    network, report = train.train(spec, setting, folder, accelerator, progress=False)
    assert report.steps == 3 or case.method == "seqkd"
    shares = [isinstance(p, DTensor) for p in setting.student.model.parameters()]
    assert shares == [kind == "fsdp" and report.processes > 1] * len(shares)
    inner = models.base_model(network.model)
    embeddings, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    assert not torch.equal(head.weight, before)
    assert (head.weight is embeddings.weight) == case.tied
    found = parameters_of(network)
    merged = models.merged(network.model).named_parameters() if case.lora else ()
    return found | {f"merged {name}": parameter.detach() for name, parameter in merged}


def run_job(job: str, folder: Path) -> None:
    """KIND/CASE trains to the end, KIND/CASE/stop stops on the way, .../resume goes on from there.

    Leaves what this process ended with.
    """
    kind, name, *todo = job.split("/")
    assert kind in KINDS
    assert os.environ["WORLD_SIZE"] == "2"
    if todo == ["stop"]:
        with stopping():
            train_case(name, folder / job, kind)
        return
    found = train_case(name, folder / job, kind)
    save_file(found, folder / job / f"rank{os.environ['RANK']}.safetensors")


def launch(jobs: Sequence[str], folder: Path) -> Path:
    """Run jobs in two processes, one after the other: a start costs more than a job."""
    in_two_processes(__file__, str(folder), json.dumps(list(jobs)))
    return folder


def in_two_processes(*command: str, **environment: str) -> str:
    """Start a program and its arguments twice, as one; what both printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


if __name__ == "__main__":
    for job in json.loads(sys.argv[2]):
        run_job(job, Path(sys.argv[1]))
