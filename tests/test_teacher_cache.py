"""Stored teacher states: what is read is what was computed, and it is computed once."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from counted_allocations import Casts
from harness_setup import (
    batch_of,
    documents,
    examples,
    llama_side,
    parameters_of,
    run_spec,
    teacher_of,
    train_once,
)
from torch import Tensor

from ctdbench.distill import teacher_cache
from ctdbench.distill.examples import Example, build_examples
from ctdbench.distill.teacher import Teacher
from ctdbench.distill.teacher_cache import StoredStates, store_states
from ctdbench.method import Needs

CPU = torch.device("cpu")
PLENTY = 10**9
HEAD_ALONE = Needs()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTDBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Documents of every live forward of a teacher."""
    seen: list[int] = []
    live = Teacher.live

    def counted(self: Teacher, ids: Tensor, mask: Tensor) -> Tensor:
        seen.append(len(ids))
        return live(self, ids, mask)

    monkeypatch.setattr(Teacher, "live", counted)
    return seen


def made(count: int) -> list[Example]:
    return examples(llama_side("student"), llama_side("teacher"), count)


def store(
    teacher: Teacher, found: Sequence[Example], limit: int = PLENTY, needs: Needs = HEAD_ALONE
) -> None:
    tokens = [example.teacher.sequence.ids for example in found]
    store_states(teacher, tokens, needs, limit, Accelerator(cpu=True))


def test_weights_are_cast_once_for_all_documents() -> None:
    side = llama_side("teacher")
    with Casts(side.model) as casts:
        store(Teacher(side, teacher_of(side).trie, "bfloat16", identity="one"), made(6))
    assert set(casts.found.values()) == {1}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_logits_from_stored_states_are_those_from_live_ones(precision: str) -> None:
    side = llama_side("teacher")
    live = Teacher(side, teacher_of(side).trie, precision, identity="one")
    stored = Teacher(side, live.trie, precision, identity="one")
    found = made(6)
    store(stored, found)
    for example in found:  # alone, as it was stored
        batch = batch_of([example]).teacher
        rows = batch.position
        expected = live.logits(live.hidden(batch)[rows])
        assert torch.equal(stored.logits(stored.hidden(batch)[rows]), expected)


def test_states_that_a_method_reads_itself_are_not_rounded() -> None:
    side = llama_side("teacher")
    live, stored = (Teacher(side, teacher_of(side).trie, "bfloat16", "one") for _ in range(2))
    found = made(1)
    store(stored, found, needs=Needs(teacher_hidden=True))
    batch = batch_of(found).teacher
    rows = batch.position
    assert torch.equal(stored.hidden(batch)[rows], live.hidden(batch)[rows])
    store(stored, found)
    assert not torch.equal(stored.hidden(batch)[rows], live.hidden(batch)[rows])


def test_documents_of_any_batch_are_read_back_in_their_places(calls: list[int]) -> None:
    taught = teacher_of(llama_side("teacher"))
    found = made(6)
    store(taught, found)
    del calls[:]
    batch = batch_of([found[4], found[0], found[5]]).teacher
    read = taught.hidden(batch)
    assert not calls
    torch.testing.assert_close(
        read[batch.position], taught.live(batch.ids, batch.mask).flatten(0, 1)[batch.position]
    )
    assert not read.reshape(*batch.ids.shape, -1)[batch.mask == 0].any()


def test_only_what_is_missing_is_computed_and_every_document_once(calls: list[int]) -> None:
    found = made(8)
    store(teacher_of(llama_side("teacher")), [*found[:3], *found[:3]])
    assert sum(calls) == 3
    store(teacher_of(llama_side("teacher")), found)
    assert sum(calls) == 8


def test_a_document_that_is_not_stored_leaves_the_teacher_live(calls: list[int]) -> None:
    taught = teacher_of(llama_side("teacher"))
    found = made(4)
    store(taught, found[:3])
    del calls[:]
    assert taught.hidden(batch_of(found).teacher).isfinite().all()
    assert calls == [4]


