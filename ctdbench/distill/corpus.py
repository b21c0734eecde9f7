"""Documents to train on (embedded, GSM8K, JSONL, hub datasets), and a held-out split of them.

A document is a list of segments (text, role, supervised). Order, split and pieces depend on the
text and the seed alone, never on a tokenizer, so every method of every pair sees the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ctdbench.errors import PreflightError, UserError

EMBEDDED = Path(__file__).parent / "embedded" / "corpus.jsonl.gz"
HELD_OUT_SHARE = 0.05
VALIDATION_SHARE = 0.02  # of all documents, and of those held out: settings are chosen on them
Part = Literal["test", "validation"]
SEPARATOR = "\n"  # between the segments of a document rendered as plain text


@dataclass(frozen=True)
class Segment:
    """A stretch of text; `supervised` is False for what the student is only given (a prompt).

    joined: it goes on where the segment before it ends, with no newline between them.
    """

    text: str
    role: str = "text"
    supervised: bool = True
    joined: bool = False


@dataclass(frozen=True)
class Document:
    """Segments in order; `complete` says that the text ends here and is not cut."""

    segments: tuple[Segment, ...]
    complete: bool = True

    @property
    def text(self) -> str:
        """The plain text: segments with a newline between them."""
        leads = map(self.lead, range(len(self.segments)))
        parts = zip(leads, self.segments, strict=True)
        return "".join(lead + segment.text for lead, segment in parts)

    def lead(self, index: int) -> str:
        """What stands before a segment in the plain text."""
        return SEPARATOR if index and not self.segments[index].joined else ""

    @property
    def size(self) -> int:
        """UTF-8 bytes of the plain text."""
        return len(self.text.encode("utf-8"))

    def supervised_spans(self) -> list[tuple[int, int]]:
        """Byte spans of the plain text that are supervised; separators belong to what follows."""
        spans, start = [], 0
        for index, segment in enumerate(self.segments):
            lead = len(self.lead(index))
            end = start + lead + len(segment.text.encode("utf-8"))
            if segment.supervised:
                spans.append((start, end))
            start = end
        return spans


@dataclass(frozen=True)
class Corpus:
    """Documents of a source, split; `skipped` counts the rows that were left out, by reason."""

    name: str
    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    skipped: dict[str, int]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every document in order."""
        digest = hashlib.sha256()
        for document in (*self.train, *self.held_out):
            digest.update(json.dumps(asdict(document)).encode("utf-8"))
        return digest.hexdigest()

    def held_out_part(self, part: Part) -> tuple[Document, ...]:
        """The held-out documents that results are reported on, or those to choose settings on."""
        return tuple(
            document
            for document in self.held_out
            if (_place(document) < VALIDATION_SHARE) == (part == "validation")
        )


def require(name: str, data_dir: Path | None) -> None:
    """Raise UserError, without loading anything, if the corpus cannot be had."""
    kind, _, rest = name.partition(":")
    if name == "embedded" or (kind == "hub" and rest):
        return
    if name == "gsm8k":
        if data_dir is not None:
            _existing(data_dir / "gsm8k" / "train.jsonl")
        return
    if kind == "jsonl" and rest:
        _jsonl_files(Path(rest))
        return
    raise UserError(
        f"train.corpus: unknown corpus {name!r}",
        "use embedded, gsm8k, jsonl:PATH or hub:ORG/NAME#FIELD",
    )


def load_corpus(name: str, data_dir: Path | None = None) -> Corpus:
    """The corpus called `name`, split by document hash; duplicates are dropped.

    Raises UserError for an unknown name or a corpus without a single document, PreflightError if
    the hub is needed and cannot be reached.
    """
    require(name, data_dir)
    skipped: Counter[str] = Counter()
    found = list(_documents(name, data_dir, skipped))
    documents = list(dict.fromkeys(found))
    if len(documents) < len(found):
        skipped["duplicate"] = len(found) - len(documents)
    if not documents:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "no rows"
        raise UserError(f"corpus {name} has no usable document ({reasons})")
    held_out = tuple(document for document in documents if is_held_out(document))
    train = tuple(document for document in documents if not is_held_out(document))
    return Corpus(name, train, held_out, dict(skipped))


def is_held_out(document: Document) -> bool:
    """Whether a document belongs to the split that no training sees; decided by its text alone."""
    return _place(document) < HELD_OUT_SHARE


