"""What `accelerate launch` can ask for, and whole cells in two processes.

As a program: KIND and the arguments of `ctdbench`, one process of two.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from distributed_cases import KINDS, accelerator_of, in_two_processes
from harness_setup import run_spec, train_once
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers.distributed.fsdp import is_fsdp_enabled
from typer.testing import CliRunner

from ctdbench.cli import app
from ctdbench.distill import processes, train
from ctdbench.errors import RunError, UserError
from ctdbench.launch import cell

SHARDED = {  # what `accelerate launch --use_fsdp --fsdp_version 2` puts into the environment
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


def told(kind: DistributedType, **plugin: Any) -> Any:
    """As much of an accelerator as is checked."""
    chosen = FullyShardedDataParallelPlugin(**plugin) if plugin else None
    sharded = chosen is not None and chosen.fsdp_version == 2
    state = SimpleNamespace(fsdp_plugin=chosen)
    many = 1 if kind == DistributedType.NO else 2
    return SimpleNamespace(distributed_type=kind, is_fsdp2=sharded, state=state, num_processes=many)


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        (told(DistributedType.FSDP), "FSDP version 1"),
        (told(DistributedType.DEEPSPEED), "DEEPSPEED"),
        (told(DistributedType.FSDP, fsdp_version=2, cpu_offload=True), "offloading"),
        (told(DistributedType.FSDP, fsdp_version=2, activation_checkpointing=True), "activations"),
    ],
)
def test_what_is_not_served_is_told(asked: Any, name: str) -> None:
    with pytest.raises(UserError, match=f"accelerate launch: .*{name}.* not served"):
        processes.check(asked)


def test_processes_that_do_not_know_of_each_other_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    processes.check(told(DistributedType.NO))  # set by someone, but no launcher's child
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="8 processes were started"):
        processes.check(told(DistributedType.NO))
    processes.check(told(DistributedType.MULTI_GPU))


@pytest.mark.parametrize("kind", [DistributedType.NO, DistributedType.MULTI_GPU])
def test_every_process_loads_its_weights(
    kind: DistributedType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SHARDED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        "transformers.distributed.fsdp._is_torch_distributed_initialized", lambda: True
    )
    assert is_fsdp_enabled()
    processes.check(told(kind))
    assert not is_fsdp_enabled()
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
    asked = told(DistributedType.FSDP, fsdp_version=2)
    assert asked.state.fsdp_plugin.cpu_ram_efficient_loading
    processes.check(asked)
    assert not asked.state.fsdp_plugin.cpu_ram_efficient_loading
    assert not is_fsdp_enabled()


def test_processes_that_see_different_stores_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reduced(values: dict[str, float], _: Any) -> dict[str, float]:
        return {name: value + 2.0 for name, value in values.items()}  # the other is at step 2

    monkeypatch.setattr(train, "reduced", reduced)
    with pytest.raises(RunError, match="different checkpoints"):
        train_once(run_spec("sft"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_cell_in_two_processes_is_the_cell_in_one(kind: str, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    texts = [f"The fox counts {n} stones, then {n + 3} more, and sums them up." for n in range(60)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = ["run", "--method", "p-kl", "--set", "method.projection=learned"]
    arguments += ["--pair", "tiny", "--budget", "2kB", "--set", f"train.corpus=jsonl:{corpus}"]
    arguments += ["--set", "train.batch_documents=8", "--set", "train.precision=float32"]
    arguments += ["--set", "eval.points=2", "--tasks", "bpb_pydoc,teacher_jsd", "--limit", "2"]
    alone = [*arguments, "--store", str(tmp_path / "one")]
    done = CliRunner().invoke(app, alone)
    assert done.exit_code == 0, done.output
    both = in_two_processes(__file__, kind, *arguments, "--store", str(tmp_path / "two"), **SHARDED)
    assert len(both.splitlines()) == len(done.stdout.splitlines())  # one process speaks
    folders = [next((tmp_path / name).glob("tiny/p-kl/*")) for name in ("one", "two")]
    first, second = (json.loads((path / "result.json").read_text()) for path in folders)
    assert second["id"] == first["id"]
    assert (first["cost"]["processes"], second["cost"]["processes"]) == (1, 2)
    for task, scores in first["scores"].items():
        assert second["scores"][task] == pytest.approx(scores, rel=1e-4)
    assert second["points"][0]["scores"] == pytest.approx(first["points"][0]["scores"], rel=1e-4)
    kept = [load_file(path / "modules.safetensors") for path in folders]
    assert kept[0].keys() == kept[1].keys()
    for name, value in kept[0].items():
        assert_close(kept[1][name], value, rtol=0, atol=1e-4)
    assert not (folders[1] / "checkpoints").exists()


if __name__ == "__main__":
    from ctdbench.cli import main

    cell.Accelerator = partial(accelerator_of, sys.argv.pop(1))  # type: ignore[misc, assignment]
    main()