def test_more_than_the_limit_is_not_stored(tmp_path: Path, calls: list[int]) -> None:
    taught = teacher_of(llama_side("teacher"))
    found = made(4)
    tokens = sum(len(example.teacher.sequence.ids) for example in found)
    size = StoredStates.of(taught, HEAD_ALONE, CPU).size(tokens, taught.side.width)
    assert size == tokens * taught.side.width * 4
    store(taught, found, limit=size - 1)
    assert taught.stored is None
    assert not calls
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    store(taught, found, limit=size)
    (path,) = (tmp_path / "cache").rglob("*.safetensors")
    assert size < path.stat().st_size < size + 1000


def test_what_is_stored_already_takes_no_more_room(
    monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    found = made(4)
    store(teacher_of(llama_side("teacher")), found)
    del calls[:]
    monkeypatch.setattr(teacher_cache, "_free", lambda folder: 0)
    again = teacher_of(llama_side("teacher"))
    store(again, found)
    assert again.stored is not None
    store(again, found[:2])
    assert not calls


def test_a_full_disk_leaves_the_teacher_live(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(teacher_cache, "save_file", full)
    taught = teacher_of(llama_side("teacher"))
    store(taught, made(3))
    assert taught.stored is None


def test_shards_stay_small(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", 1000)
    taught = teacher_of(llama_side("teacher"))
    found = made(6)
    store(taught, found)
    assert taught.stored is not None
    assert len(list(taught.stored.folder.glob("*.safetensors"))) > 2
    del calls[:]
    taught.hidden(batch_of(found).teacher)
    assert not calls


def test_a_shard_cut_short_is_computed_anew(calls: list[int]) -> None:
    taught = teacher_of(llama_side("teacher"))
    found = made(3)
    store(taught, found)
    assert taught.stored is not None
    (path,) = taught.stored.folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    del calls[:]
    again = teacher_of(llama_side("teacher"))
    store(again, found)
    assert sum(calls) == 3
    again.hidden(batch_of(found).teacher)
    assert sum(calls) == 3


def test_stores_differ_by_teacher_and_precision() -> None:
    side = llama_side("teacher")
    trie = teacher_of(side).trie
    named = [("one", "float32"), ("two", "float32"), ("one", "bfloat16")]
    folders = {
        StoredStates.of(Teacher(side, trie, precision, identity), HEAD_ALONE, CPU).folder
        for identity, precision in named
    }
    assert len(folders) == 3


@pytest.mark.parametrize("method", ["bld", "alm"])
def test_a_grid_pays_the_teacher_once(method: str, tmp_path: Path, calls: list[int]) -> None:
    options: dict[str, Any] = {"bytes": "mixed"} if method == "bld" else {}
    live, report = train_once(run_spec(method, options), tmp_path / "live")
    del calls[:]
    first, _ = train_once(run_spec(method, options, teacher_cache="1MB"), tmp_path / "first")
    assert calls
    del calls[:]
    second, _ = train_once(run_spec(method, options, teacher_cache="1MB"), tmp_path / "second")
    assert not calls
    assert report.steps > 2
    for name, value in parameters_of(first).items():
        assert torch.equal(value, parameters_of(second)[name]), name  # whoever came first
        torch.testing.assert_close(value, parameters_of(live)[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("sft", {}), ("gold", {"on_policy": 1.0, "generated_tokens": 8, "prompt_bytes": 8})],
)
def test_nothing_is_stored_that_no_step_would_read(
    method: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    train_once(run_spec(method, teacher_cache="1MB", **settings), tmp_path / "run")
    assert not (tmp_path / "cache" / "states").exists()


def test_every_teacher_has_its_own_states(calls: list[int]) -> None:
    student, first, second = (llama_side(name) for name in ("student", "teacher", "teacher2"))
    found, _ = build_examples(documents(4), student, first, others=[second])
    taught = [
        Teacher(side, teacher_of(side).trie, "float32", identity=str(index))
        for index, side in enumerate((first, second))
    ]
    store(taught[0], found)
    store(taught[1], [example.others[0] for example in found])
    batch = batch_of(found)
    del calls[:]
    read = [taught[0].hidden(batch.teacher), taught[1].hidden(batch.others[0].teacher)]
    assert not calls
    assert not np.allclose(*read)
