"""`--tasks ./mine.yaml`: the file becomes a name, its content part of the cell, its place not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from example_results import example
from own_tasks import CAPITALS, SCORES, write_capitals
from test_identity import cell_id, folder, replaced  # noqa: F401  (folder is a fixture)
from tiny_models import bpe_tokenizer, tiny_model
from typer.testing import CliRunner

from ctdbench import report, request
from ctdbench.cli import app
from ctdbench.errors import UserError
from ctdbench.evaluate import (
    EvaluationRequest,
    check_tasks,
    evaluate,
    overlap,
    task_content,
    task_texts,
)
from ctdbench.evaluate.answers import require_answers
from ctdbench.evaluate.loading import load_tasks
from ctdbench.evaluate.shots import require_examples
from ctdbench.evaluate.task_files import CORPUS_METRICS, task_dir
from ctdbench.launch import grid
from ctdbench.launch.check import task as check_task

pytestmark = pytest.mark.usefixtures("own_cache")
SCORED_BY_LM_EVAL = {
    "process_results: !function scores.made\n": "",
    "  - {metric: spread, aggregation: mean, higher_is_better: true}\n": "",
}


def build(*tasks: str, **more: object) -> request.RunSpec:
    return request.build_spec({"method": "sft", "pair": "tiny", "eval": {"tasks": tasks, **more}})


def test_a_file_becomes_the_name_in_it(tmp_path: Path) -> None:
    path = str(write_capitals(tmp_path))
    stated = build("piqa", path).eval
    assert (stated.tasks, stated.task_files) == (("piqa", "capitals"), (path,))
    again = build(*stated.tasks, task_files=list(stated.task_files)).eval  # as a result holds it
    assert again == stated
    assert build("piqa").eval.task_files == ()


def test_a_grid_and_its_tuning_know_the_task(tmp_path: Path) -> None:
    path = str(write_capitals(tmp_path))
    rule = {"values": [1e-3, 1e-2], "seed": 9, "select": "bpb_heldout.bpb"}
    stated = grid.Grid(pairs=["tiny"], rows=["sft"], eval={"tasks": [path]}, tuning=rule)
    (line,) = grid.lines(stated, request.build_spec, {})
    assert line.spec.eval.tasks == ("capitals",)
    rule["select"] = "capitals.acc"
    with pytest.raises(UserError, match="about the same items of capitals"):
        grid.lines(
            stated.model_copy(update={"tuning": grid.Tuning(**rule)}), request.build_spec, {}
        )


class TestIdentity:
    @pytest.fixture(autouse=True)
    def _task(self, folder: Path) -> None:  # noqa: F811
        Path("here").mkdir()
        write_capitals(Path("here"))

    def id_of(self, path: str) -> str:
        return cell_id(groups=replaced("piqa,", f"{path},"))

    def test_where_the_file_lies_does_not_count(self) -> None:
        before = self.id_of("here/capitals.yaml")
        shutil.move("here", "there")
        assert self.id_of("./there/capitals.yaml") == before
        assert self.id_of(str(Path("there/capitals.yaml").resolve())) == before

    @pytest.mark.parametrize(
        ("name", "old", "new"),
        [
            ("capitals.yaml", "The capital", "The old capital"),
            ("capitals.jsonl", "Lyon", "Nice"),
            ("scores.py", "abs(nats[0] - nats[1])", "0.0"),
        ],
    )
    def test_what_it_holds_and_names_counts(self, name: str, old: str, new: str) -> None:
        before = self.id_of("here/capitals.yaml")
        path = Path("here", name)
        path.write_text(path.read_text().replace(old, new, 1))
        assert self.id_of("here/capitals.yaml") != before

    def test_what_it_includes_counts(self) -> None:
        Path("here/outer.yaml").write_text("include: capitals.yaml\ntask: outer\n")
        outer, included = Path("here/outer.yaml"), Path("here/capitals.yaml")
        found = set()
        for text in (
            included.read_text(),
            included.read_text().replace("The capital", "A capital"),
        ):
            included.write_text(text)
            found.add(task_content(["outer"], None, [outer])["outer"])
        Path("here/scores.py").write_text(SCORES.replace("abs", "-abs"))
        found.add(task_content(["outer"], None, [outer])["outer"])
        assert len(found) == 3

    def test_data_that_lm_eval_loads_by_itself_counts(self) -> None:
        own = Path("plain.yaml")
        own.write_text(
            "task: plain\ndataset_path: json\ntest_split: test\n"
            "dataset_kwargs: {data_files: {test: here/capitals.jsonl}}\n"
        )
        before = task_content(["plain"], None, [own])
        own.write_text(own.read_text().replace("capitals.jsonl", "*.jsonl"))
        by_pattern = task_content(["plain"], None, [own])
        Path("here/capitals.jsonl").write_text("{}\n")
        assert task_content(["plain"], None, [own]) != by_pattern
        own.write_text(own.read_text().replace("*.jsonl", "capitals.jsonl"))
        assert task_content(["plain"], None, [own]) != before

    def test_it_leaves_the_other_tasks_alone(self) -> None:
        own = Path("here/capitals.yaml")
        assert task_content(["piqa"], None, [own]) == task_content(["piqa"])


def test_texts_at_any_depth_are_looked_for_in_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ARC's choices are {"text": [..], "label": [..]}."""
    choices = {"text": ["sand", "stone"], "label": ["A", "B"]}
    rows = [{"question": "What is hard?", "choices": choices, "turns": [{"text": "Well."}], "n": 1}]
    monkeypatch.setattr(overlap, "task_rows", lambda *_: rows)
    assert task_texts("any") == ["What is hard?\nsand\nstone\nA\nB\nWell."]


