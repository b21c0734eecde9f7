"""`ctdbench check PAIR`: what a run needs of a pair, one line a finding.

Tokenizers are tried on held-out documents of the embedded corpus and on text that is hard to cut,
models on a few of the documents. What cannot be had fails once and is skipped from there on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from functools import cached_property, partial
from io import StringIO

from ctdbench import results
from ctdbench.distill import models, references
from ctdbench.distill.corpus import cut, load_corpus
from ctdbench.distill.inspection import tokenizer_side
from ctdbench.distill.models import Side
from ctdbench.errors import UserError
from ctdbench.evaluate import EvaluationRequest, evaluate
from ctdbench.launch.check.findings import Failed, Finding, Skipped, found_by, tell
from ctdbench.spec import ModelSpec, PairSpec, TrainSpec
from ctdbench.text import diagnostics
from ctdbench.text.token_bytes import Encoding, Refusal

STUDENT = "student"
ODD = (
    "  two  spaces,\ttabs\tand\r\nline ends\n\n\n",
    "naïve café, ß, ñ, Ω, 42 ÷ 17 ≈ 2.47; “quotes” … and a no-break\u00a0space",
    "历史地理学的起源，我们应选择。 日本語 한국어 हिन्दी العربية",
    "🙂 👩‍👩‍👧 🇫🇷",
    "A text that spells <s>, </s>, <|im_end|> and <0x41> is text.",
)
DOCUMENTS, SCORED = 20, 4  # of the embedded corpus: what tokenizers and models are tried on


class PairCase:
    """A pair, with what is loaded of it kept."""

    def __init__(self, pair: PairSpec, *, trust_remote_code: bool = False) -> None:
        self.pair = pair
        self.trust = trust_remote_code
        names = [STUDENT, *results.baselines(len(pair.teachers))[:-1]]
        self.specs: dict[str, ModelSpec] = dict(
            zip(names, (pair.student, *pair.teachers), strict=True)
        )
        self.found: dict[str, Side] = {}

    @cached_property
    def documents(self) -> list[str]:
        """Some of the embedded corpus, as a run cuts it."""
        held_out = load_corpus("embedded").held_out[:DOCUMENTS]
        longest = TrainSpec().document_bytes
        return [piece.text for document in held_out for piece in cut(document, longest)]

    def side(self, role: str) -> Side:
        """The role's tokenizer; raises Skipped where it cannot be had."""
        if role not in self.found:
            self._require(role)
            side = tokenizer_side(self.specs[role], trust_remote_code=self.trust)
            self.found[role] = side
        return self.found[role]

    def model(self, role: str) -> Side:
        """The role's model as a run starts with it; raises Skipped where it cannot be had."""
        self._require(role)
        return models.load_side(self.specs[role], trust_remote_code=self.trust)

    def encoded(self, role: str) -> list[Encoding | Refusal]:
        """The texts as the role's tokenizer cuts them."""
        return self.side(role).tokens.encode_batch([*self.documents, *ODD])

    def _require(self, role: str) -> None:
        try:
            required(self.specs[role])
        except UserError:
            raise Skipped("its reference cannot be had") from None


def run(
    pair: PairSpec,
    say: Callable[[str], None],
    *,
    trust_remote_code: bool = False,
    debug: bool = False,
) -> bool:
    """Say the report line by line as it comes; whether every check passed."""
    case = PairCase(pair, trust_remote_code=trust_remote_code)
    say(f"{pair.name}  {pair.title}".rstrip())
    with redirect_stderr(StringIO()):  # bars between the findings
        return tell(check(case), say, debug=debug)


def check(case: PairCase) -> Iterator[Finding]:
    """Every check on every side of a pair, in order."""
    of_sides = {
        "references": reference,
        "text and bytes": lossless,
        "vocabularies": vocabulary,
        "special tokens": specials,
    }
    for group, run_check in of_sides.items():
        for role in case.specs:
            yield found_by(group, role, partial(run_check, case, role))
    teachers = [role for role in case.specs if role != STUDENT]
    for role in teachers:
        yield found_by("alignment", f"student and {role}", partial(alignment, case, role))
    yield found_by("models", "student's start", partial(start, case))
    for role in teachers:
        yield found_by("models", role, partial(model, case, role))