def _place(document: Document) -> float:
    """In [0, 1), even over texts."""
    digest = hashlib.sha256(document.text.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def training_order(corpus: Corpus, seed: int, budget: int, piece_bytes: int) -> list[Document]:
    """Pieces of the training documents in a seeded order, up to `budget` bytes: at most one epoch.

    Raises UserError if the corpus holds less text than the budget.
    """
    pieces = (piece for document in shuffled(corpus, seed) for piece in cut(document, piece_bytes))
    chosen = within(pieces, budget)
    size = sum(piece.size for piece in chosen)
    if size < budget:
        raise UserError(
            f"train.budget: corpus {corpus.name} has {size} bytes to train on, not {budget}",
            f"ask for at most --budget {size}",
        )
    return chosen


def shuffled(corpus: Corpus, seed: int) -> list[Document]:
    """The training documents in the order of a seed."""
    documents = list(corpus.train)
    random.Random(f"ctdbench/order/{seed}").shuffle(documents)
    return documents


def within(documents: Iterable[Document], budget: int) -> list[Document]:
    """The first documents, until they hold `budget` bytes."""
    chosen: list[Document] = []
    size = 0
    for document in documents:
        if size >= budget:
            break
        chosen.append(document)
        size += document.size
    return chosen


def cut(document: Document, piece_bytes: int) -> Iterator[Document]:
    """Pieces of at most `piece_bytes` bytes, cut before a space where there is one."""
    piece: list[Segment] = []
    room = piece_bytes
    for segment in document.segments:
        start, stop = 0, len(segment.text)
        while start < stop:
            head = _head(segment.text, start, room, must=not piece)
            start += len(head)
            if head:
                piece.append(replace(segment, text=head))
            room -= len(head.encode("utf-8")) + len(SEPARATOR)
            if start < stop or room <= 0:
                at_end = start == stop and segment is document.segments[-1]
                complete = document.complete and at_end
                if piece:
                    yield Document(tuple(piece), complete)
                piece, room = [], piece_bytes
    if piece:
        yield Document(tuple(piece), document.complete)


def _head(text: str, start: int, room: int, *, must: bool) -> str:
    """What of `text` from `start` on fits into `room` bytes: all, or up to a space.

    A word longer than the room is split only if it `must` be, in an empty piece.
    """
    room = max(room, 0)
    data = text[start : start + room + 1].encode("utf-8")  # no more can fit
    if len(data) <= room:
        return text[start:]
    head = data[:room].decode("utf-8", errors="ignore")
    space = head.rfind(" ")
    return head[: max(space, 0)] if space > 0 or not must else head


def _documents(name: str, data_dir: Path | None, skipped: Counter[str]) -> Iterator[Document]:
    kind, _, rest = name.partition(":")
    if name == "embedded":
        lines = gzip.decompress(EMBEDDED.read_bytes()).splitlines()
        yield from _parse_lines(lines, skipped)
    elif name == "gsm8k":
        yield from _gsm8k(data_dir, skipped)
    elif kind == "jsonl":
        for path in _jsonl_files(Path(rest)):
            yield from _parse_lines(path.read_bytes().split(b"\n"), skipped)
    else:
        yield from _hub(rest, skipped)


def _parse_lines(lines: Iterable[bytes], skipped: Counter[str]) -> Iterator[Document]:
    for line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            skipped["not UTF-8"] += 1
            continue
        except (ValueError, RecursionError):
            skipped["not JSON"] += 1
            continue
        yield from _from_row(row, skipped)


def _from_row(row: Any, skipped: Counter[str]) -> Iterator[Document]:
    """The document of a row {"text": ...}, {"question", "answer"} or {"segments": [...]}."""
    segments = tuple(segment for segment in _segments(row) if segment.text)
    if not any(segment.supervised and segment.text.strip() for segment in segments):
        skipped["empty or without text"] += 1
    elif any(_has_surrogate(segment.text) for segment in segments):
        skipped["lone surrogates"] += 1
    else:
        yield Document(segments, complete=bool(row.get("complete", True)))


def _segments(row: Any) -> list[Segment]:
    if not isinstance(row, dict):
        return []
    if isinstance(row.get("text"), str):
        return [Segment(row["text"])]
    if isinstance(row.get("question"), str) and isinstance(row.get("answer"), str):
        return [Segment(row["question"], "user"), Segment(row["answer"], "assistant")]
    entries = row.get("segments")
    if not isinstance(entries, list):
        return []
    return [
        Segment(entry["text"], str(entry.get("role", "text")), bool(entry.get("supervised", True)))
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("text"), str)
    ]


def _has_surrogate(text: str) -> bool:
    return any(0xD800 <= ord(character) <= 0xDFFF for character in text)


def _gsm8k(data_dir: Path | None, skipped: Counter[str]) -> Iterator[Document]:
    if data_dir is not None:
        path = _existing(data_dir / "gsm8k" / "train.jsonl")
        yield from _parse_lines(path.read_bytes().split(b"\n"), skipped)
        return
    for row in _hub_rows("openai/gsm8k", "main"):
        yield from _from_row(row, skipped)


def _hub(rest: str, skipped: Counter[str]) -> Iterator[Document]:
    location, _, field = rest.partition("#")
    parts = location.split("/")
    config = parts[2] if len(parts) > 2 else None
    for row in _hub_rows("/".join(parts[:2]), config):
        yield from _from_row({"text": row.get(field or "text")}, skipped)


def _hub_rows(name: str, config: str | None) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset

    try:
        return load_dataset(name, config, split="train")  # type: ignore[no-any-return]
    except Exception as error:  # network, authorisation, unknown name: one message for the user
        raise PreflightError(
            f"corpus {name} could not be had from the hub ({type(error).__name__})",
            "check the name and your network, or give local files with --data-dir or jsonl:PATH",
        ) from error


def _jsonl_files(path: Path) -> list[Path]:
    path = path.expanduser()
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [_existing(path)]
    if not files:
        raise UserError(f"train.corpus: folder {path} holds no *.jsonl file")
    return files


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"file {path} does not exist", "check --data-dir or train.corpus")
    return path
