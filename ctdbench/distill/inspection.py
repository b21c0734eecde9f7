"""`ctdbench inspect`: what a pair's tokenizers share, and how they cut a text.

Only tokenizers are loaded, and a teacher's model where its probabilities are asked for. The text
is cut into the pieces that a run trains on, and the tables are those that a run builds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ctdbench.distill import models
from ctdbench.distill.batches import collate
from ctdbench.distill.corpus import Document, Segment, cut, load_corpus, within
from ctdbench.distill.examples import build_examples
from ctdbench.distill.models import Side
from ctdbench.distill.precision import resolve
from ctdbench.distill.setting import pair_tables
from ctdbench.distill.teacher import Teacher
from ctdbench.distill.tokenizers import Specials
from ctdbench.errors import UserError
from ctdbench.method import PairTables
from ctdbench.spec import ModelSpec, PairSpec, TrainSpec
from ctdbench.text import diagnostics
from ctdbench.text.critical_tokens import critical_classes, recommend
from ctdbench.text.diagnostics import Findings, Mass, TeacherFindings
from ctdbench.text.token_bytes import TokenBytes
from ctdbench.text.vocabulary import ByteTrie

BLOCK = 1 << 16  # characters of a plain text at a time: cutting takes their square
BATCH_DOCUMENTS = 8  # of a forward pass


def inspect_pair(
    pair: PairSpec,
    text: Path | None = None,
    *,
    size: int = 100_000,
    load_models: bool = False,
    sides: Sequence[Side] | None = None,
) -> Findings:
    """What the student's tokenizer shares with each teacher's, on the first `size` bytes of a text.

    text: a UTF-8 file, or .jsonl with a field `text` (duplicate rows are dropped); None: the
    held-out documents of the embedded corpus. load_models: also measure where the teachers'
    probability lies, which takes a forward pass over the text. sides: `tokenizer_sides(pair)`, for
    a caller that has them.

    Raises PreflightError for what cannot be had; UserError for a text that cannot be read, or of
    which no document is spelled by both tokenizers.
    """
    pieces = _pieces(text, size)
    student, *teachers = sides or tokenizer_sides(pair)
    return Findings(
        pair=pair.name,
        student=_tokenizer(pair.student),
        text=str(text) if text else "held-out documents of the embedded corpus",
        teachers=tuple(
            _inspect(student, teacher, spec, pieces, load_models)
            for teacher, spec in zip(teachers, pair.teachers, strict=True)
        ),
    )


def tokenizer_sides(pair: PairSpec) -> list[Side]:
    """The student's and the teachers', without models."""
    return [tokenizer_side(spec) for spec in (pair.student, *pair.teachers)]


def _tokenizer(spec: ModelSpec) -> str:
    """Reference of the tokenizer that a model is used with."""
    return spec.tokenizer or spec.model


def tokenizer_side(spec: ModelSpec, *, trust_remote_code: bool = False) -> Side:
    """A side without a model: alignment and tables ask for none."""
    tokenizer = models.load_tokenizer(_tokenizer(spec), trust_remote_code=trust_remote_code)
    return Side(None, tokenizer, TokenBytes(tokenizer), Specials.of(tokenizer))


def _pieces(path: Path | None, size: int) -> list[Document]:
    """The first `size` bytes of the text, as a run would cut them."""
    if path is None:
        documents: Sequence[Document] = load_corpus("embedded").held_out
    elif not path.is_file():
        raise UserError(f"--text {path} is no file", "give a text file, or .jsonl with field text")
    elif path.suffix == ".jsonl":
        corpus = load_corpus(f"jsonl:{path}")
        documents = (*corpus.train, *corpus.held_out)
    else:
        documents = list(_plain_text(path))
    longest = TrainSpec().document_bytes
    return within((piece for document in documents for piece in cut(document, longest)), size)


def _plain_text(path: Path) -> Iterator[Document]:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--text {path} is not UTF-8 at byte {error.start}", "convert it first"
        ) from None
    if not text:
        raise UserError(f"--text {path} is empty", "give a file with text")
    for start in range(0, len(text), BLOCK):
        yield Document((Segment(text[start : start + BLOCK]),))


def _inspect(
    student: Side, teacher: Side, spec: ModelSpec, pieces: Sequence[Document], load_model: bool
) -> TeacherFindings:
    texts = [piece.text for piece in pieces]
    own, taught = (side.tokens.encode_batch(texts) for side in (student, teacher))
    text = diagnostics.text_statistics(own, taught)
    if not text.documents:
        raise UserError(
            f"no document is spelled by both tokenizers ({_tokenizer(spec)} is the teacher's): "
            f"{text.refusal}",
            "try another --text",
        )
    aligned = diagnostics.align_text(*diagnostics.both_spelled(own, taught))
    tables = pair_tables(student, teacher)
    vocabularies = tables.student_vocabulary, tables.teacher_vocabulary
    counts = np.bincount(aligned.teacher.ids, minlength=len(vocabularies[1]))
    frequency = torch.from_numpy(counts / counts.sum())
    critical = critical_classes(*vocabularies, aligned.student.ids)
    return TeacherFindings(
        teacher=_tokenizer(spec),
        text=text,
        chunks=diagnostics.chunk_statistics(aligned),
        vocabulary=diagnostics.vocabulary_overlap(*vocabularies),
        teacher_ids=len(vocabularies[1]),
        columns=tables.reached(frequency).columns,
        relaxed_pairs=len(tables.relaxed_pairs),
        frequency=_mass(tables, frequency),
        probability=_mass(tables, _mean_prediction(student, spec, pieces)) if load_model else None,
        critical=critical,
        recommendation=recommend(critical),
    )


def _mass(tables: PairTables, mass: Tensor) -> Mass:
    """Where a distribution over the teacher's ids lies, [V_T] float64."""
    return Mass(float(mass[tables.shared[:, 1]].sum()), tables.reached(mass).mass)


def _mean_prediction(student: Side, spec: ModelSpec, pieces: Sequence[Document]) -> Tensor:
    """The teacher's probabilities averaged over its predictions of the text, [V_T] float64."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side = models.load_side(spec)
    side.model.to(device)
    trie = ByteTrie(side.tokens.vocabulary)
    teacher = Teacher(side, trie, resolve("auto", device), identity=spec.model)
    examples, _ = build_examples(pieces, student, side)
    if not examples:
        raise UserError("--model: the text has no chunk that both sides predict", "give more text")
    total = torch.zeros(len(side.tokens.vocabulary), dtype=torch.float64)
    for start in range(0, len(examples), BATCH_DOCUMENTS):
        batch = collate(examples[start : start + BATCH_DOCUMENTS], 0, 0).teacher.to(device)
        total += len(batch.position) * teacher.mean_prediction(batch)
    return total / total.sum()
