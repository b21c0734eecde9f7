"""What a method is given (rows, tables of the pair, a block), and the terms that it returns.

`ctdbench.method` exports all of this; import it from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ctdbench.errors import RunError
from ctdbench.text.edit_distance import minimum_edit_map
from ctdbench.text.prefixes import PrefixMap
from ctdbench.text.projection import (
    Coverage,
    Projection,
    build_projection,
    common_pairs,
    coverage,
)
from ctdbench.text.vocabulary import ByteTrie, emitted, exact_matches, one_to_one

ByteEstimator = Literal["path", "mixed", "beam"]
GivenProjection = tuple[Any, Any] | Callable[[], tuple[Any, Any]]
EditMapping = Callable[[Sequence[bytes], Sequence[bytes], Sequence[tuple[int, int]]], Any]
SideName = Literal["student", "teacher"]
# Columns of metrics.jsonl beside the method's terms.
LOGGED = ("step", "text_bytes", "student_tokens", "teacher_tokens", "seconds", "loss", "ce")


@dataclass(frozen=True)
class Rows:
    """Consecutive predictions of one model; row r is the distribution that *predicts* token r.

    The causal shift is already done. R rows, V columns, d channels:

    logits: [R, V] float32, what the model would sample from (soft-capped and scaled, no columns
        past the vocabulary); gradient flows on the student's side. None where no one asked.
    token: [R] int64, the token that came, -1 where none did.
    chunk: [R] int64 in 0..C-1; -1 for a row outside every chunk that both sides predict.
    supervised: [R] bool; prompts and padding are not.
    document: [R] int64, index of the document in the batch.
    byte_start, byte_end: [R] int64, span of the token in its document; equal for a special token.
    hidden: [R, d], the state the logits were read from; None where a method does not ask for it.
    input: [R] int64, the token that was read last, the one before `token`; see `inputs`.
    embedding, head: [V, d], the model's tables, without gradient; None where a method does not ask.
    """

    logits: Tensor | None
    token: Tensor
    chunk: Tensor
    supervised: Tensor
    document: Tensor
    byte_start: Tensor
    byte_end: Tensor
    hidden: Tensor | None = None
    input: Tensor | None = None
    embedding: Tensor | None = None
    head: Tensor | None = None

    def inputs(self) -> Tensor:
        """`input`; where it is not given, the token of the row before, -1 without one, [R]."""
        if self.input is not None:
            return self.input
        before = self.token.roll(1)
        follows = self.document == self.document.roll(1)
        follows[:1] = False
        return torch.where(follows, before, -1)

    def scored(self) -> Tensor:
        """[R] bool: supervised rows for which a token came."""
        return self.supervised & (self.token >= 0)

    def scores(self) -> Tensor:
        """The logits [R, V]; raises TypeError if the method did not ask for them in `needs`."""
        if self.logits is None:
            raise TypeError("these rows carry no logits; set Needs(teacher_logits=True)")
        return self.logits


@dataclass(frozen=True)
class PairTables:
    """What a pair's two vocabularies say about each other; built once a pair.

    student_vocabulary, teacher_vocabulary: token id -> bytes, b"" for specials and holes.
    special_pairs: (student id, teacher id) of specials with the same role, the end tokens first.
    ends_first: whether they do begin with the end tokens; False where a side has none.
    student_special, teacher_special: all ids that stand for no bytes of text.
    projection: W as (indices [V_S, k] with -1 for none, weights [V_S, k]), or what makes it when a
        method first asks; None: `build_projection` from the vocabularies alone, no tokenizer. Ids
        that are never emitted are not in it (`ctdbench.text.vocabulary.emitted`).
    edit_mapping: what makes the maps of least edit distance; a harness keeps them on disk.
    """

    student_vocabulary: Sequence[bytes]
    teacher_vocabulary: Sequence[bytes]
    special_pairs: tuple[tuple[int, int], ...] = ()
    student_special: tuple[int, ...] = ()
    teacher_special: tuple[int, ...] = ()
    projection: GivenProjection | None = None
    edit_mapping: EditMapping = minimum_edit_map
    ends_first: bool = True

    @classmethod
    def build(
        cls,
        student_vocabulary: Sequence[bytes],
        teacher_vocabulary: Sequence[bytes],
        special_pairs: Sequence[tuple[int, int]] = (),
        student_special: Sequence[int] = (),
        teacher_special: Sequence[int] = (),
        projection: GivenProjection | None = None,
        edit_mapping: EditMapping = minimum_edit_map,
        ends_first: bool = True,
    ) -> PairTables:
        """Tables from two vocabularies; arrays and lists are taken as they come."""
        pairs = tuple((int(s), int(t)) for s, t in special_pairs)
        specials = (tuple(map(int, student_special)), tuple(map(int, teacher_special)))
        return cls(
            student_vocabulary,
            teacher_vocabulary,
            pairs,
            *specials,
            projection,
            edit_mapping,
            ends_first,
        )

    @property
    def end_pair(self) -> tuple[int, int] | None:
        """(student id, teacher id) of the end tokens; None where a side has none."""
        return self.special_pairs[0] if self.special_pairs and self.ends_first else None

    @cached_property
    def student_trie(self) -> ByteTrie:
        """The student's vocabulary as intervals of byte prefixes."""
        return ByteTrie(list(self.student_vocabulary))

    @cached_property
    def teacher_trie(self) -> ByteTrie:
        """The teacher's vocabulary as intervals of byte prefixes."""
        return ByteTrie(list(self.teacher_vocabulary))

    @cached_property
    def lengths(self) -> tuple[Tensor, Tensor]:
        """Bytes of every token of the student, [V_S] int64, and of the teacher, [V_T]."""
        sides = (self.student_vocabulary, self.teacher_vocabulary)
        student, teacher = (torch.tensor([len(token) for token in side]) for side in sides)
        return student, teacher

    @cached_property
    def prefix_map(self) -> PrefixMap:
        """The student's longest tokens within every suffix of the teacher's tokens."""
        return PrefixMap(self.student_trie, self.teacher_trie, self.special_pairs)

    @cached_property
    def shared(self) -> Tensor:
        """The vocabulary that both sides have, [M, 2] int64 (student id, teacher id), one to one.

        Byte-equal tokens, then specials of the same role; of two claims to an id the first holds.
        """
        matches = exact_matches(self.student_vocabulary, self.teacher_vocabulary).tolist()
        return torch.from_numpy(one_to_one([*matches, *self.special_pairs]))

    @cached_property
    def edit_map(self) -> Tensor:
        """[V_T] int64: the student's token with the least edit distance; -1 for a lone special."""
        return self._edit_map(self.teacher_vocabulary, self.student_vocabulary, flip=True)

    @cached_property
    def reverse_edit_map(self) -> Tensor:
        """[V_S] int64: the teacher's token with the least edit distance; -1 as in `edit_map`."""
        return self._edit_map(self.student_vocabulary, self.teacher_vocabulary, flip=False)

    def _edit_map(self, queries: Sequence[bytes], others: Sequence[bytes], *, flip: bool) -> Tensor:
        # One to one, for a pad that is the other side's end as well would take the end's place.
        pairs = one_to_one(self.special_pairs).tolist()
        specials = [(t, s) if flip else (s, t) for s, t in pairs]
        return torch.from_numpy(self.edit_mapping(queries, others, specials))

    @cached_property
    def projected(self) -> tuple[Tensor, Tensor]:
        """W: indices [V_S, k] int64, -1 for none, and weights [V_S, k] float32."""
        indices, weights = map(torch.from_numpy, self._projection)
        return indices, weights

    @property
    def projection_used(self) -> bool:
        """Whether some method has asked for W."""
        return "_projection" in self.__dict__

    def reached(self, teacher_mass: Tensor) -> Coverage:
        """How much of `teacher_mass` [V_T] W reaches."""
        return coverage(self._projection, teacher_mass.numpy())

    @cached_property
    def strict_pairs(self) -> Tensor:
        """Pairs of tokens where the teacher's is all of W's row, [M, 2] int64, one to one."""
        return torch.from_numpy(common_pairs(self._projection, "strict"))

    @cached_property
    def relaxed_pairs(self) -> Tensor:
        """Pairs of tokens by the largest entry of W's rows, [M, 2] int64, one to one."""
        return torch.from_numpy(common_pairs(self._projection, "relaxed"))

    @cached_property
    def _projection(self) -> Projection:
        given = self.projection() if callable(self.projection) else self.projection
        if given is None:
            vocabularies = map(emitted, (self.student_vocabulary, self.teacher_vocabulary))
            return build_projection(*vocabularies, special_pairs=self.special_pairs)
        indices, weights = map(np.asarray, given)
        return Projection(indices.astype(np.int64), weights.astype(np.float32))


