"""Two processes train as one, by DDP and by FSDP2: over gloo on this machine's processor.

All methods, and what else there is to share: adapters, tied tables, several teachers, text that the
student writes, terms balanced by their gradients, checkpoints. `distributed_cases` is the worker.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest
from distributed_cases import CASES, KINDS, SHARDED, launch, stopping, train_case
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

One = Callable[[str], tuple[Path, dict[str, Tensor]]]

QUICK = (
    *("ddp/sft", "ddp/seqkd", "ddp/dskd", "ddp/alm-gradmag", "ddp/bld-lora"),
    *("ddp/strict-on-policy", "ddp/p-kl-two-teachers"),
    *("fsdp/bld-lora", "fsdp/alm-gradmag", "fsdp/strict-on-policy"),
)
EVERY = [f"{kind}/{name}" for kind in KINDS for name in (CASES if kind == "ddp" else SHARDED)]
# What has moments of its own, adapters, tied tables, or draws at random.
RESUMED = ("bld-lora", "dskd", "alm-gradmag", "gold-on-policy-lora")
QUICK_RESUMED = ("fsdp/dskd", "ddp/bld-lora")
EVERY_RESUMED = [f"{kind}/{name}" for kind in KINDS for name in RESUMED]
EVERY_RESUMED = [job for job in EVERY_RESUMED if job not in QUICK_RESUMED]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, own_cache: None) -> One:
    """A case trained by this process alone: its folder, and the parameters at the end."""

    @cache
    def trained(name: str) -> tuple[Path, dict[str, Tensor]]:
        folder = tmp_path_factory.mktemp("one") / name
        return folder, train_case(name, folder)

    return trained


def two(folder: Path, jobs: Sequence[str], resumed: Sequence[str]) -> Path:
    """What two processes make of the jobs, and of `resumed`: once begun, once from one process."""
    for job in resumed:
        with stopping():
            train_case(job.partition("/")[2], folder / job / "resume")
    todo = [f"{job}/{step}" for job in resumed for step in ("stop", "resume")]
    return launch([*jobs, *todo], folder)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory, own_cache: None) -> Path:
    return two(tmp_path_factory.mktemp("quick"), QUICK, QUICK_RESUMED)


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory, own_cache: None) -> Path:
    jobs = [job for job in EVERY if job not in QUICK]
    return two(tmp_path_factory.mktemp("every"), jobs, EVERY_RESUMED)


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name != "seconds"} for line in lines]


def check_metrics(found: Path, expected: Path) -> None:
    """Losses, terms, weights and counts of every step."""
    assert len(metrics(found)) == len(metrics(expected))
    for own, line in zip(metrics(found), metrics(expected), strict=True):
        assert own == pytest.approx(line, rel=1e-5, abs=1e-9)


def check_parameters(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def check_trained_as_one(job: str, folder: Path, one: One) -> None:
    alone, expected = one(job.split("/")[1])
    ranks = [load_file(folder / job / f"rank{rank}.safetensors") for rank in (0, 1)]
    for found in ranks:
        check_parameters(found, expected)
    assert all(ranks[0][name].equal(ranks[1][name]) for name in expected)
    check_metrics(folder / job, alone)
    kept, kept_alone = (sorted((path / "checkpoints").iterdir()) for path in (folder / job, alone))
    assert [path.name for path in kept] == [path.name for path in kept_alone]
    tensors = [load_file(paths[-1] / "tensors.safetensors") for paths in (kept, kept_alone)]
    check_parameters(*tensors)  # moments, too
    suffixes = {path.suffix for path in (folder / job).rglob("*") if path.is_file()}
    assert suffixes == {".jsonl", ".json", ".safetensors"}


def check_resumes(job: str, folder: Path, one: One, own: Path) -> None:
    """Begun by two and ended by one, and the other way round."""
    name = job.split("/")[1]
    alone, expected = one(name)
    begun = folder / job / "stop"
    assert [path.name for path in (begun / "checkpoints").iterdir()] == ["step-0000002"]
    shutil.copytree(begun, own)
    check_parameters(train_case(name, own), expected)
    check_metrics(own, alone)
    check_parameters(load_file(folder / job / "resume" / "rank0.safetensors"), expected)
    check_metrics(folder / job / "resume", alone)


@pytest.mark.parametrize("job", QUICK)
def test_two_processes_train_as_one(job: str, quick: Path, one: One) -> None:
    check_trained_as_one(job, quick, one)


@pytest.mark.slow
@pytest.mark.parametrize("job", [job for job in EVERY if job not in QUICK])
def test_two_processes_train_every_case_as_one(job: str, every: Path, one: One) -> None:
    check_trained_as_one(job, every, one)


@pytest.mark.parametrize("job", QUICK_RESUMED)
def test_a_run_goes_on_with_another_number_of_processes(
    job: str, quick: Path, one: One, tmp_path: Path
) -> None:
    check_resumes(job, quick, one, tmp_path / "own")


@pytest.mark.slow
@pytest.mark.parametrize("job", EVERY_RESUMED)
def test_every_run_goes_on_with_another_number_of_processes(
    job: str, every: Path, one: One, tmp_path: Path
) -> None:
    check_resumes(job, every, one, tmp_path / "own")
