"""Examples from the cache and from worker processes are those built on the spot, and built once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from harness_setup import documents, llama_side, run_spec, setting_of, tokenizer

from ctdbench.distill import encoded_file, example_cache, examples, tiny
from ctdbench.distill.corpus import Document, Segment
from ctdbench.distill.example_cache import cached_examples
from ctdbench.distill.examples import AlignedSide, Example, build_examples
from ctdbench.distill.models import Side
from ctdbench.distill.sources import training_examples
from ctdbench.distill.tokenizers import Specials
from ctdbench.errors import RunError
from ctdbench.text.token_bytes import TokenBytes

CHAT = "{% for m in messages %}<bos>{{ m['role'] + ':' + m['content'] }}<eos>{% endfor %}"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTDBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that tokenizers get in this process."""
    asked: list[int] = []
    real: Callable[..., Any] = TokenBytes.encode_batch

    def counted(tokens: TokenBytes, texts: Sequence[str]) -> Any:
        asked.append(len(texts))
        return real(tokens, texts)

    monkeypatch.setattr(TokenBytes, "encode_batch", counted)
    return asked


def side(name: str) -> Any:
    """A side without a model; `smaller`: the teacher's tokenizer with fewer merges."""
    own = tiny.make_tokenizer(380) if name == "smaller" else tokenizer(name)
    return Side(None, own, TokenBytes(own), Specials.of(own))


def sides() -> tuple[Any, Any]:
    return side("student"), side("teacher")


def without_bos() -> Any:
    found = side("student")
    return replace(found, specials=replace(found.specials, bos=None))


def with_template(own: Any, template: str) -> Any:
    """The side with another chat template."""
    changed = copy(own.tokenizer)
    changed.chat_template = template
    return replace(own, tokenizer=changed)


def some_documents() -> list[Document]:
    """Among them one that no tokenizer can spell, one without a chunk, one that spells specials."""
    refused = Document((Segment("a lone \ud800"),))
    unsupervised = Document((Segment("only a question", "user", False),))
    return [*documents(9), refused, unsupervised, Document((Segment("<bos> is no <eos>"),))]


def cache(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "examples").glob("*"))


def assert_equal(found: Sequence[Example], wanted: Sequence[Example]) -> None:
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        assert (one.chunks, one.text, one.document) == (other.chunks, other.text, other.document)
        for side_name in ("student", "teacher"):
            assert_equal_sides(getattr(one, side_name), getattr(other, side_name))
        assert bool(one.others) == bool(other.others)
        if other.others:
            assert_equal(one.others, other.others)


def assert_equal_sides(one: AlignedSide, other: AlignedSide) -> None:
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("chunk", "supervised")]
    names = ("ids", "byte_start", "byte_end", "is_text")
    pairs += [(getattr(one.sequence, name), getattr(other.sequence, name)) for name in names]
    for mine, theirs in pairs:
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)
    assert one.sequence.end == other.sequence.end


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_examples_made_or_read_are_those_built(template: Any, batches: list[int]) -> None:
    student, teacher, other = with_template(side("student"), CHAT), side("teacher"), without_bos()
    given = some_documents()
    wanted, skipped = build_examples(given, student, teacher, template, [other])
    assert sorted(skipped.values()) == [1, 1]
    for _ in range(2):  # made, then read
        found, counts = cached_examples(given, student, [teacher, other], template)
        assert_equal(found, wanted)
        assert counts == skipped
    assert len(batches) == 2 * 3
    chunk = found[0].teacher.chunk
    assert not chunk.flags.owndata  # a view of the file's memory
    assert not chunk.flags.writeable


def test_a_hit_reads_no_tokenizer(batches: list[int]) -> None:
    student, teacher = sides()
    cached_examples(documents(4), student, [teacher])
    assert batches == [4, 4]
    cached_examples(documents(4), student, [teacher])
    assert batches == [4, 4]


def test_the_second_method_of_a_grid_tokenizes_nothing(batches: list[int]) -> None:
    models = llama_side("student"), llama_side("teacher")
    for method in ("gold", "sft"):
        spec = run_spec(method)
        setting = setting_of(spec, *models)
        parts = (spec, setting.corpus, setting.method, setting.student, setting.teachers)
        training_examples(*parts, Accelerator(cpu=True), progress=False)
        assert len(batches) == 2


def changed(**fields: Any) -> list[Document]:
    """Three documents; the last segment of the last one is another."""
    *rest, last = documents(3)
    *segments, segment = last.segments
    return [*rest, replace(last, segments=(*segments, replace(segment, **fields)))]


def test_what_changes_the_examples_has_a_key_of_its_own(tmp_path: Path) -> None:
    student, teacher = sides()
    chat = with_template(student, CHAT)
    three = documents(3)
    cases: list[tuple[list[Document], list[Any], Any]] = [
        (three, [student, teacher], "plain"),
        (three[::-1], [student, teacher], "plain"),
        (changed(text="other"), [student, teacher], "plain"),
        (changed(supervised=False), [student, teacher], "plain"),
        ([replace(document, complete=False) for document in three], [student, teacher], "plain"),
        (three, [teacher, student], "plain"),
        (three, [student, student], "plain"),
        (three, [student, side("smaller")], "plain"),
        (three, [student, teacher, teacher], "plain"),
        (three, [without_bos(), teacher], "plain"),
        (three, [student, teacher], "chat"),
        (three, [chat, teacher], "chat"),
        (changed(role="user"), [chat, teacher], "chat"),
        (three, [with_template(student, CHAT.replace(":", ">")), teacher], "chat"),
    ]
    for number, (given, (own, first, *others), template) in enumerate(cases, start=1):
        found, _ = cached_examples(given, own, [first, *others], template)
        assert len(cache(tmp_path)) == number
        assert_equal(found, build_examples(given, own, first, template, others)[0])


