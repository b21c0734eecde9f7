"""What two tokenizers share, and how they cut the same text: the numbers of `ctdbench inspect`.

A token is common if the other side has a token of the same bytes. Vocabularies are counted by
their bytes: specials and holes are no tokens here, and ids with the same bytes are one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ctdbench.errors import UserError
from ctdbench.text.alignment import Int64Array, align
from ctdbench.text.critical_tokens import CLASSES, CriticalClass, Recommendation, token_class
from ctdbench.text.token_bytes import Encoding, Refusal, TokenBytes

SIZES = ("1", "2", "3+")  # tokens of a chunk on one side


@dataclass(frozen=True)
class TextStatistics:
    """A text on both sides; a document that either side does not spell byte for byte is left out.

    refusal: why the first one was refused, "" if none was.
    """

    documents: int
    bytes: int
    student_tokens: int
    teacher_tokens: int
    refused_by_student: int
    refused_by_teacher: int
    refusal: str


@dataclass(frozen=True)
class ChunkStatistics:
    """The chunks of a text.

    one_to_one, one_to_one_bytes: the share of chunks with one token on either side, and of bytes
    in them. by_size: "student tokens:teacher tokens" -> chunks, either number one of `SIZES`.
    """

    chunks: int
    one_to_one: float
    one_to_one_bytes: float
    longest_bytes: int
    by_size: dict[str, int]


@dataclass(frozen=True)
class Overlap:
    """Tokens of one class: only in the student's vocabulary, only in the teacher's, in both."""

    student_only: int
    teacher_only: int
    common: int


@dataclass(frozen=True)
class Mass:
    """Shares of the teacher's mass: on the common vocabulary, and on columns that W reaches.

    Special tokens of the same role are common, too.
    """

    common: float
    projected: float


@dataclass(frozen=True)
class TeacherFindings:
    """What is known of a student and one of its teachers; `teacher` is the tokenizer's reference.

    vocabulary: by class. columns: how many of the teacher's `teacher_ids` W reaches.
    relaxed_pairs: how many pairs H-KL makes of W's largest entries. frequency: the mass is how
    often the teacher's tokens occur in the text; probability: what its model gives them, averaged
    over the text's positions, None where no model was loaded.
    """

    teacher: str
    text: TextStatistics
    chunks: ChunkStatistics
    vocabulary: dict[str, Overlap]
    teacher_ids: int
    columns: int
    relaxed_pairs: int
    frequency: Mass
    probability: Mass | None
    critical: tuple[CriticalClass, ...]
    recommendation: Recommendation


@dataclass(frozen=True)
class Findings:
    """A pair on a text; `student` is the tokenizer's reference."""

    pair: str
    student: str
    text: str
    teachers: tuple[TeacherFindings, ...]


@dataclass(frozen=True)
class Chunk:
    """The bytes of a chunk as either side cuts them; a lone SentencePiece prefix has no byte."""

    student: tuple[bytes, ...]
    teacher: tuple[bytes, ...]


@dataclass(frozen=True, eq=False)
class AlignedText:
    """Documents laid end to end, on both sides; chunk_end [C] int64 are byte offsets."""

    student: Encoding
    teacher: Encoding
    chunk_end: Int64Array

    def chunk_of(self, side: Encoding) -> Int64Array:
        """The chunk of every token, [n]; a lone prefix lies in that of the token behind it."""
        return np.searchsorted(self.chunk_end, side.byte_start, side="right")


def align_text(student: Sequence[Encoding], teacher: Sequence[Encoding]) -> AlignedText:
    """Align the same documents, none of them empty, at once: no chunk spans two of them."""
    sides = _joined(student), _joined(teacher)
    ends = [side.byte_end[side.byte_end > side.byte_start] for side in sides]
    alignment = align(*ends)
    last = np.diff(alignment.student_chunk, append=alignment.chunks) > 0
    return AlignedText(*sides, ends[0][last])


def both_spelled(
    student: Sequence[Encoding | Refusal], teacher: Sequence[Encoding | Refusal]
) -> tuple[list[Encoding], list[Encoding]]:
    """The documents that neither side refused."""
    pairs = zip(student, teacher, strict=True)
    kept = [(s, t) for s, t in pairs if isinstance(s, Encoding) and isinstance(t, Encoding)]
    return [own for own, _ in kept], [taught for _, taught in kept]


