"""`PrefixMap` against its definition, one suffix at a time."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from random_texts import vocabulary

from ctdbench.text.prefixes import PrefixMap
from ctdbench.text.vocabulary import ByteTrie


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9999), st.integers(2, 16))
def test_prefix_map_is_its_definition(seed: int, size: int) -> None:
    """A student of few tokens has suffixes that it cannot begin."""
    chance = random.Random(seed)
    own, taught = vocabulary(chance)[:size], vocabulary(chance)
    student, teacher = ByteTrie(own), ByteTrie(taught)
    found = PrefixMap(student, teacher, [(0, 0), (1, 0)])
    for word, text in enumerate(taught):
        for k in range(len(text)):
            place = teacher.path_start[word] + k
            assert found.token[place] == longest(own, text[k:])
            assert found.node[place] == student.node(text[k:])
        first = {0: 0}.get(word, -1) if not text else longest(own, text)
        assert found.first[word] == first
        assert found.nested[word] == nested(own, taught, word)


def longest(words: list[bytes], text: bytes) -> int:
    fitting = [u for u, word in enumerate(words) if word and text.startswith(word)]
    return max(fitting, key=lambda u: (len(words[u]), -u), default=-1)


def nested(own: list[bytes], taught: list[bytes], word: int) -> int:
    text = taught[word]
    if not text or text in own:
        return -1
    alone = [w for w in taught if w and w not in own and w != text]
    return max((len(w) for w in alone if text.startswith(w)), default=0)


def test_empty_vocabularies() -> None:
    assert PrefixMap(ByteTrie([b""]), ByteTrie([b"", b"a"])).first.tolist() == [-1, -1]
    assert PrefixMap(ByteTrie([b"a"]), ByteTrie([b""]), [(0, 0)]).first.tolist() == [0]