def cut_short(folder: Path) -> None:
    path = folder / example_cache.ARRAYS
    path.write_bytes(path.read_bytes()[:-100])


def one_bit(folder: Path) -> None:
    path = folder / example_cache.ARRAYS
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def no_arrays(folder: Path) -> None:
    (folder / example_cache.ARRAYS).unlink()


def no_digest(folder: Path) -> None:
    (folder / example_cache.DIGEST).unlink()


def no_text(folder: Path) -> None:
    (folder / example_cache.DIGEST).write_bytes(b"\xff")


@pytest.mark.parametrize("fault", [cut_short, one_bit, no_arrays, no_digest, no_text])
def test_what_a_disk_spoiled_is_made_anew(
    fault: Callable[[Path], None], tmp_path: Path, batches: list[int]
) -> None:
    student, teacher = sides()
    cached_examples(documents(4), student, [teacher])
    (folder,) = cache(tmp_path)
    fault(folder)
    for _ in range(2):
        found, _ = cached_examples(documents(4), student, [teacher])
        assert len(batches) == 4  # made twice in all
    assert_equal(found, build_examples(documents(4), student, teacher)[0])


def test_an_interrupted_run_leaves_nothing_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = sides()

    def killed(path: Path, encoded: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encoded_file, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            cached_examples(documents(4), student, [teacher])
    assert cache(tmp_path) == []
    found, _ = cached_examples(documents(4), student, [teacher])
    assert_equal(found, build_examples(documents(4), student, teacher)[0])


def test_two_runs_may_make_the_same_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = sides()
    real = encoded_file.write

    def overtaken(path: Path, encoded: Any) -> None:
        real(path, encoded)
        monkeypatch.setattr(encoded_file, "write", real)
        cached_examples(documents(4), student, [teacher])

    monkeypatch.setattr(encoded_file, "write", overtaken)
    found, _ = cached_examples(documents(4), student, [teacher])
    assert len(cache(tmp_path)) == 1
    assert_equal(found, build_examples(documents(4), student, teacher)[0])


def test_datasets_reads_the_arrays(tmp_path: Path) -> None:
    from datasets import Dataset

    student, teacher = sides()
    found, _ = cached_examples(documents(4), student, [teacher])
    rows = Dataset.from_file(str(cache(tmp_path)[0] / example_cache.ARRAYS))
    assert rows["0.ids"][1] == found[1].student.sequence.ids.tolist()
    assert rows["1.teacher_chunk"][3] == found[3].teacher.chunk.tolist()


# --- Several processes ---------------------------------------------------------------------------


def test_processes_make_what_one_makes(batches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, and with a text's special tokens as text in the other processes, too."""
    monkeypatch.setattr(example_cache, "LONG_TEXT", 0)
    monkeypatch.setattr(examples, "SHARD_CHARACTERS", 60)
    student, teacher = sides()
    given = some_documents()
    found, skipped = cached_examples(given, student, [teacher], workers=2)
    assert not batches
    wanted, counts = build_examples(given, student, teacher)
    assert len(batches) > 4
    assert_equal(found, wanted)
    assert skipped == counts


def test_a_short_text_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example_cache, "ProcessPoolExecutor", None)
    student, teacher = sides()
    given = [Document((Segment("word " * 60_000),))]
    cached_examples(given, student, [teacher])
    monkeypatch.setattr(example_cache, "LONG_TEXT", 0)
    cached_examples(documents(4), student, [teacher], workers=1)


def test_a_launcher_shares_out_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a run that states none; without a launcher there is one a core."""
    seen: list[int] = []
    monkeypatch.setattr(example_cache, "_encoded", lambda made, sides, count: seen.append(count))
    monkeypatch.setattr(example_cache.encoded_file, "write", lambda *_: 1 / 0)
    student, teacher = sides()
    for share, stated in ((None, None), ("3", None), ("3", 5), ("0", None)):
        monkeypatch.setenv(example_cache.WORKERS, share or "")
        with pytest.raises(ZeroDivisionError):
            cached_examples(documents(4), student, [teacher], workers=stated)
    cores = len(os.sched_getaffinity(0))
    assert seen == [cores, 3, 5, cores]


def test_a_process_that_dies_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def died(*_: Any) -> Any:
        raise BrokenProcessPool

    monkeypatch.setattr(example_cache, "LONG_TEXT", 0)
    monkeypatch.setattr(example_cache.ProcessPoolExecutor, "map", died)
    student, teacher = sides()
    with pytest.raises(RunError, match="ended early"):
        cached_examples(documents(4), student, [teacher], workers=2)
    assert cache(tmp_path) == []