def test_it_is_evaluated_and_looked_for_in_the_corpus(tmp_path: Path) -> None:
    path = write_capitals(tmp_path)
    tokenizer = bpe_tokenizer()
    asked = EvaluationRequest(tiny_model(tokenizer), tokenizer, ("capitals",), extra_tasks=(path,))
    found = evaluate(asked)
    assert set(found.scores["capitals"]) == {"spread", "acc"}
    assert len(found.samples["capitals"]) == 3
    assert found.settings["tasks"]["capitals"]["metric"] == "acc"
    assert task_texts("capitals", None, [path])[0] == "France\nParis\nLyon"


@pytest.mark.parametrize(
    ("changes", "chance"),
    [
        ({}, 0.5),
        ({"metric: acc,": "metric: acc_mutual_info,", "primary: acc": "primary: x"}, 0.5),
        ({"doc_to_target: 0": "doc_to_target: [0, 1]"}, 1.0),
        (
            {
                "output_type: multiple_choice": "output_type: loglikelihood",
                'doc_to_choice: "{{[right, wrong]}}"\n': "",
                "doc_to_target: 0": 'doc_to_target: "{{right}}"',
            },
            None,  # among all texts, not among choices
        ),
    ],
)
def test_what_a_guesser_would_score(
    changes: dict[str, str], chance: float | None, tmp_path: Path
) -> None:
    path = write_capitals(tmp_path, SCORED_BY_LM_EVAL | changes)
    tokenizer = bpe_tokenizer()
    asked = EvaluationRequest(tiny_model(tokenizer), tokenizer, ("capitals",), extra_tasks=(path,))
    assert [row.get("chance") for row in evaluate(asked).samples["capitals"]] == [chance] * 3


