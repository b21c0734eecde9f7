"""Two processes train as one: DDP over gloo on this machine's processor.

The worker is this file, started by torch.distributed.run; it leaves what every process ended with.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from harness_setup import (
    documents,
    float64,
    guides_of,
    llama_side,
    parameters_of,
    run_spec,
    setting_of,
)
from safetensors.torch import load_file, save_file

from ctdbench.distill import train
from ctdbench.distill.corpus import Corpus
from ctdbench.distill.models import Side

DOCUMENTS = 11  # with 5 a step the last step has one document, and the second process none
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft-full": ("sft", {}),
    "uld-full": ("uld", {}),
    "bld-full": ("bld", {"tied": True}),
    "bld-lora": ("bld", {"tied": True, "lora": True}),
    "bld-lora-untied": ("bld", {"lora": True}),
    "gold-full": ("gold", {}),
    "p-kl-full": ("p-kl", {}),
    "alm-full": ("alm", {}),
    "alm-gradmag": ("alm", {"options": {"ce_weight": 1.0, "hidden_weight": 0.5}}),
    "dskd-full": ("dskd", {}),
    "mined-full": ("mined", {}),
    "strict-on-policy": ("strict", {"train": {"on_policy": 0.6, "generated_tokens": 8}}),
    "p-kl-two-teachers": ("p-kl", {"teachers": 2}),
}


def exact(side: Side) -> Side:
    return replace(side, model=side.model.double())


@float64()
def train_case(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """Train a case from its start with this process's share; the parameters at the end."""
    method, settings = CASES[name]
    corpus = Corpus("test", tuple(documents(DOCUMENTS)), (), {})
    spec = run_spec(
        method,
        settings.get("options"),
        lora=settings.get("lora", False),
        budget=sum(document.size for document in corpus.train),
        batch_documents=5,
        micro_batch=2,  # so that the processes have unequal numbers of micro-batches
        learning_rate=1e-3,
        checkpoint_every=2,
        **settings.get("train", {}),
    )
    student = exact(llama_side("student", tie_word_embeddings=settings.get("tied", False)))
    setting = setting_of(spec, student, exact(llama_side("teacher")))
    setting = replace(setting, corpus=corpus)
    if settings.get("teachers") == 2:
        second = exact(llama_side("student"))
        setting = replace(setting, others=guides_of(student, [second], [0.5]))
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == int(os.environ.get("WORLD_SIZE", "1"))
    embeddings, head = student.model.get_input_embeddings(), student.model.get_output_embeddings()
    before = head.weight.detach().clone()
    network, report = train.train(spec, setting, folder, accelerator, progress=False)
    assert report.steps == 3
    assert not torch.equal(head.weight, before)
    assert (head.weight is embeddings.weight) == settings.get("tied", False)
    return parameters_of(network)


def worker(folder: Path) -> None:
    rank = os.environ["RANK"]
    for name in CASES:
        save_file(train_case(name, folder / name), folder / name / f"rank{rank}.safetensors")


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, __file__, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(name: str, two_processes: Path, tmp_path: Path) -> None:
    expected = train_case(name, tmp_path)
    found = [load_file(two_processes / name / f"rank{rank}.safetensors") for rank in (0, 1)]
    assert found[0].keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[0][key], found[1][key]), f"the processes differ in {key}"
        torch.testing.assert_close(found[0][key], value, rtol=0, atol=1e-5)
    assert losses(two_processes / name) == pytest.approx(losses(tmp_path), rel=1e-5)
    kept = sorted((two_processes / name / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["step-0000002", "step-0000003"]


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
