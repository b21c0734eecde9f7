"""Text that a model of the pair writes: the teacher's, cached, or the student's own, on-policy.

A document gives a prompt, one side's model continues it, and the result is a document again, which
both sides are laid over as over any other: each in its own chat template, end tokens paired by
role. The model reads exactly the tokens that `examples.render` puts before the answer on its side,
so a method scores what was written under the context that it was written in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from ctdbench.cache import cache_dir
from ctdbench.distill import models
from ctdbench.distill.corpus import Document, Segment, cut
from ctdbench.distill.decoding import Decoding, uniforms, write_tokens, writing
from ctdbench.distill.examples import Template, render
from ctdbench.distill.models import Side
from ctdbench.distill.rendering import end_token
from ctdbench.results import write_json_atomic, write_jsonl_atomic
from ctdbench.text.token_bytes import NotLossless

__all__ = ["Decoding", "continued", "prompt", "rendering", "teacher_text", "text_folder"]

FORMAT_VERSION = 1
SHORTEST_PROMPT = 4  # bytes: the longest character, so that there is always something to cut off


def prompt(document: Document, prompt_bytes: int) -> Document:
    """What a document gives a model to continue; nothing of it is supervised.

    Its leading unsupervised segments, or where there are none all segments but the last. Of a
    single segment the first `prompt_bytes` bytes (of a short one at most half), cut before a space.
    """
    given = tuple(takewhile(lambda segment: not segment.supervised, document.segments))
    given = given or document.segments[:-1]
    if not given:
        room = max(SHORTEST_PROMPT, min(prompt_bytes, document.size // 2))
        given = next(cut(document, room)).segments
    return Document(tuple(replace(part, supervised=False) for part in given), complete=False)


def rendering(side: Side, template: Template) -> Literal["chat template", "plain"]:
    """How a side shows prompts: a base model has no chat template and gets plain text."""
    own = template == "chat" and side.tokenizer.chat_template is not None
    return "chat template" if own else "plain"


def continued(
    side: Side,
    prompts: Sequence[Document],
    decoding: Decoding,
    *,
    template: Template,
    stream: str,
    precision: str = "float32",
    progress: bool = False,
) -> list[Document | None]:
    """Every prompt with what the side's model writes next, in order.

    The answer is a supervised segment of role `assistant` (`text` after plain text); `complete`
    says that the model ended it by itself. None where there is no answer: it has no text, the
    tokenizer cannot spell the prompt, or the model's context is too short for the longest answer.

    What is drawn follows from (decoding.seed, stream, text of the prompt) and the model. The model
    may be in training: it is left as it was found, and the global random state is not touched.
    precision: resolved, as `autocast` takes it. Raises UserError where a chat template cannot
    render a prompt.
    """
    author = _Author(side, decoding, template, stream, precision)
    with _bar(len(prompts), progress) as bar:
        return author.answers(prompts, bar)


def teacher_text(
    side: Side,
    prompts: Sequence[Document],
    decoding: Decoding,
    *,
    template: Template,
    identity: str,
    precision: str = "float32",
    progress: bool = False,
) -> tuple[list[Document], dict[str, int]]:
    """The prompts continued by the teacher, each once, and how many are left out, by reason.

    Each batch is written to the cache when it is done (`text_folder`), so an interrupted generation
    goes on where it stood, and what a smaller budget asked for before is not made again.
    identity: the teacher's content. Otherwise as `continued`, stream "teacher".
    """
    distinct = list(dict.fromkeys(prompts))
    folder = text_folder(side, identity, decoding, template, precision)
    found = _read(folder)
    author = _Author(side, decoding, template, "teacher", precision)
    pending = sorted((p for p in distinct if p not in found), key=lambda given: -given.size)
    with _bar(len(distinct), progress, done=len(distinct) - len(pending)) as bar:
        for start in range(0, len(pending), decoding.batch_size):
            shard = pending[start : start + decoding.batch_size]
            answers = author.answers(shard, bar)
            _write(folder, shard, answers)
            found.update(zip(shard, answers, strict=True))
    texts = [document for given in distinct if (document := found[given]) is not None]
    skipped = {
        "prompt that another document has": len(prompts) - len(distinct),
        "no answer by the teacher": len(distinct) - len(texts),
    }
    return texts, {reason: count for reason, count in skipped.items() if count}


def text_folder(
    side: Side, identity: str, decoding: Decoding, template: Template, precision: str
) -> Path:
    """The folder of the cache with a teacher's texts, made if need be: `settings.json`, and shards.

    A shard `<hash of its prompts>.jsonl` is also a corpus (`jsonl:` reads its segments).
    """
    drawn = {key: value for key, value in asdict(decoding).items() if key != "batch_size"}
    settings = {
        "format": FORMAT_VERSION,
        "teacher": identity,
        "template": template,
        "rendering": rendering(side, template),
        "precision": precision,
        "decoding": drawn,
    }
    folder = cache_dir() / "generated" / _digest(settings)
    if not (folder / "settings.json").is_file():
        write_json_atomic(folder / "settings.json", settings)
    return folder


@dataclass
class _Author:
    """A side's model under one decoding, template and stream; counts the tokens it wrote."""

    side: Side
    decoding: Decoding
    template: Template
    stream: str
    precision: str
    tokens: int = 0

    def __post_init__(self) -> None:
        self.ends = _ends(self.side, self.template)
        # Whatever is no text stops the answer: what a stray special is followed by was written in
        # answer to it, and no side is ever shown it.
        vocabulary = self.side.tokens.vocabulary
        self.stops = self.ends | {index for index, token in enumerate(vocabulary) if not token}
        self.prefix = b" " if self.template == "chat" and self.side.tokens.puts_a_space() else b""

    def answers(self, prompts: Sequence[Document], bar: Any) -> list[Document | None]:
        """`continued`, in batches of prompts of about the same length."""
        openings = {i: ids for i, given in enumerate(prompts) if (ids := self._opening(given))}
        order = sorted(openings, key=lambda i: (-len(openings[i]), i))
        found: list[Document | None] = [None] * len(prompts)
        with writing(models.base_model(self.side.model), self.precision) as model:
            for start in range(0, len(order), self.decoding.batch_size):
                batch = order[start : start + self.decoding.batch_size]
                texts = [prompts[i].text for i in batch]
                rows = self.written(model, [openings[i] for i in batch], texts)
                for i, ids in zip(batch, rows, strict=True):
                    found[i] = self._document(prompts[i], ids)
                self._advance(bar, len(batch), rows)
        bar.update(len(prompts) - len(order))
        return found

    def written(
        self, model: Any, openings: Sequence[list[int]], texts: Sequence[str]
    ) -> list[list[int]]:
        """The tokens of the answers to the prompts with these openings and texts."""
        return write_tokens(
            model,
            openings,
            torch.stack([uniforms(self.decoding, self.stream, text) for text in texts]),
            self.decoding,
            stops=self.stops,
            columns=len(self.side.tokens.vocabulary),
            pad=self.side.specials.pad or 0,
        )

    def _opening(self, given: Document) -> list[int]:
        """The tokens before the answer; none where the model cannot read them and answer."""
        try:
            ids = _chat(given, self.side) if self.template == "chat" else _plain(given, self.side)
        except NotLossless:
            return []
        context = self.side.positions
        fits = context is None or len(ids) + self.decoding.max_new_tokens <= context
        return ids if fits else []

    def _document(self, given: Document, ids: list[int]) -> Document | None:
        """The prompt and the text of the tokens, as far as that is whole characters."""
        vocabulary = self.side.tokens.vocabulary
        spelled = b"".join(vocabulary[index] for index in ids if index not in self.stops)
        spelled = spelled.removeprefix(self.prefix)
        text = _whole_characters(spelled)
        if not text.strip():
            return None
        complete = ids[-1] in self.ends and len(text.encode("utf-8")) == len(spelled)
        return Document((*given.segments, _answer(text, given)), complete)

    def _advance(self, bar: Any, count: int, rows: Sequence[list[int]]) -> None:
        self.tokens += sum(map(len, rows))
        bar.update(count)
        if seconds := bar.format_dict["elapsed"]:
            bar.set_postfix_str(f"{self.tokens / seconds:.0f} tok/s")