@pytest.mark.parametrize(
    "metrics",
    [
        "- {metric: bits_per_byte}",  # lm-eval's: (log-likelihood, bytes) of an item
        "- {metric: f1, aggregation: mean}",
        "- {metric: acc}\n  - {metric: acc, aggregation: median}",
    ],
)
def test_a_metric_that_is_no_mean_over_items_is_refused(tmp_path: Path, metrics: str) -> None:
    old = CAPITALS[CAPITALS.index("- {metric: spread") : CAPITALS.index("metadata:")].strip()
    changes = {old: metrics, "process_results: !function scores.made\n": "", "primary: acc": "x: 1"}
    path = write_capitals(tmp_path, changes)
    with pytest.raises(UserError, match="task capitals: scores are means over items, and "):
        check_tasks(["capitals"], None, [path])


def test_metrics_of_a_whole_corpus_are_those_of_lm_eval() -> None:
    import lm_eval.api.metrics  # noqa: F401  (it fills the registry)
    from lm_eval.api.registry import METRIC_AGGREGATION_REGISTRY, get_aggregation

    mean = get_aggregation("mean")
    others = {name for name, how in METRIC_AGGREGATION_REGISTRY.items() if how is not mean}
    assert others - {"bypass"} == CORPUS_METRICS  # bypass: no metric at all


