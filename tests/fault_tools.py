"""What the tests of faults measure: tokens and chunks of real tokenizers, memory of a backward."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

from random_rows import Case
from random_texts import text_case
from test_examples import chunk_bytes, plain, side
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from wheel_tokenizers import wheel_token_bytes

from ctdbench.distill.examples import Example, build_example

Cuts = set[tuple[int, int]]
Names = tuple[str, str]


def equal_places(first: list[Any], second: list[Any]) -> Cuts:
    """Places, counted from 1, at which the two lists have the same."""
    pairs = product(enumerate(first, 1), enumerate(second, 1))
    return {(i, j) for (i, one), (j, other) in pairs if one == other}


def byte_cuts(names: Names, text: str) -> Cuts:
    """Numbers of tokens on both sides after which both are at the same byte: ends of chunks."""
    ends = [wheel_token_bytes(name).encode(text).byte_end.tolist() for name in names]
    return equal_places(*ends)


def token_texts(names: Names, text: str) -> list[list[bytes]]:
    """What every token covers of the text, on both sides."""
    data, found = text.encode(), []
    for name in names:
        encoding = wheel_token_bytes(name).encode(text)
        spans = zip(encoding.byte_start, encoding.byte_end, strict=True)
        found.append([data[start:end] for start, end in spans])
    return found


def example_of(names: Names, text: str) -> Example:
    """The text on both sides, checked."""
    return checked(names, build_example(plain(text), side(names[0]), side(names[1])))


def checked(names: Names, found: Example) -> Example:
    """Every chunk spells the same on both sides, by the spans and by the tokens themselves."""
    pieces = [chunk_bytes(found, own) for own in (found.student, found.teacher)]
    assert pieces[0] == pieces[1]
    for name, own in zip(names, (found.student, found.teacher), strict=True):
        spelled = [b""] * found.chunks
        for chunk, token in zip(own.chunk, own.sequence.ids, strict=True):
            if chunk >= 0:
                spelled[chunk] += wheel_token_bytes(name).vocabulary[token]
        dummy = spelled[0] == b" " + pieces[0][0]  # SentencePiece's
        assert spelled[dummy:] == pieces[0][dummy:]
    return found


class Allocated(TorchDispatchMode):
    """Bytes of all storages that operations make, freed or not."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        given = {part.untyped_storage()._cdata for part in args if isinstance(part, Tensor)}
        for tensor in outputs:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self.bytes += tensor.untyped_storage().nbytes()
        return result


def bytes_per_row(compute: Callable[[Case], object], documents: int, **options: Any) -> float:
    """What `compute` allocates over a random case of so many documents, per student row."""
    case = text_case(5, [9] * documents, **options)
    with Allocated() as seen:
        compute(case)
    return seen.bytes / len(case.student.token)
