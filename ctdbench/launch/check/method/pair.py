"""Small models, tokenizers and documents that the conformance checks run on.

Two byte-level tokenizers of some twenty tokens, whose words cross each other so that chunks have
several tokens on both sides; BOS on one side only, specials that the other side lacks, columns past
the vocabulary. Models are one-layer GPT-2s: unlike Llama's, its layers compute in float64 as well.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from transformers.utils import logging as hf_logging

from ctdbench.distill import models, tiny
from ctdbench.distill import setting as setup
from ctdbench.distill.batches import Batch, collate
from ctdbench.distill.corpus import Document, Segment
from ctdbench.distill.examples import build_example
from ctdbench.distill.models import Side
from ctdbench.method import PairTables, SideName
from ctdbench.spec import ModelSpec
from ctdbench.text.edit_distance import minimum_edit_map

ALPHABET = "abcd12ĠĊÃ©"  # a, b, c, d, 1, 2, space, newline and the bytes of é, as GPT-2 spells them
MERGES = {
    "student": ("a b", "c d", "Ġ a", "1 2", "Ã ©", "ab cd"),
    "teacher": ("b c", "d a", "Ġ b", "1 1", "11 2", "Ġ Ġ"),
}
ROLES = {"student": ("pad", "bos", "unk", "eos"), "teacher": ("eos", "unk", "pad")}
WIDTHS = {"student": 12, "teacher": 16}
COLUMNS_TOO_MANY = 3  # rows of a model's tables past its vocabulary
TEXTS = (  # for the pair `tiny`
    "The quick brown fox jumps over the lazy dog, again and again.",
    "What is 12 + 30? It is 42, because 12 and 30 are 42.",
    "A tokenizer cuts a text into tokens; another one cuts it elsewhere.",
)


@dataclass(frozen=True)
class Pair:
    """Two small models with their tokenizers, and the tables of their vocabularies."""

    student: Side
    teacher: Side
    tables: PairTables

    @property
    def one_tokenizer(self) -> bool:
        """Whether both sides have the same tokens under the same ids."""
        return self.student.tokens.vocabulary == self.teacher.tokens.vocabulary


@lru_cache
def make_pair(
    *,
    one_tokenizer: bool = False,
    student_ids: int = 0,
    teacher_ids: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Pair:
    """The pair; other `.._ids` give the same tokens other ids. One tokenizer is the student's."""
    student = _side("student", "student", student_ids, dtype)
    if one_tokenizer:
        teacher = _side("teacher", "student", student_ids, dtype)
    else:
        teacher = _side("teacher", "teacher", teacher_ids, dtype)
    return Pair(student, teacher, tables_of(student, teacher))


def tables_of(student: Side, teacher: Side) -> PairTables:
    """The pair's tables; nothing is kept in the cache, for here it takes no time to make."""
    return replace(setup.pair_tables(student, teacher), edit_mapping=minimum_edit_map)


@lru_cache
def _side(name: SideName, tokenizer: SideName, ids: int, dtype: torch.dtype) -> Side:
    from transformers import GPT2Config, GPT2LMHeadModel

    own = _tokenizer(tokenizer, ids)
    config = GPT2Config(
        vocab_size=len(own) + COLUMNS_TOO_MANY,
        n_embd=WIDTHS[name],
        n_layer=1,
        n_head=2,
        n_positions=256,
        initializer_range=0.3,  # far from uniform, so that a mistake shows
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(name) + WIDTHS[name])
        return Side.of(GPT2LMHeadModel(config).to(dtype).eval(), own)


def _tokenizer(name: SideName, ids: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [(left, right) for left, right in map(str.split, MERGES[name])]
    roles = {f"{role}_token": f"<{role}>" for role in ROLES[name]}
    tokens = [*ALPHABET, *("".join(merge) for merge in merges), *roles.values()]
    random.Random(f"{name}/{ids}").shuffle(tokens)
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def documents() -> list[Document]:
    """With and without an unsupervised prompt and an end, of different lengths."""
    draw = random.Random(0)
    return [
        Document((Segment(random_text(draw, 12)),)),
        Document((Segment(random_text(draw, 3), "user", False), Segment(random_text(draw, 9)))),
        Document((Segment("b"),)),
        Document((Segment(random_text(draw, 15)),), complete=False),
        Document((Segment(random_text(draw, 6), "user", False), Segment(random_text(draw, 4)))),
    ]


def long_documents(words: int) -> list[Document]:
    """One document of so many words, and a short one."""
    draw = random.Random(1)
    return [Document((Segment(random_text(draw, words)),)), Document((Segment("abcd"),))]


def random_text(draw: random.Random, words: int) -> str:
    """Words of the alphabet, now and then apart by more than a space."""
    made = ("".join(draw.choices("aabbccdd12é", k=draw.randint(1, 8))) for _ in range(words))
    return "".join(word + draw.choice((" ", " ", " ", "  ", "\n")) for word in made).strip()


def batch_of(student: Side, teacher: Side, found: Sequence[Document]) -> Batch:
    """The documents on both sides."""
    examples = [build_example(document, student, teacher) for document in found]
    return collate(examples, *(side.specials.pad or 0 for side in (student, teacher)))


@lru_cache
def tiny_sides(*, one_tokenizer: bool) -> tuple[Side, Side]:
    """Student and teacher of the pair `tiny`; one tokenizer is the student's."""
    hf_logging.disable_progress_bar()
    student = models.load_side(ModelSpec(model="tiny:student"))
    if not one_tokenizer:
        return student, models.load_side(ModelSpec(model="tiny:teacher"))
    model = tiny.make_model(student.tokenizer, tiny.SIZES["teacher"][1])
    return student, Side.of(model, student.tokenizer)