def test_a_group_of_ones_own(tmp_path: Path) -> None:
    leaf = write_capitals(tmp_path)
    text = leaf.read_text().replace("task: capitals\n", "")
    body, metadata = text.split("metadata:\n")
    member = "".join(f"    {line}\n" for line in ["metadata:", *metadata.splitlines()])
    group = tmp_path / "both.yaml"
    group.write_text(
        f"group: both\ntask:\n  - task: first\n{member}  - task: second\n{member}{body}"
        "aggregate_metric_list: [{metric: acc, weight_by_size: false}]\n"
        "metadata: {version: 1, description: Twice the same}\n"
    )
    tokenizer = bpe_tokenizer()
    asked = EvaluationRequest(tiny_model(tokenizer), tokenizer, ("both",), extra_tasks=(group,))
    rows = evaluate(asked).samples["both"]
    assert [row["subset"] for row in rows] == ["first"] * 3 + ["second"] * 3
    by_size = group.read_text().replace(", weight_by_size: false", "")  # lm-eval's default
    for text in (by_size, by_size.replace("[{metric: acc}]", "{metric: acc}")):
        group.write_text(text)
        with pytest.raises(UserError, match="aggregate_metric_list weighs acc by the tasks' size"):
            evaluate(asked)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"task: capitals\n": "task: piqa\n"}, "there is a task piqa already"),
        ({"task: capitals\n": "task: teacher_jsd\n"}, "there is a task teacher_jsd already"),
        ({"task: capitals\n": "task: ../capitals\n"}, "'../capitals' is no valid name"),
        ({"task: capitals\n": ""}, "task: Field required"),
        ({"task: capitals\n": "task: [a, b]\n"}, "a list of tasks has a `group: NAME`"),
        ({"output_type: multiple_choice": "output_type: choice"}, "output_type: Input should be"),
        ({"  embedded: true\n": "  embedded: true\n  needs: a lot\n"}, "metadata.needs: "),
        ({"{test: capitals.jsonl}": "{test: nowhere.jsonl}"}, "nowhere.jsonl does not exist"),
        ({"task: capitals\n": "task: [\n"}, "cannot be read"),
        ({"task: capitals\n": "include: nowhere.yaml\ntask: capitals\n"}, "nowhere.yaml cannot be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_malformed_file_is_one_line(
    changes: dict[str, str], complaint: str, tmp_path: Path
) -> None:
    path = write_capitals(tmp_path, changes)
    outcome = CliRunner().invoke(
        app, ["run", "--method", "sft", "--pair", "tiny", "--tasks", f"piqa,{path}"]
    )
    assert outcome.exit_code == 2
    assert complaint in outcome.stderr
    assert outcome.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"scores.made": "scores.missing"}, "AttributeError: Module"),
        ({"data.embedded": "data.missing"}, "AttributeError: Module"),
        ({"test_split: test\n": ""}, "KeyError: 'validation_split'"),
        ({"{{country}}": "{{land}}"}, "UndefinedError: 'land' is undefined"),
    ],
)
def test_what_breaks_in_it_breaks_before_training(
    changes: dict[str, str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_capitals(tmp_path, changes)
    cell = ["run", "--method", "sft", "--pair", "tiny", "--budget", "1kB"]
    outcome = CliRunner().invoke(app, [*cell, "--task", str(path)])
    assert outcome.exit_code == 2
    assert f"task capitals ({path}) cannot be loaded: {complaint}" in outcome.stderr
    assert "ctdbench check" in outcome.stderr
    assert not list(Path("runs").rglob("metrics.jsonl"))


WRITTEN = {
    "output_type: multiple_choice": "output_type: generate_until",
    'doc_to_choice: "{{[right, wrong]}}"\n': "",
    "metric: acc,": "metric: exact_match,",
    "primary: acc": "primary: exact_match",
}
UNANSWERED = [
    ({"doc_to_target: 0": "doc_to_target: -1"}, "item 0 has -1 for the right one of 2 choices"),
    ({"doc_to_target: 0": "doc_to_target: ''"}, "item 0 has '' for the right one of 2 choices"),
    ({"doc_to_target: 0": "doc_to_target: !function scores.none"}, "item 0 has None for the right"),
    ({"doc_to_target: 0": "doc_to_target: Lyons"}, "item 0 has 'Lyons' for the right one of 2 "),
    (
        {"doc_to_target: 0": "doc_to_target: \"{{ 5 if country == 'Egypt' else 0 }}\""},
        "item 2 has 5 for the right one of 2 choices",
    ),
    (WRITTEN | {"doc_to_target: 0": "doc_to_target: ''"}, "item 0 has no right answer"),
    (
        WRITTEN | {"doc_to_target: 0": "doc_to_target: !function scores.none"},
        "item 0 has no right answer",
    ),
    (
        {
            **{old: new for old, new in WRITTEN.items() if "doc_to_choice" not in old},
            "doc_to_target: 0": "doc_to_target: -1",
        },
        "item 0 has -1 for the right one of 2 choices",
    ),
]


@pytest.mark.parametrize(("changes", "complaint"), UNANSWERED)
def test_items_without_a_right_answer_are_refused_before_training(
    changes: dict[str, str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval would count each of them as wrong."""
    monkeypatch.chdir(tmp_path)
    path = write_capitals(tmp_path, SCORED_BY_LM_EVAL | changes)
    cell = ["run", "--method", "sft", "--pair", "tiny", "--budget", "1kB"]
    outcome = CliRunner().invoke(app, [*cell, "--task", str(path)])
    assert outcome.exit_code == 2, outcome.output
    assert f"task capitals: {complaint}" in outcome.stderr
    assert not list(Path("runs").rglob("metrics.jsonl"))
    found = {f.name: f for f in check_task.check(check_task.TaskCase.of(str(path)))}
    assert found["gold"].status == "FAIL"
    assert complaint in found["gold"].text


FIVE = {"task: capitals\n": "task: capitals\nnum_fewshot: 5\n"}
SHOWN = [
    (FIVE, "its 5 few-shot examples come from 'test', the split that is evaluated"),
    (
        FIVE | {"test_split: test\n": "test_split: test\nfewshot_split: test\n"},
        "num_fewshot is 5, with 2 items",
    ),
    (
        FIVE | {"test_split: test\n": "validation_split: test\nfewshot_split: test\n"},
        "its 5 few-shot examples come from 'test', the split that is evaluated",
    ),
]


@pytest.mark.parametrize(("changes", "complaint"), SHOWN)
def test_examples_that_show_the_answer_or_are_too_few_are_refused_before_training(
    changes: dict[str, str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval would draw the item that is asked among its own examples."""
    monkeypatch.chdir(tmp_path)
    path = write_capitals(tmp_path, changes)
    cell = ["run", "--method", "sft", "--pair", "tiny", "--budget", "1kB"]
    outcome = CliRunner().invoke(app, [*cell, "--task", str(path)])
    assert outcome.exit_code == 2, outcome.output
    assert f"task capitals: {complaint}" in outcome.stderr
    assert not list(Path("runs").rglob("metrics.jsonl"))
    found = {f.name: f for f in check_task.check(check_task.TaskCase.of(str(path)))}
    assert found["prompt"].status == "FAIL"
    assert complaint in found["prompt"].text


def test_examples_from_elsewhere_or_that_leave_the_item_out(tmp_path: Path) -> None:
    two = {"task: capitals\n": "task: capitals\nnum_fewshot: 2\n"}
    sources = (
        "test_split: test\nfewshot_split: test\n",
        "test_split: test\nfewshot_config:\n  samples:\n"
        "    - {country: Peru, right: Lima, wrong: Cusco}\n"
        "    - {country: Chad, right: Moundou, wrong: Abéché}\n",
    )
    for number, source in enumerate(sources):
        place = tmp_path / str(number)
        place.mkdir()
        path = write_capitals(place, two | {"test_split: test\n": source})
        (task,) = load_tasks("capitals", {}, [path])["tasks"].values()
        require_examples("capitals", task)
        task.set_fewshot_seed(0)
        for item in task.eval_docs:
            shown = task.fewshot_context(item, 2).removesuffix(task.doc_to_text(item))
            assert shown.count("The capital of") == 2
            assert item["country"] not in shown


def test_items_past_the_limit_and_of_a_task_that_scores_itself_need_no_answer(
    tmp_path: Path,
) -> None:
    hidden = {"doc_to_target: 0": "doc_to_target: \"{{ 5 if country == 'Egypt' else 0 }}\""}
    path = write_capitals(tmp_path, SCORED_BY_LM_EVAL | hidden)
    (task,) = load_tasks("capitals", {}, [path])["tasks"].values()
    require_answers("capitals", task, 2)
    with pytest.raises(UserError, match="item 2 has 5"):
        require_answers("capitals", task, 3)
    (tmp_path / "own").mkdir()
    path = write_capitals(tmp_path / "own", {"doc_to_target: 0": "doc_to_target: ''"})
    (task,) = load_tasks("capitals", {}, [path])["tasks"].values()
    require_answers("capitals", task)


def test_two_files_of_one_name(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for place in (first, second):
        place.mkdir()
        write_capitals(place)
    paths = [place / "capitals.yaml" for place in (first, second)]
    with pytest.raises(UserError, match="there is a task capitals already"):
        check_tasks(["capitals"], None, paths)
    check_tasks(["capitals"], None, [paths[0], paths[0]])


def test_a_file_is_itself_by_whatever_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_capitals(tmp_path)
    monkeypatch.chdir(tmp_path)
    check_tasks(["capitals"], None, [path, Path(path.name)])
    monkeypatch.chdir(task_dir())
    check_tasks(["everyday_physics"], None, [Path("everyday_physics.yaml")])


def test_a_file_may_include_one_of_the_projects_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"include: {task_dir()}/everyday_physics.yaml\ntask: mine\n")
    with pytest.raises(UserError, match="lie beside it"):
        check_tasks(["mine"], None, [path])
    shutil.copy(task_dir() / "everyday_physics.jsonl", tmp_path)
    assert task_texts("mine", None, [path]) == task_texts("everyday_physics")


def test_a_table_shows_the_metric_that_the_task_names() -> None:
    result = example("sft", {"capitals": {"spread": 1.0, "acc": 0.5}}, tasks=("capitals",))
    result["provenance"]["evaluation"] = {"tasks": {"capitals": {"metric": "acc"}}}
    (table,) = report.comparison({Path("cell"): result})
    assert [column.metric for column in table.columns] == ["acc"]
