"""A sound method as a plugin, and the changes to it that `ctdbench check` has to notice."""

from __future__ import annotations

from ctdbench.launch.check import method as conformance

SOUND = '''
"""Match: the squared difference of both sides' entropies where a chunk ends."""

from __future__ import annotations

from pydantic import Field

from ctdbench import ops
from ctdbench.method import Method, MethodOptions, Term

META = {
    "title": "Match: entropies of chunks",
    "url": "https://example.org/match",
    "year": 2026,
    "needs": ["teacher logits"],
    "cost": "one softmax a side",
    "floor": "zero",
}


class MatchOptions(MethodOptions):
    weight: float = Field(1.0, ge=0, description="Weight of the term.")


class Match(Method):
    Options = MatchOptions

    def weights(self):
        return {"match": self.options.weight}

    def terms(self, block, modules):
        return {"match": self.match(block, (block.student, block.taught()))}

    def match(self, block, sides):
        own, taught = rows(block).T
        gap = entropy(sides[0].scores()[own]) - entropy(sides[1].scores()[taught].detach())
        return Term(gap.square().sum(), size(own))

    def counts(self, block):
        return {"match": size(rows(block)[:, 0])}


def rows(block):
    return ops.last_row_pairs(block.student.chunk, block.taught().chunk, block.chunks)


def size(own):
    return own.new_tensor(len(own))


def entropy(logits):
    scores = logits.log_softmax(-1)
    return -(scores.exp() * scores).sum(-1)


METHOD = Match
'''

STEPPED = {"block size", "micro-batches", "streaming"}
EVERY_CALL = set(conformance.names()) - {"META", "options"}

# name: (what is written in the place of what, the checks that it must fail)
BROKEN: dict[str, tuple[dict[str, str], set[str]]] = {
    "a mean over the block": (
        {
            "gap.square().sum()": "gap.square().sum() / max(len(own), 1)",
            "new_tensor(len(own))": "new_tensor(1)",
        },
        STEPPED,
    ),
    "rows of padding": (
        {
            "return Term(": "away = [entropy(s.scores()[~s.supervised]).sum() for s in sides]\n"
            "        gap = gap + away[0] - away[1].detach()\n"
            "        return Term("
        },
        {"padding", "streaming"},
    ),
    "0/0 for a document without chunks": (
        {
            "gap.square().sum()": "(ops.segment_sum(gap.square(), sides[0].document[own], n(block))"
            " / block.document_chunks * block.document_chunks).sum()",
            "def size(": "def n(block):\n    return len(block.document_chunks)\n\n\ndef size(",
        },
        {"padding", "no chunk"},
    ),
    "a gradient to the teacher": ({".detach()": ""}, {"teacher"}),
    "no gradient to the student": ({"[own])": "[own].detach())"}, {"terms", "five steps"}),
    "a count that lies": (
        {"size(rows(block)[:, 0])": "size(rows(block)[:, 0]) + 1"},
        {*STEPPED, "counts", "five steps"},
    ),
    "a count by the logits": (
        {"sum(), size(own)": "sum(), (sides[0].scores()[own, 0] > 0).sum()"},
        {*STEPPED, "counts", "student ids", "five steps"},
    ),
    "an option without a description": ({', description="Weight of the term."': ""}, {"options"}),
    "options that take anything": (
        {"Options(MethodOptions):": 'Options(MethodOptions, extra="allow"):'},
        {"options"},
    ),
    "a weight of no term": (
        {'"match": self.options': '"mach": 2.0, "match": self.options'},
        {"weights"},
    ),
    "rows modified in place": (
        {"own, taught = ": "sides[1].scores().clamp_(min=-1e6)\n        own, taught = "},
        {"inputs"},
    ),
    "a column by its number": (
        {"logits.log_softmax": "logits[:, 5:].log_softmax"},
        {"student ids", "teacher ids"},
    ),
    "a weight by the document's place": (
        {"gap.square()": "((1 + sides[0].document[own]) * gap.square())"},
        {"document order", "micro-batches"},
    ),
    "a logarithm of zero": (
        {"scores = logits.log_softmax(-1)": "scores = logits.softmax(-1).log()"},
        {"one-hot logits"},
    ),
    "a floor that is none": ({"- entropy(": "+ entropy("}, {"floor"}),
    "a gradient turned around": (
        {
            "return Term(": "gap = 3 * gap.detach() - 2 * gap\n        return Term(",
        },
        {"five steps"},  # although cross-entropy, which weighs more, falls
    ),
    "a sign turned around": ({"gap.square()": "-gap.square()"}, {"floor"}),
    "a difference that has a sign": ({"gap.square()": "gap"}, {"floor"}),
    "no year": ({'"year": 2026,': ""}, {"META"}),
    "an exception from no check": (
        {'"floor": "zero",': '"floor": "zero", "exceptions": {"blok size": "why"},'},
        {"META"},
    ),
    "an exception from what holds of all": (
        {'"floor": "zero",': '"floor": "zero", "exceptions": {"options": "why"},'},
        {"META"},
    ),
    "an exception for an option that is none": (
        {'"floor": "zero",': '"floor": "zero", "exceptions": {"floor if wait=None": "why"},'},
        {"META"},
    ),
    "a floor without its reason": ({'"zero"': '"zero, no minimum"'}, {"META"}),
    "no terms": ({"return Term(": "return ("}, EVERY_CALL),
}

