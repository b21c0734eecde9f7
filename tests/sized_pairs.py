"""A pair with vocabularies of any size, made on the spot: greedy tokenizers and random Llamas."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from harness_setup import network_of, teacher_of
from transformers import LlamaConfig, LlamaForCausalLM

from ctdbench.distill.batches import Batch, collate
from ctdbench.distill.corpus import Document, Segment
from ctdbench.distill.examples import AlignedSide, Example, build_example
from ctdbench.distill.models import Side
from ctdbench.distill.step import Balance, Step
from ctdbench.distill.tokenizers import Specials
from ctdbench.errors import UserError
from ctdbench.launch.check.method.pair import Pair
from ctdbench.method import Method, PairTables
from ctdbench.text.token_bytes import Encoding
from ctdbench.text.vocabulary import ids_by_bytes

LONGEST = 12  # bytes of a token
LETTERS = b"etaoinshrdlucmfwygpbvkxqjz"
SPECIALS = Specials(bos=0, eos=1, pad=2, unk=None)


class Greedy:
    """In place of `TokenBytes`: cuts a text into the longest tokens of a vocabulary."""

    def __init__(self, vocabulary: list[bytes]) -> None:
        self.vocabulary = vocabulary
        self.ids = ids_by_bytes(vocabulary)

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        return [self.encode(text) for text in texts]

    def encode(self, text: str) -> Encoding:
        data, found, ends, place = text.encode(), [], [], 0
        while place < len(data):
            token = self.first(data[place : place + LONGEST])
            place += len(self.vocabulary[token])
            found.append(token)
            ends.append(place)
        end = np.array(ends, np.int64)
        return Encoding(np.array(found, np.int64), np.append(0, end[:-1]), end)

    def first(self, data: bytes) -> int:
        """The longest token that the bytes start with."""
        return next(self.ids[data[:n]] for n in range(len(data), 0, -1) if data[:n] in self.ids)


@lru_cache
def tokens(size: int, seed: int) -> Greedy:
    """Three specials, all bytes, and words of 1 to 11 letters, a few letters far more often.

    So most begin with others. Half of the words come after a space, and half of them are the same
    for every seed.
    """
    made = {bytes([value]): None for value in range(256)}
    chances = [1 / rank for rank in range(1, len(LETTERS) + 1)]
    for source, until in ((0, size // 2), (seed, size - 3)):
        chance = random.Random(source)
        while len(made) < until:
            length = round(chance.triangular(1, LONGEST - 1, 4))
            word = bytes(chance.choices(LETTERS, chances, k=length))
            made[chance.choice((b"", b" ")) + word] = None
    return Greedy([b"", b"", b"", *made])


@lru_cache
def made_side(size: int, seed: int, width: int, layers: int = 1) -> Side:
    """A random Llama with so many tokens and channels."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return Side(LlamaForCausalLM(config).eval(), None, tokens(size, seed), SPECIALS)  # type: ignore[arg-type]


def text_of(pair: Pair, count: int, *, repeat: int = 1) -> str:
    """Text out of both sides' words: `count` of the student's tokens, `repeat` times over.

    What repeats begins with a space, so that every time it is cut alike.
    """
    chance = random.Random(0)
    words = [side.tokens.vocabulary[259:] for side in (pair.student, pair.teacher)]
    joined = b"".join(chance.choice(words[chance.random() < 0.5]) for _ in range(2 * count))
    text = " " + joined.decode().lstrip()
    return text[: pair.student.tokens.encode(text).byte_end[count - 1]] * repeat


def batch_of(texts: Sequence[str], pair: Pair, *, merge: int = 1) -> Batch:
    """The documents on both sides. merge: how many chunks in a row become one."""
    documents = (Document((Segment(text),)) for text in texts)
    examples = [build_example(document, pair.student, pair.teacher) for document in documents]
    return collate([_merged(example, merge) for example in examples], 2, 2)


def _merged(example: Example, merge: int) -> Example:
    def joined(side: AlignedSide) -> AlignedSide:
        return replace(side, chunk=np.where(side.chunk >= 0, side.chunk // merge, -1))

    chunks = -(-example.chunks // merge)
    return replace(
        example, student=joined(example.student), teacher=joined(example.teacher), chunks=chunks
    )


def nearest_prefix(
    queries: Sequence[bytes], others: Sequence[bytes], special_pairs: Any
) -> np.ndarray[Any, Any]:
    """In place of `minimum_edit_map`, which takes minutes: the longest token at the front."""
    greedy = Greedy(list(others))
    found = [greedy.first(text) if text else -1 for text in queries]
    for query, other in special_pairs:
        found[query] = other
    return np.array(found, np.int64)


@lru_cache
def make_pair(
    sizes: tuple[int, int], width: int, layers: int, *, one_tokenizer: bool = False
) -> Pair:
    """sizes: tokens of the student's and the teacher's vocabulary. One tokenizer is the student's.

    Nothing in the tables takes long: W is made by longest matches, edit maps by `nearest_prefix`.
    """
    student = made_side(sizes[0], 1, width, layers)
    own = (sizes[0], 1) if one_tokenizer else (sizes[1], 2)
    teacher = made_side(*own, 3 * width // 2, layers)
    tables = PairTables.build(
        student.tokens.vocabulary,
        teacher.tokens.vocabulary,
        special_pairs=student.specials.pairs(teacher.specials),
        student_special=range(3),
        teacher_special=range(3),
        edit_mapping=nearest_prefix,
    )
    return Pair(student, teacher, tables)


def pair_for(method: Method, sizes: tuple[int, int], width: int, layers: int = 1) -> Pair:
    """A pair that the method serves: with one tokenizer on both sides where it serves no other."""
    pair = make_pair(sizes, width, layers)
    try:
        method.check(pair.tables)
    except UserError:
        return make_pair(sizes, width, layers, one_tokenizer=True)
    return pair


def step_of(method: Method, pair: Pair, block_rows: int, balancing: Balance | None = None) -> Step:
    """balancing: as published, unless told otherwise."""
    return Step(
        network_of(method, pair.student, pair.teacher),
        teacher_of(pair.teacher),
        method,
        pair.tables,
        accelerator=Accelerator(cpu=True),
        block_rows=block_rows,
        balancing=balancing or method.balance,
    )
