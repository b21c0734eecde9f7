"""The list of tasks, read without running task code; and n-grams shared with a corpus."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctdbench.errors import UserError
from ctdbench.evaluate import available_tasks, catalog, check_tasks, shared_ngrams, task_content
from ctdbench.evaluate.task_files import leaf_configs, task_configs

SUBSETS = [str(leaf["task"]) for leaf in leaf_configs("agi_zh", task_configs())]


class TestOverlap:
    ENGLISH: ClassVar[list[str]] = [f"word{number}" for number in range(14)]

    def test_thirteen_words_in_a_row(self) -> None:
        item = " ".join(self.ENGLISH)
        loud = "So: " + ", ".join(self.ENGLISH[:13]).upper() + "!"
        assert shared_ngrams([item, "other"], ["nothing", loud]).items == {0}
        assert shared_ngrams([item, "other"], ["nothing", loud]).documents == {1}
        assert not shared_ngrams([item], [" ".join(self.ENGLISH[:12])]).items

    def test_chinese_counts_characters(self) -> None:
        text = "历史地理学的起源至少可以追溯到我国最早的地理学著作"
        assert shared_ngrams([text], ["。" + text[3:16]]).items == {0}
        assert not shared_ngrams([text], [text[3:15]]).items

    @settings(max_examples=100, deadline=None)
    @given(
        st.lists(st.text("ab é中", max_size=12), max_size=4),
        st.lists(st.text("ab é中", max_size=12), max_size=4),
    )
    def test_equals_the_obvious_search(self, items: list[str], corpus: list[str]) -> None:
        def grams(text: str) -> set[str]:
            words = re.findall(r"中|[abé]+", text)
            return {" ".join(words[i : i + 3]) for i in range(len(words) - 2)}

        hits = [
            (i, d)
            for i, item in enumerate(items)
            for d, doc in enumerate(corpus)
            if grams(item) & grams(doc)
        ]
        overlap = shared_ngrams(items, corpus, n=3)
        assert overlap.items == {item for item, _ in hits}
        assert overlap.documents == {document for _, document in hits}


class TestCatalog:
    def test_lists_what_a_task_needs(self) -> None:
        infos = {info.name: info for info in available_tasks()}
        assert infos["piqa"].hub == ("baber/piqa",)
        assert infos["piqa"].files == ("piqa/validation.jsonl",)
        assert infos["agi_zh"].subsets == tuple(SUBSETS)
        assert "gaokao-mathcloze" not in SUBSETS
        assert len(SUBSETS) == 10
        needs = {name: info.needs for name, info in infos.items()}
        assert needs["gsm8k"] == "data"
        assert (
            needs["arithmetic_word"] == needs["everyday_physics"] == needs["bpb_pydoc"] == "nothing"
        )
        assert needs["bpb_heldout"] == "heldout"
        assert needs["teacher_jsd"] == "teacher"
        assert infos["piqa"].lower_is_better == infos["agi_zh"].lower_is_better == ("bpb",)
        assert all(info.description and info.metric for info in infos.values())

    def test_content_follows_the_data_and_nothing_else(self, tmp_path: Path) -> None:
        path = tmp_path / "piqa" / "validation.jsonl"
        path.parent.mkdir()
        hashes = []
        for text in ("{}", "{ }", "{}"):
            path.write_text(text)
            hashes.append(task_content(["piqa", "teacher_jsd"], tmp_path))
        assert hashes[0] == hashes[2]
        assert hashes[0]["piqa"] != hashes[1]["piqa"]
        assert hashes[0]["teacher_jsd"] == hashes[1]["teacher_jsd"]
        assert task_content(["piqa"])["piqa"] not in {row["piqa"] for row in hashes}
        assert (
            len(set(task_content(["everyday_physics", "arithmetic_word", "agi_zh"]).values())) == 3
        )

    def test_unknown_task_names_a_close_one(self) -> None:
        with pytest.raises(UserError, match="did you mean gsm8k"):
            check_tasks(["gsm8"])

    def test_listing_runs_no_task_code(self, tmp_path: Path) -> None:
        (tmp_path / "boom.py").write_text("raise SystemExit('ran')\n")
        (tmp_path / "mine.yaml").write_text(
            "task: mine\noutput_type: multiple_choice\ncustom_dataset: !function boom.data\n"
            "metric_list: [{metric: acc}]\n"
        )
        listed = available_tasks([tmp_path / "mine.yaml"])
        mine = next(info for info in listed if info.name == "mine")
        assert (mine.kind, mine.metric, mine.needs) == ("multiple_choice", "acc", "nothing")

    def test_bad_yaml_names_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "bad.yaml").write_text("task: [\n")
        with pytest.raises(UserError, match=r"bad\.yaml"):
            available_tasks([tmp_path / "bad.yaml"])
        with pytest.raises(UserError, match="No such file"):
            available_tasks([tmp_path / "nowhere.yaml"])


def test_the_text_that_python_brings_is_part_of_the_identity(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = task_content(["bpb_pydoc", "teacher_jsd_pydoc", "piqa"])
    other = tmp_path / "topics.py"
    other.write_text("topics = {}")
    spec = importlib.util.spec_from_file_location("topics", other)
    known = catalog.find_spec
    monkeypatch.setattr(
        catalog, "find_spec", lambda name: spec if name.startswith("pydoc") else known(name)
    )
    after = task_content(["bpb_pydoc", "teacher_jsd_pydoc", "piqa"])
    assert {name for name in before if before[name] != after[name]} == {
        "bpb_pydoc", "teacher_jsd_pydoc",
    }  # fmt: skip
