"""`ctdbench check`: built-in methods pass it, and broken ones fail it where they are broken."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_cli import apart
from typer.testing import CliRunner

from ctdbench import registry, request
from ctdbench.cli import app
from ctdbench.launch import conformance
from ctdbench.launch.conformance import Finding
from ctdbench.launch.conformance.bench import Bench

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
    "no gradient to the student": ({"[own])": "[own].detach())"}, {"terms"}),
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
            '"match": self.options': '"match": 99 * self.options',
        },
        {"five steps"},
    ),
    "no year": ({'"year": 2026,': ""}, {"META"}),
    "an exception from no check": (
        {'"floor": "zero",': '"floor": "zero", "exceptions": {"blok size": "why"},'},
        {"META"},
    ),
    "no terms": ({"return Term(": "return ("}, EVERY_CALL),
}


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plugins of a test are gone after it."""
    monkeypatch.setattr(registry, "_plugins", {})


def written(folder: Path, source: str = SOUND) -> str:
    """The method's name, its file written and registered."""
    path = folder / "match.py"
    path.write_text(source, encoding="utf-8")
    return registry.add_plugin(path)


def changed(changes: dict[str, str]) -> str:
    """The sound plugin with other text in some places."""
    source = SOUND
    for old, new in changes.items():
        assert old in source
        source = source.replace(old, new)
    return source


def findings(name: str, *settings: str) -> list[Finding]:
    asked = request.build_spec({"method": name, "pair": "tiny"}, settings=settings)
    return list(conformance.check(Bench(request.resolve_options(asked))))


def failed(found: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.text for finding in found if finding.status == "FAIL"}


@pytest.mark.parametrize("name", sorted(registry.methods()))
def test_a_built_in_method_passes(name: str) -> None:
    found = findings(name)
    assert not failed(found)
    assert [finding.name for finding in found] == conformance.names()


VARIANTS = [
    ("alm", "hidden_weight=1.0"),
    ("bld", "bytes=beam"),
    ("gold", "beta=0.5"),
    ("p-kl", "projection=learned"),
    ("p-kl", "vocab_topk=9"),
    ("simct", "segmentation=code"),
    ("uld", "alignment=chunks"),
]


@pytest.mark.parametrize(("name", "setting"), VARIANTS, ids=map(" ".join, VARIANTS))
def test_its_variants_pass(name: str, setting: str) -> None:
    assert not failed(findings(name, f"method.{setting}"))


@pytest.mark.usefixtures("plugins")
def test_a_sound_plugin_passes(tmp_path: Path) -> None:
    assert not failed(findings(written(tmp_path)))


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize("fault", BROKEN)
def test_a_fault_fails_its_own_checks(fault: str, tmp_path: Path) -> None:
    changes, expected = BROKEN[fault]
    assert failed(findings(written(tmp_path, changed(changes)))).keys() == expected


@pytest.mark.usefixtures("plugins")
def test_a_crash_names_the_plugins_line(tmp_path: Path) -> None:
    source = changed({"own, taught = rows(block).T": "own, taught = missing.T"})
    line = 1 + source[: source.index("missing.T")].count("\n")
    texts = failed(findings(written(tmp_path, source)))
    assert texts.keys() == EVERY_CALL
    assert texts["padding"] == f"NameError: name 'missing' is not defined (match.py line {line})"


@pytest.mark.usefixtures("plugins")
def test_exceptions_are_skipped_with_their_reason(tmp_path: Path) -> None:
    declared = '"exceptions": {"student ids": "so", "teacher ids if weight=2.0": "and so"},'
    broken = {"logits.log_softmax": "logits[:, 5:].log_softmax", '"floor": "zero",': declared}
    name = written(tmp_path, changed(broken))
    assert failed(findings(name)).keys() == {"teacher ids"}
    found = {f.name: f for f in findings(name, "method.weight=2.0")}
    assert not failed([*found.values()])
    assert found["student ids"] == Finding("unchanged by", "student ids", "skipped", "so")
    assert found["teacher ids"].text == "and so"
    assert found["floor"].text == "zero"


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(
    ("floor", "status"), [("minimum", "FAIL"), ("none: it is far from it", "skipped")]
)
def test_the_declared_floor_is_what_counts(floor: str, status: str, tmp_path: Path) -> None:
    broken = {"- entropy(": "+ entropy(", '"floor": "zero"': f'"floor": "{floor}"'}
    name = written(tmp_path, changed(broken))
    found = {finding.name: finding for finding in findings(name)}
    assert found["floor"].status == status


@pytest.mark.usefixtures("plugins")
def test_an_entropy_floor_is_a_minimum(tmp_path: Path) -> None:
    source = changed(
        {
            "gap = entropy(": "shared = block.pair.shared.T\n"
            "        p = sides[0].scores()[own][:, shared[0]].log_softmax(-1)\n"
            "        q = sides[1].scores()[taught][:, shared[1]].softmax(-1).detach()\n"
            "        gap = -q * p #",
            "gap.square()": "gap",
        }
    )
    name = written(tmp_path, source.replace('"zero"', '"minimum"'))
    found = findings(name)
    assert not failed(found)
    assert next(f.text for f in found if f.name == "floor").startswith("a minimum: ")


def check(*arguments: str) -> tuple[int, str]:
    outcome = CliRunner().invoke(app, ["check", *arguments])
    return outcome.exit_code, outcome.output


@pytest.mark.usefixtures("plugins")
def test_the_report_of_a_sound_plugin(tmp_path: Path) -> None:
    path = tmp_path / "match.py"
    path.write_text(SOUND, encoding="utf-8")
    code, report = check("match", "--plugin", str(path), "--set", "method.weight=2")
    assert code == 0
    lines = report.splitlines()
    assert lines[:5] == [
        "match  Match: entropies of chunks",
        "  needs: teacher logits",
        "  asks for: teacher_logits=True",
        "  options: weight=2.0",
        "",
    ]
    assert lines[5] == "contract"
    assert lines[6] == "  ok       META: https://example.org/match, 2026"
    assert lines[-1] == "21 of 21 checks passed"
    assert all(len(line) <= 100 for line in lines)


@pytest.mark.usefixtures("plugins")
def test_the_report_of_a_broken_plugin(tmp_path: Path) -> None:
    path = tmp_path / "match.py"
    path.write_text(SOUND.replace(".detach()", ""), encoding="utf-8")
    code, report = check("match", "--plugin", str(path))
    assert code == 1
    assert "  FAIL     teacher: a gradient reaches the teacher's logits; detach them" in report
    assert report.splitlines()[-1] == "20 of 21 checks passed"


def test_a_method_of_one_tokenizer_is_run_on_one() -> None:
    code, report = check("kd")
    assert code == 0
    assert "  pair: one tokenizer, for method kd compares the two sides id by id" in report
    assert report.splitlines()[-1] == "20 of 20 checks passed, 1 skipped"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["p-lk"], "did you mean p-kl"),
        (["p-kl", "--set", "method.temprature=2"], "did you mean temperature"),
        (["p-kl", "--plugin", "nowhere.py"], "plugin nowhere.py is no file"),
    ],
)
def test_a_bad_request_is_one_line(arguments: list[str], complaint: str) -> None:
    code, output = check(*arguments)
    assert code == 2
    assert complaint in output
    assert output.count("\n") == 1


def test_help_loads_nothing_heavy() -> None:
    done, loaded = apart("check", "--help")
    assert done.returncode == 0
    assert not loaded & {"torch", "transformers"}