@dataclass(frozen=True)
class Block:
    """A run of chunks of a batch, whole, with the rows of both sides that predict their tokens.

    student, teacher: the rows; `teacher` is None for a method that needs no teacher.
    chunks: C, the number of chunks in this block.
    document_chunks: [D] int64, for every document of the batch its number of chunks in the whole
        batch (of row pairs, for a method that pairs rows): the divisor of a mean per document.
    pairs: [P, 2] int64, student row and teacher row, for methods that pair rows instead of chunks.
    bytes: [N, 257] float32, the teacher's distribution of every byte of the block's chunks in
        order (column 256: the text ends, or with `end_bin` the teacher's token ends).
    pair: the vocabularies and what is known of them.
    batch: what `Method.prepare` gave, joined over the batch, see `Needs.prepare`.
    """

    student: Rows
    teacher: Rows | None
    chunks: int
    document_chunks: Tensor
    pairs: Tensor | None
    bytes: Tensor | None
    pair: PairTables
    batch: Tensor | None = None

    def taught(self) -> Rows:
        """The teacher's rows; raises TypeError if the method did not ask for a teacher."""
        if self.teacher is None:
            raise TypeError("this block has no teacher; set Needs(teacher_logits=True)")
        return self.teacher


@dataclass(frozen=True)
class Term:
    """A loss term as a sum and its count, so that blocks, accumulation and ranks add up exactly.

    total: scalar, differentiable. count: scalar without gradient; it must follow from the block's
    tokens and chunks alone (kind "scalars": and from the teacher's), never from the student's
    logits, because the harness divides by the count of the whole global batch before the first
    gradient is taken.
    """

    total: Tensor
    count: Tensor