def text_statistics(
    student: Sequence[Encoding | Refusal], teacher: Sequence[Encoding | Refusal]
) -> TextStatistics:
    """Counts of a text as `TokenBytes.encode_batch` cut it on both sides."""
    own, taught = both_spelled(student, teacher)
    refused = [[part for part in side if isinstance(part, Refusal)] for side in (student, teacher)]
    return TextStatistics(
        documents=len(own),
        bytes=sum(map(_size, own)),
        student_tokens=sum(len(encoding.ids) for encoding in own),
        teacher_tokens=sum(len(encoding.ids) for encoding in taught),
        refused_by_student=len(refused[0]),
        refused_by_teacher=len(refused[1]),
        refusal=next((refusal.reason for side in refused for refusal in side), ""),
    )


def chunk_statistics(text: AlignedText) -> ChunkStatistics:
    """Numbers and sizes of a text's chunks; a lone SentencePiece prefix counts as a token."""
    width = np.diff(text.chunk_end, prepend=0)
    chunks = len(width)
    own, taught = (
        np.bincount(text.chunk_of(side), minlength=chunks) for side in (text.student, text.teacher)
    )
    single = (own == 1) & (taught == 1)
    most = len(SIZES)
    cell = (np.minimum(own, most) - 1) * most + np.minimum(taught, most) - 1
    labels = [f"{own_size}:{taught_size}" for own_size in SIZES for taught_size in SIZES]
    counts = np.bincount(cell, minlength=most**2).tolist()
    return ChunkStatistics(
        chunks=chunks,
        one_to_one=float(single.mean()),
        one_to_one_bytes=float(width[single].sum() / width.sum()),
        longest_bytes=int(width.max()),
        by_size=dict(zip(labels, counts, strict=True)),
    )


def chunked_sentence(student: TokenBytes, teacher: TokenBytes, text: str) -> list[Chunk]:
    """The chunks of a text, in order, each with both sides' pieces as bytes.

    Raises UserError for a text that UTF-8 cannot hold, NotLossless where a side does not spell it.
    """
    if not text:
        return []
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        place = f"a lone surrogate at character {error.start}"
        raise UserError(f"the sentence has {place}", "give one that is valid UTF-8") from None
    aligned = align_text([student.encode(text)], [teacher.encode(text)])
    sides = aligned.student, aligned.teacher
    pieces: list[list[list[bytes]]] = [[[] for _ in aligned.chunk_end] for _ in sides]
    for side, found in zip(sides, pieces, strict=True):
        spans = zip(aligned.chunk_of(side), side.byte_start, side.byte_end, strict=True)
        for chunk, start, end in spans:
            if end > start:
                found[chunk].append(data[start:end])
    return [Chunk(tuple(own), tuple(taught)) for own, taught in zip(*pieces, strict=True)]


def vocabulary_overlap(
    student_vocabulary: Sequence[bytes], teacher_vocabulary: Sequence[bytes]
) -> dict[str, Overlap]:
    """Tokens by class (all of `CLASSES`) and by who has them; byte strings, each counted once."""
    student, teacher = set(student_vocabulary) - {b""}, set(teacher_vocabulary) - {b""}
    parts = (student - teacher, teacher - student, student & teacher)
    counts = [Counter(map(token_class, part)) for part in parts]
    return {name: Overlap(*(count[name] for count in counts)) for name in CLASSES}


def _joined(encodings: Sequence[Encoding]) -> Encoding:
    """Documents as one."""
    sizes = np.array(list(map(_size, encodings)), dtype=np.int64)
    first = np.repeat(np.cumsum(sizes) - sizes, [len(encoding.ids) for encoding in encodings])
    parts = [(encoding.ids, encoding.byte_start, encoding.byte_end) for encoding in encodings]
    ids, start, end = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Encoding(ids, start + first, end + first)


def _size(encoding: Encoding) -> int:
    return int(encoding.byte_end[-1])
