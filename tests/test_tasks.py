"""Tasks: prompts equal lm-eval's own and do not depend on where the data came from; sound items."""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lm_eval
import pytest
import python_files
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.metrics import exact_match_fn
from lm_eval.api.task import ConfigurableTask
from lm_eval.filters.extraction import RegexFilter
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from ctdbench.errors import UserError
from ctdbench.evaluate import check_tasks, task_texts
from ctdbench.evaluate.task_files import leaf_configs, task_configs, task_dir, task_files

TASKS = task_dir()
STOCK = Path(lm_eval.__file__).parent / "tasks"
SUBSETS = [str(leaf["task"]) for leaf in leaf_configs("agi_zh", task_configs())]

GSM8K = [
    {
        "question": f"Ann has {n} pens and buys {n}. How many?",
        "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}.\n#### {2 * n}",
    }
    for n in range(3, 13)
]
PIQA_HUB = [
    {
        "goal": "How to boil an egg?",
        "sol1": "Use hot water.",
        "sol2": "Use a very cold spoon.",
        "label": 0,
    },
    {
        "goal": "Question: open a tin\nwithout a key ",
        "sol1": "Don't.",
        "sol2": 'Say "open".',
        "label": 1,
    },
    {"goal": "Ä?", "sol1": "{{x}}", "sol2": "ü", "label": 1},
]
PIQA_LOCAL = [
    {
        "query": f"Question: {row['goal']}\n",
        "choices": [row["sol1"], row["sol2"]],
        "gold": row["label"],
    }
    for row in PIQA_HUB
]
AGI_LOCAL = [
    {
        "passage": None,
        "question": "一加一等于（ ）",
        "options": ["(A)一", "(B)二", "(C)三", "(D)四"],
        "label": "B",
    },
    {
        "passage": "读下文。",
        "question": "选",
        "options": ["(A)甲", "(B)乙", "(C)丙", "(D)丁"],
        "label": ["A", "C", "。"],
    },
    {"passage": "", "question": "f", "options": ["(A)$x$", "(B)$y$", "(C)$z$"], "label": "A C"},
    {"passage": None, "question": "无", "options": ["(A)甲", "(B)乙"], "label": []},
]
AGI_HUB = [
    {
        "query": "问题：一加一等于（ ） 选项：(A)一 (B)二 (C)三 (D)四\n答案：从A到D, 我们应选择",
        "choices": ["(A)一", "(B)二", "(C)三", "(D)四"],
        "gold": [1],
    },
    {
        "query": "读下文。问题：选 选项：(A)甲 (B)乙 (C)丙 (D)丁\n答案：从A到D, 我们应选择",
        "choices": ["(A)甲", "(B)乙", "(C)丙", "(D)丁"],
        "gold": [0, 2],
    },
    {
        "query": "问题：f 选项：(A)$x$ (B)$y$ (C)$z$\n答案：从A到C, 我们应选择",
        "choices": ["(A)$x$", "(B)$y$", "(C)$z$"],
        "gold": [0, 2],
    },
    {
        "query": "问题：无 选项：(A)甲 (B)乙\n答案：从A到B, 我们应选择",
        "choices": ["(A)甲", "(B)乙"],
        "gold": [],
    },
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A --data-dir with a few rows in each original schema."""
    write_jsonl(tmp_path / "gsm8k/test.jsonl", GSM8K[:4])
    write_jsonl(tmp_path / "gsm8k/train.jsonl", GSM8K[2:])
    write_jsonl(tmp_path / "piqa/validation.jsonl", PIQA_LOCAL)
    for subset in SUBSETS:
        write_jsonl(tmp_path / f"agieval_zh/{subset}.jsonl", AGI_LOCAL)
    return tmp_path


scoring = python_files.load(TASKS / "scoring.py")
data = python_files.load(TASKS / "data.py")


def load(name: str, data_dir: Path | None) -> list[ConfigurableTask]:
    metadata = {"data_dir": data_dir and str(data_dir)}
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    return list(manager.load([name])["tasks"].values())


def rendered(task: ConfigurableTask) -> list[tuple[Any, ...]]:
    """All that a model is shown: the strings of every request, and the target."""
    task.set_fewshot_seed(1234)
    task.build_all_requests()
    return [(*instance.args[:2], task.doc_to_target(instance.doc)) for instance in task.instances]


def pretend_hub(
    monkeypatch: pytest.MonkeyPatch, name: str, rows: dict[str, dict[str, list[Any]]]
) -> None:
    """Let the task's `load_dataset` answer with these rows: data set -> split -> rows."""

    def load_dataset(
        path: str, config: str | None = None, revision: str | None = None
    ) -> dict[str, Dataset]:
        return {split: Dataset.from_list(part) for split, part in rows[path].items()}

    function = load_yaml(task_files()[name])["custom_dataset"]
    monkeypatch.setitem(function.__globals__, "load_dataset", load_dataset)


class TestPrompts:
    def test_piqa_local_rows_are_shown_as_hub_rows(
        self, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pretend_hub(monkeypatch, "piqa", {"baber/piqa": {"validation": PIQA_HUB}})
        assert rendered(load("piqa", data_dir)[0]) == rendered(load("piqa", None)[0])

    def test_gsm8k_local_rows_are_shown_as_hub_rows(
        self, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pretend_hub(monkeypatch, "gsm8k", {"openai/gsm8k": {"test": GSM8K[:4], "train": GSM8K[2:]}})
        assert rendered(load("gsm8k", data_dir)[0]) == rendered(load("gsm8k", None)[0])

    def test_agieval_local_rows_are_shown_as_hub_rows(
        self, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub = {f"hails/agieval-{subset}": {"test": AGI_HUB} for subset in SUBSETS}
        pretend_hub(monkeypatch, "agi_zh", hub)
        local, remote = load("agi_zh", data_dir), load("agi_zh", None)
        assert len(local) == 10
        for mine, theirs in zip(local, remote, strict=True):
            assert rendered(mine) == rendered(theirs)
            assert len(mine.eval_docs) == 3  # the item without a gold letter is left out

    @pytest.mark.parametrize(("name", "folder"), [("gsm8k", "gsm8k"), ("piqa", "piqa")])
    def test_prompts_are_those_of_lm_eval(self, name: str, folder: str, data_dir: Path) -> None:
        config = load_yaml(STOCK / folder / f"{name}.yaml")
        ours = load(name, data_dir)[0]
        unused = {} if name == "gsm8k" else {"training_split": None}
        stock = ConfigurableTask(
            config={**config, **unused, "custom_dataset": lambda **_: ours.dataset}
        )
        mine = [row for row in rendered(ours) if name == "piqa" or isinstance(row[1], dict)]
        theirs = rendered(stock)
        assert [(row[0], row[2]) for row in mine] == [(row[0], row[2]) for row in theirs]
        if name == "piqa":
            assert [row[1] for row in mine] == [row[1] for row in theirs]

    def test_agieval_prompt_is_that_of_lm_eval(self, data_dir: Path) -> None:
        ours = load("agi_zh", data_dir)[0]
        config = load_yaml(STOCK / "agieval" / "gaokao-biology.yaml")
        stock = ConfigurableTask(config={**config, "custom_dataset": lambda **_: ours.dataset})
        assert [row[:2] for row in rendered(ours)] == [row[:2] for row in rendered(stock)]

    def test_gold_is_scored_without_the_examples(self, data_dir: Path) -> None:
        shown = rendered(load("gsm8k", data_dir)[0])
        generation, scored = shown[0], shown[1]
        assert generation[0].count("Question:") == 6
        assert scored[0] == f"Question: {GSM8K[0]['question']}\nAnswer:"
        assert scored[1] == " " + GSM8K[0]["answer"]

    @pytest.mark.parametrize("name", ["gsm8k", "agi_zh"])
    def test_gold_answers_alone_are_asked_for_as_the_task_asks(
        self, name: str, data_dir: Path
    ) -> None:
        pairs = zip(load(f"{name}_bpb", data_dir), load(name, data_dir), strict=True)
        for alone, whole in pairs:
            shown = [row[:2] for row in rendered(whole) if isinstance(row[1], str)]
            asked = [row[:2] for row in rendered(alone)]
            golds = [scoring.gold_answers(row) for row in alone.eval_docs]
            assert [text for _, text in asked] == [f" {gold}" for each in golds for gold in each]
            assert set(asked) <= set(shown)


class TestData:
    def test_missing_file_is_named(self, data_dir: Path) -> None:
        (data_dir / "piqa/validation.jsonl").unlink()
        with pytest.raises(UserError, match=r"piqa/validation.jsonl"):
            check_tasks(["piqa"], data_dir)
        with pytest.raises(UserError, match=r"piqa/validation.jsonl"):
            task_texts("piqa", data_dir)

    def test_every_subset_of_a_group_is_checked(self, data_dir: Path) -> None:
        (data_dir / "agieval_zh/logiqa-zh.jsonl").unlink()
        with pytest.raises(UserError, match=r"logiqa-zh.jsonl"):
            check_tasks(["agi_zh"], data_dir)

    def test_another_schema_is_refused(self, data_dir: Path) -> None:
        write_jsonl(data_dir / "piqa/validation.jsonl", PIQA_HUB)
        with pytest.raises(UserError, match="another schema"):
            task_texts("piqa", data_dir)

    def test_broken_json_is_refused(self, data_dir: Path) -> None:
        (data_dir / "gsm8k/test.jsonl").write_text('{"question": \n')
        with pytest.raises(UserError, match="not JSON Lines"):
            task_texts("gsm8k", data_dir)

    def test_line_separators_inside_strings_do_not_cut_rows(self, tmp_path: Path) -> None:
        row = {"question": "a\u2028b", "answer": "#### 1"}
        path = tmp_path / "gsm8k" / "test.jsonl"
        path.parent.mkdir()
        path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
        splits = data.gsm8k(data_dir=tmp_path, files={"test": "gsm8k/test.jsonl"})
        assert splits["test"][0] == row

    def test_pydoc_needs_nothing(self) -> None:
        texts = task_texts("bpb_pydoc")
        assert len(texts) > 50
        assert all(500 < len(text) <= 2000 for text in texts)

    def test_texts_hold_question_and_answer(self, data_dir: Path) -> None:
        assert task_texts("gsm8k", data_dir)[0] == f"{GSM8K[0]['question']}\n{GSM8K[0]['answer']}"
        assert len(task_texts("agi_zh", data_dir)) == 30
        assert task_texts("bpb_heldout") == task_texts("teacher_jsd") == []
        assert task_texts("teacher_jsd_pydoc") == task_texts("bpb_pydoc")


class TestMetrics:
    @settings(max_examples=200, deadline=None)
    @given(
        st.lists(
            st.sampled_from(["#### ", "12", "1,000", "$", ".", "-", " ", "x", "\n", "12.", "3"]),
            max_size=9,
        ),
        st.sampled_from(["12", "1,000", "-3"]),
    )
    def test_numbers_as_lm_eval_extracts_them(self, parts: list[str], number: str) -> None:
        generated, gold = "".join(parts), f"so.\n#### {number}"
        config = load_yaml(STOCK / "gsm8k" / "gsm8k.yaml")
        options = {
            k: v for k, v in config["metric_list"][0].items() if k.startswith(("ignore", "regexes"))
        }
        expected = []
        for pipeline in config["filter_list"]:
            arguments = {k: v for k, v in pipeline["filter"][0].items() if k != "function"}
            found = RegexFilter(**arguments).apply([[generated]], [{}])[0][0]
            score = exact_match_fn(references=[gold], predictions=[found], **options)
            expected.append(float(score["exact_match"]))
        measured = scoring.number_metrics(generated, gold)
        assert [measured["exact_match"], measured["exact_match_flexible"]] == expected

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.floats(-90, -1), min_size=2, max_size=2), st.integers(0, 1))
    def test_choices_as_lm_eval_scores_them(self, nats: list[float], label: int) -> None:
        row = {"goal": "g", "sol1": "ααα", "sol2": "abcd", "label": label}
        config = load_yaml(STOCK / "piqa" / "piqa.yaml")
        metrics = [
            *config["metric_list"],
            {"metric": "acc_bytes", "aggregation": "mean", "higher_is_better": True},
        ]
        dataset = {split: Dataset.from_list([row]) for split in ("train", "validation")}
        stock = ConfigurableTask(
            config={**config, "metric_list": metrics, "custom_dataset": lambda **_: dataset}
        )
        results = [(value, False) for value in nats]
        measured = scoring.two_choices(row, results)
        bits = measured.pop("bpb")
        assert measured == stock.process_results(row, results)
        gold = row["sol1"] if label == 0 else row["sol2"]
        assert bits == pytest.approx(-nats[label] / 0.6931471805599453 / (1 + len(gold.encode())))

    def test_any_gold_letter_counts(self) -> None:
        row = {"choices": ["a", "bb", "c"], "gold": [0, 2]}
        lls = [(-3.0, False), (-1.0, False), (-2.0, False)]
        assert scoring.agieval(row, lls)["acc"] == 0.0
        assert scoring.agieval(row, lls[1:] + lls[:1])["acc"] == 1.0
        # 3 + 2 nats over " a" and " c", four bytes
        assert scoring.agieval(row, lls)["bpb"] == pytest.approx(5 / 0.6931471805599453 / 4)

    def test_gold_alone_has_the_bits_of_the_whole_task(self) -> None:
        row = {"choices": ["a", "bb", "c"], "gold": [0, 2]}
        lls = [(-3.0, False), (-1.0, False), (-2.0, False)]
        assert scoring.gold_bits(row, [lls[0], lls[2]])["bpb"] == scoring.agieval(row, lls)["bpb"]
        item, scored = {"question": "q", "answer": "1\n#### 1"}, (-3.0, True)
        whole = scoring.final_number(item, ["#### 1", scored])["bpb"]
        assert scoring.gold_bits(item, [scored])["bpb"] == whole


class TestEmbeddedItems:
    operators: ClassVar[dict[type[ast.AST], Callable[[Any, Any], Any]]] = {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.truediv,
    }

    def value(self, node: ast.AST) -> float:
        if isinstance(node, ast.Constant):
            return float(node.value)  # type: ignore[arg-type]
        assert isinstance(node, ast.BinOp)
        return self.operators[type(node.op)](self.value(node.left), self.value(node.right))

    @pytest.mark.parametrize("name", ["arithmetic_word", "arithmetic_word_examples"])
    def test_arithmetic_is_right(self, name: str) -> None:
        rows = [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text().splitlines()]
        for row in rows:
            value = self.value(ast.parse(row["expression"], mode="eval").body)
            assert value == int(value) >= 0
            assert row["answer"] == f"{row['expression']} = {int(value)}\n#### {int(value)}"
            digits = set(re.findall(r"\d+", row["expression"]))
            assert digits & set(re.findall(r"\d+", row["question"]))
        assert len({row["question"] for row in rows}) == len(rows)

    def test_arithmetic_examples_are_not_items(self) -> None:
        items = set(task_texts("arithmetic_word"))
        lines = (TASKS / "arithmetic_word_examples.jsonl").read_text().splitlines()
        assert len(items) >= 60
        assert not items & {"\n".join(json.loads(line).values()) for line in lines}

    def test_physics_gives_nothing_away(self) -> None:
        rows = [
            json.loads(line) for line in (TASKS / "everyday_physics.jsonl").read_text().splitlines()
        ]
        assert len(rows) >= 80
        assert len({row["goal"] for row in rows}) == len(rows)
        labels = [row["label"] for row in rows]
        assert abs(labels.count(0) - labels.count(1)) <= 2
        lengths = [[len(row["sol1"]), len(row["sol2"])] for row in rows]
        shorter = sum(
            pair[label] < pair[1 - label] for pair, label in zip(lengths, labels, strict=True)
        )
        longer = sum(
            pair[label] > pair[1 - label] for pair, label in zip(lengths, labels, strict=True)
        )
        assert abs(shorter - longer) < len(rows) / 10
