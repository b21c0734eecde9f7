"""`ctdbench check`: built-in methods pass it, and broken ones fail it where they are broken."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from faulty_methods import BROKEN, EVERY_CALL, LINES, SOUND, changed
from test_cli import apart
from typer.testing import CliRunner

from ctdbench import registry, request
from ctdbench.cli import app
from ctdbench.launch.check import method as conformance
from ctdbench.launch.check.findings import Finding
from ctdbench.launch.check.method.bench import Bench


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plugins of a test are gone after it."""
    monkeypatch.setattr(registry, "_plugins", {})


def written(folder: Path, source: str = SOUND) -> str:
    """The method's name, its file written and registered."""
    path = folder / "match.py"
    path.write_text(source, encoding="utf-8")
    return registry.add_plugin(path)


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
    assert texts["terms"] == f"NameError: name 'missing' is not defined (match.py line {line})"
    assert {text for name, text in texts.items() if name != "terms"} == {"as terms"}


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize("fault", LINES)
def test_a_failure_says_what_to_do(fault: str, tmp_path: Path) -> None:
    changes, name, expected = LINES[fault]
    texts = failed(findings(written(tmp_path, changed(changes))))
    assert re.fullmatch(expected, texts[name])


@pytest.mark.usefixtures("plugins")
def test_an_exception_that_is_refused_excuses_nothing(tmp_path: Path) -> None:
    declared = '"exceptions": {"teacher": "why"}, "floor": "zero",'
    name = written(tmp_path, changed({".detach()": "", '"floor": "zero",': declared}))
    assert failed(findings(name)).keys() == {"META", "teacher"}


@pytest.mark.usefixtures("plugins")
def test_a_floor_that_is_no_minimum_has_a_reason(tmp_path: Path) -> None:
    declared = '"zero, no minimum: the difference has a sign"'
    name = written(tmp_path, changed({"gap.square()": "gap", '"zero"': declared}))
    found = findings(name)
    assert not failed(found)
    texts = {finding.name: finding.text for finding in found}
    assert texts["floor"] == "zero; no minimum: the difference has a sign"


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
    assert found["floor"].text == "zero; no less for 24 other students"


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
    assert next(f.text for f in found if f.name == "floor").startswith("a minimum, ")


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
    cure = "use block.taught().scores().detach()"
    assert f"  FAIL     teacher: a gradient reaches the teacher's logits; {cure}" in report
    assert report.splitlines()[-1] == "20 of 21 checks passed"


@pytest.mark.usefixtures("plugins")
def test_debug_shows_the_first_crash(tmp_path: Path) -> None:
    path = tmp_path / "match.py"
    path.write_text(changed({"own, taught = rows(block).T": "own, taught = missing.T"}))
    assert "Traceback" not in check("match", "--plugin", str(path))[1]
    code, report = check("match", "--plugin", str(path), "--debug")
    assert code == 1
    assert report.count("Traceback") == 1
    assert "own, taught = missing.T" in report


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
        (["p-kl", "--set", "train.steps=2"], "write --set method.FIELD=VALUE"),
        (["p-kl", "--set", "eval.limit=2"], "check takes options of the method alone"),
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
