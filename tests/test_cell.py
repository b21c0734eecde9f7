"""A cell from request to result, on the tiny pair and on `dir:` models with real tokenizers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner
from wheel_tokenizers import wheel_tokenizer

from ctdbench import registry, results
from ctdbench.cli import app
from ctdbench.distill import train
from ctdbench.distill.corpus import Corpus, Document, Segment
from ctdbench.launch import cell
from ctdbench.launch.content import decontaminated
from ctdbench.spec import EvalSpec, RunSpec

SENTENCES = [
    f"The {animal} counts {number} stones, then {number + 3} more, and writes the sum down."
    for animal in ("fox", "hen", "ox", "owl", "cat")
    for number in range(12)
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    return path


def run(corpus: Path, store: Path, *arguments: str) -> Any:
    fixed = ("--tasks", "bpb_pydoc,teacher_jsd", "--limit", "2", "--store", str(store))
    setting = ("--set", f"train.corpus=jsonl:{corpus}", "--set", "train.batch_documents=8")
    return CliRunner().invoke(app, ["run", *fixed, *setting, *arguments])


def only_result(store: Path, method: str) -> dict[str, Any]:
    (path,) = store.glob(f"*/{method}/*/result.json")
    return json.loads(path.read_text())


def test_a_cell_leaves_one_complete_result(corpus: Path, tmp_path: Path) -> None:
    store = tmp_path / "runs"
    done = run(corpus, store, "--method", "bld", "--pair", "tiny", "--budget", "2kB")
    assert done.exit_code == 0, done.output
    result = only_result(store, "bld")
    assert result["status"] == "done"
    assert result["spec"]["options"]["bytes"] == "mixed"
    assert set(result["scores"]) == {"bpb_pydoc", "teacher_jsd"}
    assert result["cost"]["text_bytes"] >= 2000
    assert result["cost"]["flops"] > 0
    assert result["cost"]["cpu_seconds"] > 0
    assert {"versions", "hardware", "git", "created", "evaluation"} <= set(result["provenance"])
    folder = next(store.glob("*/bld/*"))
    rows = [json.loads(line) for line in (folder / "samples/bpb_pydoc.jsonl").open()]
    assert len(rows) == 2
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert len(steps) == result["cost"]["steps"]
    assert {"loss", "ce", "byte", "kl"} <= set(steps[0])
    assert not (folder / "checkpoints").exists()
    assert not list(store.rglob("*.tmp"))


def test_points_on_the_way_survive_a_stop_and_change_no_score(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--method", "sft", "--pair", "tiny", "--budget", "1500B")
    arguments += ("--set", "train.checkpoint_every=1")
    run(corpus, tmp_path / "plain", *arguments)
    plain = only_result(tmp_path / "plain", "sft")
    assert "points" not in plain

    own, steps = train._Loop._checkpoint, list[int]()

    def stop_once(self: Any, *, stop: bool) -> None:
        steps.append(self.done.step)
        own(self, stop=stop or (self.done.step == 2 and steps.count(2) == 1))

    monkeypatch.setattr(train._Loop, "_checkpoint", stop_once)
    store = tmp_path / "points"
    asked = (*arguments, "--set", "eval.points=3", "--set", "eval.limits={bpb_pydoc: 1}")
    assert run(corpus, store, *asked).exit_code == 143
    done = run(corpus, store, *asked)
    assert done.exit_code == 0, done.output
    assert steps == list(range(1, plain["cost"]["steps"] + 1))
    result = only_result(store, "sft")
    total, steps_in_all = result["cost"]["text_bytes"], len(steps)
    assert [set(point["scores"]) for point in result["points"]] == [
        {"bpb_pydoc.bpb", "teacher_jsd.jsd"}
    ] * 2
    lines = [json.loads(line) for line in (next(store.glob("*/sft/*")) / "metrics.jsonl").open()]
    due = [lines[steps_in_all * number // 3 - 1]["text_bytes"] for number in (1, 2)]
    assert [point["text_bytes"] for point in result["points"]] == due
    assert due[-1] < total
    values = [point["scores"]["bpb_pydoc.bpb"] for point in result["points"]]
    assert len({*values, result["scores"]["bpb_pydoc"]["bpb"]}) == 3
    assert result["scores"]["teacher_jsd"] == plain["scores"]["teacher_jsd"]
    assert result["scores"]["bpb_pydoc"] != plain["scores"]["bpb_pydoc"]  # of one item, not two
    assert result["provenance"]["evaluation"]["tasks"]["bpb_pydoc"]["limit"] == 1


def test_the_teacher_is_no_distance_from_itself(corpus: Path, tmp_path: Path) -> None:
    store = tmp_path / "runs"
    run(corpus, store, "--method", "sft", "--pair", "tiny", "--budget", "1kB")
    assert only_result(store, "teacher")["scores"]["teacher_jsd"]["jsd"] == pytest.approx(
        0, abs=1e-6
    )
    assert only_result(store, "start")["scores"]["teacher_jsd"]["jsd"] > 0.01


def test_the_same_command_again_computes_nothing(corpus: Path, tmp_path: Path) -> None:
    store = tmp_path / "runs"
    arguments = ("--method", "sft", "--pair", "tiny", "--budget", "1kB")
    first = run(corpus, store, *arguments)
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    again = run(corpus, store, *arguments)
    assert "done already" in again.output
    assert first.stdout == again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in store.rglob("*")}


def test_cells_of_one_pair_share_their_baselines(corpus: Path, tmp_path: Path) -> None:
    store = tmp_path / "runs"
    for method, seed in (("sft", "0"), ("uld", "1")):
        done = run(
            corpus, store, "--method", method, "--pair", "tiny", "--budget", "1kB", "--seed", seed
        )
        assert done.exit_code == 0, done.output
    frame = results.load(store)
    assert frame.groupby("method")["cell"].nunique().to_dict() == {
        "sft": 1,
        "start": 1,
        "teacher": 1,
        "uld": 1,
    }


def test_a_baseline_that_another_process_evaluates_comes_last(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, order = tmp_path / "runs", list[str]()
    arguments = ("--pair", "tiny", "--budget", "1kB")
    run(corpus, store, "--method", "sft", *arguments)
    for path in results.find(store):
        (path / results.RESULT).unlink()
    (teacher,) = (store / "tiny" / "teacher").iterdir()
    (teacher / ".lock").touch()  # as a process has it while it works there
    own = cell._evaluate_baseline

    def recorded(baseline: Any, *others: Any, **options: Any) -> None:
        order.append(baseline.spec.method)
        own(baseline, *others, **options)

    monkeypatch.setattr(cell, "_evaluate_baseline", recorded)
    assert run(corpus, store, "--method", "sft", *arguments).exit_code == 0
    assert order == ["start", "teacher"]


def test_every_teacher_of_a_pair_is_a_baseline_and_teaches(corpus: Path, tmp_path: Path) -> None:
    pair = {
        "student": {"model": "tiny:student"},
        "teachers": [{"model": "tiny:teacher"}, {"model": "tiny:student", "weight": 0.5}],
        "learning_rate": 1e-2,
    }
    file, store = tmp_path / "two.yaml", tmp_path / "runs"
    file.write_text(yaml.safe_dump(pair))
    options = ("--set", "method.projection=learned", "--set", "method.vocab_topk=64")
    done = run(corpus, store, "--method", "p-kl", "--pair", str(file), "--budget", "1kB", *options)
    assert done.exit_code == 0, done.output
    assert "teacher-2" in done.stdout
    assert only_result(store, "teacher-2")["scores"] == only_result(store, "start")["scores"]
    result = only_result(store, "p-kl")
    assert {"teacher", "teacher-2"} <= set(result["content"])
    setup = result["provenance"]["training"]
    assert setup["balance"] == "ratio"
    assert 0 < setup["projection"]["mass"] < setup["projection@2"]["mass"] == pytest.approx(1)
    (first, *_) = map(json.loads, next(store.glob("*/p-kl/*/metrics.jsonl")).open())
    assert {"kl", "kl@2"} <= set(first)
    assert first["weight kl@2"] == pytest.approx(0.5 * first["weight kl"])
    assert next(store.glob("*/p-kl/*/modules.safetensors")).is_file()


def test_rows_say_when_the_student_wrote_the_text(corpus: Path, tmp_path: Path) -> None:
    store = tmp_path / "runs"
    arguments = ("--method", "strict", "--pair", "tiny", "--budget", "1kB")
    short = ("--set", "train.generated_tokens=12", "--set", "train.prompt_bytes=24")
    assert "strict (off-policy)" in run(corpus, store, *arguments, *short).stdout
    done = run(corpus, store, *arguments, *short, "--set", "train.on_policy=1")
    assert "strict (on-policy 1)" in done.stdout, done.output
    written = [
        json.loads(path.read_text())["cost"]["generated"]
        for path in store.glob("*/strict/*/result.json")
    ]
    assert sorted(map(bool, written)) == [False, True]


def test_a_failed_cell_is_recorded_and_tried_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "runs"
    arguments = ("--method", "sft", "--pair", "tiny", "--budget", "1kB")
    with monkeypatch.context() as patch:
        patch.setattr("ctdbench.distill.train.schedule", lambda *_: 1 / 0)
        failed = run(corpus, store, *arguments)
    assert failed.exit_code == 1
    assert only_result(store, "sft")["status"] == "failed"
    assert run(corpus, store, *arguments).exit_code == 0
    assert only_result(store, "sft")["status"] == "done"


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (("--budget", "9MB"), "train.budget"),
        (("--set", "method.bytes=exact"), "bytes"),
        (("--set", "method.bytes=beam", "--set", "train.template=chat"), "method.bytes"),
        (("--set", "train.corpus=jsonl:none.jsonl"), "none.jsonl"),
        (("--data-dir", "nowhere"), "nowhere"),
    ],
)
def test_a_bad_request_leaves_nothing_behind(
    corpus: Path, tmp_path: Path, arguments: tuple[str, ...], culprit: str
) -> None:
    store = tmp_path / "runs"
    done = run(corpus, store, "--method", "bld", "--pair", "tiny", "--budget", "1kB", *arguments)
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert culprit in line
    assert not store.exists()


def test_chat_documents_train_under_each_sides_own_template(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    turns = [
        {
            "segments": [
                {"text": f"What is {n} + {n}?", "role": "user", "supervised": False},
                {"text": f"It is {2 * n}, because {n} and {n} make {2 * n}.", "role": "assistant"},
            ]
        }
        for n in range(40)
    ]
    path.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    done = run(
        path, tmp_path / "runs", "--method", "bld", "--pair", "tiny", "--budget", "1kB",
        "--set", "train.template=chat", "--tasks", "bpb_pydoc",
    )  # fmt: skip
    assert done.exit_code == 0, done.output


def test_no_evaluation_item_shares_a_13_gram_with_what_is_trained_on(tmp_path: Path) -> None:
    words = [f"word{n}" for n in range(14)]
    leaked, clean = Document((Segment(" ".join(words)),)), Document((Segment("short text"),))
    twin = Document((Segment("again " + " ".join(words[:13])),))
    asked = EvalSpec(tasks=("piqa",), data_dir=str(tmp_path))
    spec = RunSpec(method="sft", pair=registry.load_pair("tiny"), eval=asked)
    folder = tmp_path / "piqa"
    folder.mkdir()
    item = {"query": f"Question: {' '.join(words)}\n", "choices": ["a", "b"], "gold": 0}
    (folder / "validation.jsonl").write_text(json.dumps(item) + "\n")
    corpus = Corpus("mine", (clean, leaked, twin), (clean,), {})
    kept, notes = decontaminated(corpus, spec)
    assert kept.train == (clean,)
    assert notes == ["2 training documents left out: a 13-gram of piqa"]
    other = spec.model_copy(update={"eval": EvalSpec(tasks=("bpb_pydoc",))})
    kept, notes = decontaminated(replace(corpus, held_out=(twin,)), other)
    assert kept.held_out == ()
    assert notes == ["1 held-out documents left out: a 13-gram of the training split"]


@pytest.fixture(scope="module")
def llama_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair of the shape of `llama-qwen`: tiny random bodies under the real tokenizers."""
    folder = tmp_path_factory.mktemp("models")
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "tie_word_embeddings": True,
    }
    for name, config, model in (
        ("llama3", LlamaConfig, LlamaForCausalLM),
        ("qwen", Qwen3Config, Qwen3ForCausalLM),
    ):
        torch.manual_seed(0)
        tokenizer = wheel_tokenizer(name)
        rows = 151_936 if name == "qwen" else len(tokenizer)  # Qwen3 pads its table
        model(config(vocab_size=rows, **sizes)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    pair = {
        "student": {"model": f"dir:{folder / 'llama3'}"},
        "teachers": [{"model": f"dir:{folder / 'qwen'}"}],
        "lora": {"rank": 4, "alpha": 4},
        "learning_rate": 1e-2,
    }
    path = folder / "llama-qwen-shaped.yaml"
    path.write_text(yaml.safe_dump(pair))
    return path


@pytest.mark.parametrize("method", ["sft", "uld", "bld"])
def test_models_of_the_llama_qwen_shape_take_the_same_path(
    llama_qwen: Path, corpus: Path, tmp_path: Path, method: str
) -> None:
    store = tmp_path / "runs"
    done = run(
        corpus, store, "--method", method, "--pair", str(llama_qwen), "--budget", "1kB",
        "--tasks", "bpb_heldout",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert only_result(store, method)["scores"]["bpb_heldout"]["bpb"] > 0
