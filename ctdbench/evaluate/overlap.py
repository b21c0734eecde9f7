"""Whether evaluation items leaked into a training corpus: shared n-grams of words.

Thirteen words are the customary length (GPT-3, arXiv 2005.14165, appendix C). Chinese, Japanese and
Korean text has no spaces, so each of its characters counts as a word.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctdbench.evaluate.loading import task_rows
from ctdbench.evaluate.task_files import WITHOUT_FILE

_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")


@dataclass(frozen=True)
class Overlap:
    """Indices of the items that share an n-gram with the corpus, and of the documents concerned."""

    items: frozenset[int]
    documents: frozenset[int]


def shared_ngrams(items: Iterable[str], corpus: Iterable[str], n: int = 13) -> Overlap:
    """Which items share n consecutive words (lower-cased, alphanumeric) with which documents.

    The items' n-grams are held in memory, the corpus is read once as a stream; an item of fewer
    than n words shares nothing. The caller drops the items or the documents, or reports them.
    """
    owners: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        for gram in set(_ngrams(item, n)):
            owners[gram].append(index)
    found: set[int] = set()
    documents = []
    for index, document in enumerate(corpus):
        shared = owners.keys() & _ngrams(document, n)
        if shared:
            documents.append(index)
            found.update(owner for gram in shared for owner in owners[gram])
    return Overlap(frozenset(found), frozenset(documents))


def _ngrams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return zip(*(words[start:] for start in range(n)), strict=False)


def task_texts(
    task: str, data_dir: Path | None = None, extra_tasks: Iterable[Path] = ()
) -> list[str]:
    """The text of every evaluated item of a task or group: question, choices and answer together.

    Loads the data (local files or hub) and runs the task files' Python. A teacher measure has the
    items of the text that it reads; those of held-out documents (`bpb_heldout`) are none: [].
    """
    read = WITHOUT_FILE.get(task, task)
    return ["\n".join(_texts(row)) for row in task_rows(read, data_dir, extra_tasks)]


def _texts(value: Any) -> Iterator[str]:
    """Every text of a row, at any depth: choices may be {"text": [..], "label": [..]}."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)