def _plain(given: Document, side: Side) -> list[int]:
    bos = [] if side.specials.bos is None else [side.specials.bos]
    text = given.text + Document((*given.segments, _answer("", given))).lead(len(given.segments))
    return [*bos, *side.tokens.encode(text).ids.tolist()]


def _chat(given: Document, side: Side) -> list[int]:
    """What training puts before an answer, tried with one of a single letter."""
    sequence = render(Document((*given.segments, _answer("a", given))), side, "chat")
    size = sum(len(part.text.encode("utf-8")) for part in given.segments)
    answer = np.flatnonzero(sequence.is_text & (sequence.byte_start >= size))
    return list(map(int, sequence.ids[: answer[0]]))


def _ends(side: Side, template: Template) -> set[int]:
    """Ids that end an answer: EOS, and what a chat template puts behind one."""
    return {end for end in (side.specials.eos, end_token(side, template)) if end is not None}


def _answer(text: str, given: Document) -> Segment:
    """What continues a prompt: a question is answered, text and begun answers go on."""
    last = given.segments[-1].role
    goes_on = last in ("text", "assistant")
    return Segment(text, last if goes_on else "assistant", joined=goes_on)


def _whole_characters(data: bytes) -> str:
    """The text up to the first byte that is no UTF-8, such as an unfinished last character."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        return data[: error.start].decode("utf-8")


def _bar(total: int, shown: bool, done: int = 0) -> Any:
    label = "generating text"
    return tqdm(total=total, initial=done, desc=label, unit="text", disable=not shown)


def _read(folder: Path) -> dict[Document, Document | None]:
    """Prompt -> its document, None where the model had no answer; broken rows are passed over."""
    found: dict[Document, Document | None] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
                document = Document(tuple(Segment(**s) for s in row["segments"]), row["complete"])
                intact = row["check"] == _digest(asdict(document))
            except (ValueError, TypeError, KeyError):
                continue
            if intact:
                given = tuple(part for part in document.segments if not part.supervised)
                answered = len(given) < len(document.segments)
                found[Document(given, complete=False)] = document if answered else None
    return found


def _write(folder: Path, prompts: Sequence[Document], answers: Sequence[Document | None]) -> None:
    kept = [asdict(answer or given) for given, answer in zip(prompts, answers, strict=True)]
    rows = [{**row, "check": _digest(row)} for row in kept]
    name = _digest([asdict(given) for given in prompts])
    write_jsonl_atomic(folder / f"{name}.jsonl", rows)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]