# name: (what is written in the place of what, the check, how its line must read)
LINES: dict[str, tuple[dict[str, str], str, str]] = {
    "counts": (
        {"size(rows(block)[:, 0])": "size(rows(block)[:, 0]) + 1"},
        "counts",
        r"match counts (\d+) in terms\(\), (\d+) in counts\(\)",
    ),
    "counts by the logits": (
        {
            "sum(), size(own)": "sum(), (sides[0].scores()[own, 0] > 0).sum()",
            "def counts(": "def told(",
        },
        "counts",
        r"match counts \d+ in terms\(\), \d+ with other student logits; "
        "a count must not depend on them",
    ),
    "exceptions": (
        {'"floor": "zero",': '"exceptions": ["padding"],'},
        "META",
        r"META exceptions must be \{CHECK: REASON\}; checks: floor, padding, .*, micro-batches",
    ),
    "a row": (
        {'"floor": "zero",': '"row": ["weight"],'},
        "META",
        r"META row: \['weight'\] is no option; there are: ce_weight, weight",
    ),
    "no term": (
        {"return Term(gap.square().sum(), size(own))": "return gap.square().sum()"},
        "terms",
        r"term match is of type Tensor\. give \{NAME: Term\(total, count\)\}, both .*",
    ),
    "a column of the log": (
        {'"match": self.match': '"loss": self.match'},
        "terms",
        r"term 'loss' has no name of its own in the log\. take letters, .*",
    ),
    "an option": (
        {'"floor": "zero",': '"exceptions": {"padding if wait=1": "why"},'},
        "META",
        "META exceptions: 'padding if wait=1' names no OPTION=VALUE; options: ce_weight, weight",
    ),
    "padding": (
        {
            "return Term(": "gap = gap + sides[0].scores()[~sides[0].supervised].sum()\n"
            "        return Term("
        },
        "padding",
        ".*; rows with chunk -1 or supervised False must not count",
    ),
    "a sign": (
        {"gap.square()": "-gap.square()"},
        "floor",
        r'.* is a sign wrong\? If it is meant, META "floor": "zero, no minimum: REASON"',
    ),
    "no rows": (
        {"return Term(": "sides[1].token.max()\n        return Term("},
        "block size",
        r"with no rows on the teacher's side: RuntimeError: max\(\).* \(match.py line \d+\)",
    ),
}


def changed(changes: dict[str, str]) -> str:
    """The sound plugin with other text in some places."""
    source = SOUND
    for old, new in changes.items():
        assert old in source
        source = source.replace(old, new)
    return source