def required(spec: ModelSpec) -> list[str]:
    """The references of a side; raises UserError for one that is malformed or cannot be had."""
    stated = list(dict.fromkeys(text for text in (spec.model, spec.tokenizer) if text))
    for text in stated:
        references.require(references.parse(text))
    return stated


def reference(case: PairCase, role: str) -> str:
    """Models and tokenizers can be had."""
    return ", ".join(required(case.specs[role]))


def lossless(case: PairCase, role: str) -> str:
    """The bytes of a text's tokens, joined, are the text's."""
    encoded = case.encoded(role)
    refused = [part.reason for part in encoded if isinstance(part, Refusal)]
    if refused:
        raise Failed(f"{len(refused)} of {len(encoded)} texts; the first one: {refused[0]}")
    tokens, size = _sizes(encoded)
    return f"{len(encoded)} texts, {size:,} bytes, {size / tokens:.2f} bytes a token"


def vocabulary(case: PairCase, role: str) -> str:
    """Ids, the byte strings that they stand for, and how many of the 256 bytes are tokens."""
    words = case.side(role).tokens.vocabulary
    known = set(words) - {b""}
    single = sum(len(word) == 1 for word in known)
    others = words.count(b"")
    return (
        f"{len(words):,} ids, {len(known):,} byte strings, {others:,} specials and holes; "
        f"{single} of 256 bytes have a token of their own"
    )


def specials(case: PairCase, role: str) -> str:
    """The tokens that have a role; the end is what two tokenizers can always compare."""
    side = case.side(role)
    if side.specials.eos is None:
        raise Failed("no end token; give the tokenizer an eos_token, so that texts end")
    named = {
        name: "none" if index is None else side.tokenizer.convert_ids_to_tokens(index)
        for name, index in vars(side.specials).items()
    }
    return ", ".join(f"{name} {token}" for name, token in named.items())


def alignment(case: PairCase, role: str) -> str:
    """The two tokenizations meet inside documents."""
    sides = diagnostics.both_spelled(case.encoded(STUDENT), case.encoded(role))
    if not sides[0]:
        raise Skipped("no text is spelled by both tokenizers")
    found = diagnostics.chunk_statistics(diagnostics.align_text(*sides))
    if found.chunks <= len(sides[0]):
        raise Failed("the tokenizations meet only where documents end, so nothing can be compared")
    roles = case.side(STUDENT).specials.pairs(case.side(role).specials)
    return (
        f"{found.chunks:,} chunks, {found.one_to_one_bytes:.1%} of the text in 1:1 chunks, the "
        f"longest has {found.longest_bytes} bytes; {len(roles)} special tokens have a partner"
    )


def start(case: PairCase) -> str:
    """What the student starts from, and what of it is trained."""
    side = case.model(STUDENT)
    told = _bits(case, side)
    if case.pair.lora is not None:
        side.model.requires_grad_(False)
        network = models.add_lora(side.model, case.pair.lora)
        sizes = [p.numel() for p in network.parameters() if p.requires_grad]
        return f"{told}; LoRA trains {sum(sizes):,} parameters"
    return f"{told}; all {side.model.num_parameters():,} parameters are trained"


def model(case: PairCase, role: str) -> str:
    """The teacher loads and predicts text."""
    return _bits(case, case.model(role))


def _bits(case: PairCase, side: Side) -> str:
    """Bits per byte of some documents, beside those of a guess among all tokens."""
    texts = case.documents[:SCORED]
    request = EvaluationRequest(side.model, side.tokenizer, ("bpb_heldout",), heldout=texts)
    found = evaluate(request).scores["bpb_heldout"]["bpb"]
    if not math.isfinite(found):
        raise Failed(f"{found} bits per byte: its numbers are not finite")
    tokens, size = _sizes(side.tokens.encode_batch(texts))
    guess = tokens * math.log2(len(side.tokens.vocabulary)) / size if size else math.nan
    return f"{found:.2f} bits per byte of {len(texts)} documents, {guess:.2f} by guessing"


def _sizes(encoded: Sequence[Encoding | Refusal]) -> tuple[int, int]:
    """Tokens and bytes of what was not refused."""
    kept = [part for part in encoded if isinstance(part, Encoding)]
    return sum(len(part.ids) for part in kept), sum(int(part.byte_end[-1]) for part in kept)
