"""`ctdbench check` of pairs and tasks: sound ones pass, faults fail where they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from own_tasks import write_capitals
from tiny_models import bpe_tokenizer, tiny_model
from tokenizers import normalizers
from typer.testing import CliRunner

from ctdbench import registry
from ctdbench.cli import app
from ctdbench.errors import UserError
from ctdbench.launch import check
from ctdbench.launch.check import pair as check_pair
from ctdbench.launch.check import task as check_task
from ctdbench.launch.check.findings import Finding, found_by, tell

pytestmark = pytest.mark.usefixtures("own_cache")


def call(*arguments: str) -> tuple[int, str]:
    """Exit code and output; bars and the like are kept out of it."""
    outcome = CliRunner().invoke(app, ["check", *arguments])
    return outcome.exit_code, outcome.output


def failed(found: list[Finding]) -> dict[str, str]:
    return {f"{f.group}/{f.name}": f.text for f in found if f.status == "FAIL"}


# --- which kind a name is ---


@pytest.mark.parametrize(
    ("name", "kind"), [("bld", "method"), ("tiny", "pair"), ("piqa", "task"), ("agi_zh", "task")]
)
def test_a_name_is_of_one_kind(name: str, kind: str) -> None:
    assert check.kind_of(name) == kind


def test_a_file_is_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "pair.yaml"
    path.write_text("student: {model: 'tiny:student'}\n")
    assert check.kind_of(str(path)) == "pair"
    assert check.kind_of(str(write_capitals(tmp_path))) == "task"


def test_a_name_of_two_kinds_needs_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_plugins", {"piqa": tmp_path / "piqa.py"})
    with pytest.raises(UserError, match=r"'piqa' is a method and a task\. add --kind method"):
        check.kind_of("piqa")
    code, output = call("teacher_jsd", "--kind", "task")
    assert (code, "jsd" in output) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["pika"], "there is no method, pair or task 'pika'. did you mean piqa"),
        (["tiny", "--kind", "method"], "unknown method 'tiny'"),
        (["bld", "--kind", "pair"], "unknown pair 'bld'"),
        (["bld", "--kind", "task"], "unknown task 'bld'"),
        (["tiny", "--set", "method.weight=1"], "tiny is a pair and has no options"),
        (["nowhere.yaml"], "there is no file nowhere.yaml"),
        (["tiny", "--kind", "model"], "Invalid value for '--kind'"),
    ],
)
def test_a_bad_request_is_one_line(arguments: list[str], complaint: str) -> None:
    code, output = call(*arguments)
    assert code == 2
    assert complaint in output
    assert output.count("\n") == 1


# --- pairs ---


def test_the_tiny_pair_passes() -> None:
    code, report = call("tiny")
    assert code == 0
    lines = report.splitlines()
    assert lines[0].startswith("tiny  Two-layer random Llamas")
    assert "  ok       teacher: tiny:teacher" in lines
    assert "  ok       student: bos <bos>, eos <eos>, pad <pad>, unk <unk>" in lines
    assert lines[-1] == "11 of 11 checks passed"


def pair_in(folder: Path, tokenizer: Any, **student: Any) -> list[Finding]:
    """The findings of a pair whose teacher has this tokenizer."""
    tiny_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    path = folder / "own.yaml"
    stated = {
        "student": {"model": "tiny:student", **student},
        "teachers": [{"model": f"dir:{folder / 'model'}"}],
    }
    path.write_text(json.dumps(stated))
    return list(check_pair.check(check_pair.PairCase(registry.load_pair(str(path)))))


def test_a_sound_pair_in_a_folder(tmp_path: Path) -> None:
    found = pair_in(tmp_path, bpe_tokenizer())
    assert not failed(found)
    assert next(f.text for f in found if f.name == "teacher") == f"dir:{tmp_path / 'model'}"
    (start,) = [f.text for f in found if f.name == "student's start"]
    assert start.endswith("all 30,880 parameters are trained")


def test_a_tokenizer_that_changes_text(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    found = failed(pair_in(tmp_path, tokenizer))
    assert found.keys() == {"text and bytes/teacher"}
    assert "the tokens do not spell the text from byte" in found["text and bytes/teacher"]


def test_a_tokenizer_without_an_end(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer()
    tokenizer.eos_token = None
    found = failed(pair_in(tmp_path, tokenizer))
    assert found.keys() == {"special tokens/teacher"}
    assert "give the tokenizer an eos_token" in found["special tokens/teacher"]


def test_what_cannot_be_had_fails_once(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "student: {model: 'tiny:student'}\nteachers: [{model: 'dir:nowhere'}, {model: nothing}]\n"
    )
    found = list(check_pair.check(check_pair.PairCase(registry.load_pair(str(path)))))
    assert failed(found).keys() == {"references/teacher", "references/teacher-2"}
    assert "nowhere has no config.json" in failed(found)["references/teacher"]
    assert "none of the known forms" in failed(found)["references/teacher-2"]
    skipped = {f.name for f in found if f.status == "skipped"}
    both = {"teacher", "teacher-2"}
    assert skipped == both | {f"student and {name}" for name in both}
    assert {f.text for f in found if f.status == "skipped"} == {"its reference cannot be had"}


def test_adapters_on_layers_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "student: {model: 'tiny:student'}\nteachers: [{model: 'tiny:teacher'}]\n"
        "lora: {targets: [query]}\n"
    )
    found = list(check_pair.check(check_pair.PairCase(registry.load_pair(str(path)))))
    assert failed(found).keys() == {"models/student's start"}
    assert failed(found)["models/student's start"].startswith("pair.lora.targets: ")


# --- tasks ---


def task_in(path: Path) -> list[Finding]:
    return list(check_task.check(check_task.TaskCase.of(str(path))))


def test_a_sound_task(tmp_path: Path) -> None:
    code, report = call(str(write_capitals(tmp_path)))
    assert code == 0
    lines = report.splitlines()
    assert lines[0] == "capitals  Capitals of countries"
    assert "  ok       metrics: spread ↑, acc ↑" in lines
    assert '  ok       prompt: "The capital of France is"' in lines
    assert '  ok       gold: "Paris"' in lines
    assert lines[-1] == "8 of 8 checks passed"


FAULTS = {
    "no such field": ({"doc_to_text:": "doc_to_txt:"}, "file/form", "did you mean doc_to_text"),
    "no split": ({"test_split: test\n": ""}, "file/form", "neither test_split nor"),
    "no version": ({"  version: 1.0\n": ""}, "file/metadata", "lacks version"),
    "no metric": (
        {
            "  - {metric: spread, aggregation: mean, higher_is_better: true}\n": "",
            "  - {metric: acc, aggregation: mean, higher_is_better: true}\n": "",
            "metric_list:\n": "metric_list: []\n",
        },
        "file/metrics",
        "missing or empty",
    ),
    "no such metric": (
        {"process_results: !function scores.made\n": ""},
        "file/metrics",
        "spread is no metric of lm-eval",
    ),
    "another mean": (
        {"{metric: acc, aggregation: mean,": "{metric: acc, aggregation: median,"},
        "file/metrics",
        "scores are means over items",
    ),
    "the other direction": (
        {"{metric: spread, aggregation: mean, higher_is_better: true}": "{metric: spread, "
         "aggregation: mean, higher_is_better: false}"},
        "file/metrics",
        "tables go by the name",
    ),
    "a primary that is none": ({"primary: acc": "primary: f1"}, "file/metrics", "f1 is none of"),
    "data on no hub": (
        {"  embedded: true\n": "  hub: nobody/nothing\n"},
        "data/there",
        "data set nobody/nothing is not in the local cache",
    ),
    "a column that is not there": (
        {"{{[right, wrong]}}": "{{[right, left]}}"}, "on the pair tiny/scores", "",
    ),
    "a score that does not come": (
        {"metric: spread,": "metric: width,"},
        "on the pair tiny/scores",
        "width did not come out, only spread, acc",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_where_it_is(fault: str, tmp_path: Path) -> None:
    changes, place, text = FAULTS[fault]
    found = failed(task_in(write_capitals(tmp_path, changes)))
    assert place in found
    assert text in found[place]


def test_a_member_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "group.yaml"
    path.write_text(
        "group: mine\ntask: [piqa, gsm9k]\nmetadata: {version: 1, description: Two of them}\n"
    )
    assert "there is no gsm9k; did you mean gsm8k" in failed(task_in(path))["file/form"]


def test_code_that_breaks_names_itself_and_spares_the_rest(tmp_path: Path) -> None:
    path = write_capitals(tmp_path)
    (tmp_path / "scores.py").write_text("def made(row, results):\n    return row['nothing']\n")
    found = task_in(path)
    assert failed(found).keys() == {"on the pair tiny/scores"}
    assert failed(found)["on the pair tiny/scores"] == "KeyError: 'nothing'"


@pytest.mark.parametrize("name", ["arithmetic_word", "bpb_heldout", "teacher_jsd"])
def test_tasks_of_the_project_pass(name: str) -> None:
    assert not failed(list(check_task.check(check_task.TaskCase.of(name))))


# --- findings ---


def test_a_crash_ends_its_own_check_alone() -> None:
    def crash() -> str:
        raise ZeroDivisionError("once")

    found = [found_by("a", "b", crash, __file__), found_by("a", "c", lambda: "fine")]
    assert [finding.status for finding in found] == ["FAIL", "ok"]
    assert found[0].text.startswith("ZeroDivisionError: once (test_check.py line ")
    said: list[str] = []
    assert not tell(found, said.append, debug=True)
    assert said[-1] == "\n1 of 2 checks passed"
    assert sum("Traceback" in line for line in said) == 1
