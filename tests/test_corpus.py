"""Documents: what is read, what is skipped and counted, the split, the order and the pieces."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctdbench.distill import corpus
from ctdbench.distill.corpus import (
    Corpus,
    Document,
    Segment,
    cut,
    is_held_out,
    load_corpus,
    training_order,
)
from ctdbench.errors import UserError


def write(path: Path, *rows: Any) -> str:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return f"jsonl:{path}"


def texts(found: Corpus) -> set[str]:
    return {document.text for document in (*found.train, *found.held_out)}


def made(count: int) -> tuple[Document, ...]:
    return tuple(Document((Segment(f"document {n} " + "word " * (n % 9)),)) for n in range(count))


def test_what_is_no_document_is_skipped_and_counted(tmp_path: Path) -> None:
    name = write(
        tmp_path / "a.jsonl",
        "\ufeff".encode() + b'{"text": "with a byte order mark"}',
        {"text": "good"},
        {"text": ""},
        {"text": "  \n"},
        {"segments": [{"text": "only a prompt", "supervised": False}]},
        {"other": 1},
        ["a list"],
        b'{"text": "caf\xe9"}',
        b'{"text": ',
        b'{"text": "x", "n": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"text": "lone \\ud800 surrogate"}',
        {"text": "good"},
        b"",
    )
    found = load_corpus(name)
    assert texts(found) == {"good", "with a byte order mark"}
    assert found.skipped == {
        "empty or without text": 5,
        "not UTF-8": 1,
        "not JSON": 3,
        "lone surrogates": 1,
        "duplicate": 1,
    }


def test_rows_of_every_form(tmp_path: Path) -> None:
    segments = [{"text": "p", "role": "user", "supervised": False}, {"text": "a"}, {"text": ""}]
    name = write(
        tmp_path / "a.jsonl",
        {"question": "q", "answer": "a"},
        {"segments": segments, "complete": False},
    )
    found = load_corpus(name)
    documents = {document.text: document for document in (*found.train, *found.held_out)}
    assert [part.role for part in documents["q\na"].segments] == ["user", "assistant"]
    cut_off = documents["p\na"]
    assert not cut_off.complete
    assert cut_off.supervised_spans() == [(1, 3)]  # the separator belongs to what follows


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", {"text": "second"})
    write(tmp_path / "a.jsonl", {"text": "first"})
    assert texts(load_corpus(f"jsonl:{tmp_path}")) == {"first", "second"}


@pytest.mark.parametrize("name", ["nosuch", "jsonl:", "jsonl:/no/such.jsonl", "hub:", "csv:x"])
def test_an_unknown_corpus_is_an_error_of_one_line(name: str) -> None:
    with pytest.raises(UserError) as caught:
        load_corpus(name)
    assert "\n" not in str(caught.value)


def test_a_corpus_without_a_document_names_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 empty or without text"):
        load_corpus(write(tmp_path / "a.jsonl", {"text": ""}, {}))


def test_gsm8k_is_read_from_the_data_folder(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    write(tmp_path / "gsm8k" / "train.jsonl", {"question": "How many?", "answer": "#### 7"})
    assert texts(load_corpus("gsm8k", tmp_path)) == {"How many?\n#### 7"}
    with pytest.raises(UserError, match="does not exist"):
        load_corpus("gsm8k", tmp_path / "elsewhere")


def test_the_embedded_corpus_is_gzipped_jsonl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "corpus.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "b \\u2028 c"}\n'))
    monkeypatch.setattr(corpus, "EMBEDDED", path)
    assert texts(load_corpus("embedded")) == {"a", "b \u2028 c"}


# --- the split ---


def test_the_split_depends_on_the_text_alone(tmp_path: Path) -> None:
    rows = [{"text": document.text} for document in made(600)]
    whole = load_corpus(write(tmp_path / "a.jsonl", *rows))
    part = load_corpus(write(tmp_path / "b.jsonl", *rows[:200][::-1]))
    assert 10 < len(whole.held_out) < 60
    assert {d.text for d in part.held_out} <= {d.text for d in whole.held_out}
    assert not set(whole.train) & set(whole.held_out)
    assert is_held_out(Document((Segment("held out? 12"),))) == is_held_out(
        Document((Segment("held out? 12", "user", supervised=False),), complete=False)
    )


def test_the_split_is_pinned() -> None:
    """Results of different versions compare only while the same texts are held out."""
    assert [n for n, document in enumerate(made(100)) if is_held_out(document)] == [
        11,
        21,
        30,
        42,
        73,
    ]


def test_settings_are_chosen_on_other_documents_than_results_are_reported_on(
    tmp_path: Path,
) -> None:
    found = load_corpus(write(tmp_path / "a.jsonl", *({"text": d.text} for d in made(1000))))
    test, validation = (found.held_out_part(part) for part in ("test", "validation"))
    assert sorted(d.text for d in (*test, *validation)) == sorted(d.text for d in found.held_out)
    assert 0.2 < len(validation) / len(found.held_out) < 0.6


def test_training_never_sees_the_held_out_split(tmp_path: Path) -> None:
    found = load_corpus(write(tmp_path / "a.jsonl", *({"text": d.text} for d in made(300))))
    size = sum(document.size for document in found.train)
    seen = {piece.text for piece in training_order(found, 0, size, 4096)}
    assert seen == {document.text for document in found.train}
    assert not seen & {document.text for document in found.held_out}


# --- order and budget ---


def test_the_budget_is_in_bytes_and_the_order_in_the_seed() -> None:
    found = Corpus("test", made(60), (), {})
    first, again, other = (training_order(found, seed, 500, 64) for seed in (0, 0, 1))
    assert first == again != other
    assert 500 <= sum(piece.size for piece in first) < 500 + 64
    longer = training_order(found, 0, 900, 64)
    assert longer[: len(first)] == first


def test_at_most_one_epoch() -> None:
    found = Corpus("test", made(20), (), {})
    size = sum(document.size for document in found.train)
    pieces = training_order(found, 3, size, 4096)
    assert sorted(piece.text for piece in pieces) == sorted(d.text for d in found.train)
    with pytest.raises(UserError, match=f"has {size} bytes .*--budget {size}"):
        training_order(found, 3, size + 1, 4096)


# --- pieces ---

words = st.text(st.characters(codec="utf-8", exclude_characters=""), min_size=1, max_size=60)


@given(
    segments=st.lists(st.tuples(words, st.booleans()), min_size=1, max_size=4),
    size=st.integers(16, 64),
    complete=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_pieces_join_to_the_document(
    segments: list[tuple[str, bool]], size: int, complete: bool
) -> None:
    parts = tuple(Segment(text, f"role{n}", flag) for n, (text, flag) in enumerate(segments))
    pieces = list(cut(Document(parts, complete), size))
    assert all(0 < piece.size <= size for piece in pieces)
    for part in parts:
        of_part = [s for piece in pieces for s in piece.segments if s.role == part.role]
        assert "".join(s.text for s in of_part) == part.text
        assert {s.supervised for s in of_part} == {part.supervised}
    roles = [s.role for piece in pieces for s in piece.segments]
    assert roles == sorted(roles)
    assert [piece.complete for piece in pieces] == [False] * (len(pieces) - 1) + [complete]


def test_pieces_end_before_a_space_where_there_is_one() -> None:
    document = Document((Segment("one two three four five six"),))
    assert [piece.text for piece in cut(document, 16)] == ["one two three", " four five six"]
    whole = Document((Segment("twelve bytes"), Segment("unbreakable")))
    assert [piece.text for piece in cut(whole, 16)] == ["twelve bytes", "unbreakable"]
    assert [piece.text for piece in cut(Document((Segment("你好" * 8),)), 16)] == [
        "你好你好你",
        "好你好你好",
        "你好你好你",
        "好",
    ]


class Counted(str):
    """Text that counts the characters copied or encoded out of it."""

    read = 0

    def __getitem__(self, key: Any) -> Counted:
        part = Counted(super().__getitem__(key))
        Counted.read += len(part)
        return part

    def encode(self, *rest: Any) -> bytes:
        Counted.read += len(self)
        return super().encode(*rest)


def test_cutting_reads_a_long_text_once() -> None:
    text = "some words " * 5_000
    pieces = list(cut(Document((Segment(Counted(text)),)), 100))
    assert "".join(piece.text for piece in pieces) == text
    assert Counted.read < 4 * len(text)