def checked(terms: Any) -> dict[str, Term]:
    """What a method gave as its terms, if it is that; raises RunError naming what is not."""
    hint = "give {NAME: Term(total, count)}, both scalar tensors"
    if not isinstance(terms, Mapping):
        raise RunError(f"terms() gives a {type(terms).__name__}", hint)
    for name, term in terms.items():
        if not (isinstance(name, str) and name.isidentifier()) or name in LOGGED:
            raise RunError(
                f"term {name!r} has no name of its own in the log",
                f"take letters, digits and _, and none of {', '.join(LOGGED)}",
            )
        if not isinstance(term, Term):
            raise RunError(f"term {name} is of type {type(term).__name__}", hint)
        for part, value in (("total", term.total), ("count", term.count)):
            if not isinstance(value, Tensor) or value.ndim:
                shape = f" {list(value.shape)}" if isinstance(value, Tensor) else ""
                told = f"a {type(value).__name__}{shape}"
                raise RunError(f"the {part} of term {name} is {told}", hint)
    return dict(terms)


@dataclass(frozen=True)
class Scalars:
    """What `Method.scalars` said of the rows of one side of a batch of whole documents.

    values: [R, m] float. rows: their tokens, chunks and documents, without logits and states, in
    the order of the text: chunk ids ascend, and the row that follows a chunk's last row in its
    document, if there is one, is the next row here.
    """

    values: Tensor
    rows: Rows


def bare(rows: Rows) -> Rows:
    """The rows without logits and states: what `Scalars` keeps of them."""
    return replace(rows, logits=None, hidden=None, embedding=None, head=None)
