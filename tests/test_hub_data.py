"""A data set of the hub is read at the commit that stands in the cell's id and in its result."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from huggingface_hub import constants
from lm_eval.tasks._yaml_loader import load_yaml

from ctdbench.evaluate import EvaluationRequest, evaluate, hub_data, task_content
from ctdbench.evaluate.loading import task_rows
from ctdbench.evaluate.task_files import task_configs, task_files

OLD, NEW, TAGGED = "a" * 40, "b" * 40, "c" * 40
Cached = Callable[[str, str], None]
OWN = """
task: own
output_type: loglikelihood
metadata: {{version: 1.0, hub: me/mine, revision: {revision}}}
"""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """A commit is looked up once a process."""
    hub_data.commit.cache_clear()
    yield
    hub_data.commit.cache_clear()


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cached:
    """Puts a data set's card at a commit into the local cache of the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(dataset: str, commit: str, revision: str = "main") -> None:
        folder = tmp_path / "hub" / f"datasets--{dataset.replace('/', '--')}"
        for path, text in ((f"snapshots/{commit}/README.md", ""), (f"refs/{revision}", commit)):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        hub_data.commit.cache_clear()

    return put


def test_the_commit_is_part_of_the_identity_where_it_is_known(
    cached: Cached, tmp_path: Path
) -> None:
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_text("{}")
    found, local = [task_content(["piqa"])["piqa"]], [task_content(["piqa"], tmp_path)]
    for commit in (OLD, NEW):
        cached("baber/piqa", commit)
        found.append(task_content(["piqa"])["piqa"])
        local.append(task_content(["piqa"], tmp_path))
    assert len(set(found)) == 3
    assert local[0] == local[1] == local[2]  # what comes from files asks no hub


def test_one_commit_of_a_group_is_enough_to_change_it(cached: Cached) -> None:
    names = [leaf["metadata"]["hub"] for leaf in task_configs()["agi_zh"]["task"]]
    for name in names:
        cached(name, OLD)
    before = task_content(["agi_zh", "piqa"])
    cached(names[3], NEW)
    after = task_content(["agi_zh", "piqa"])
    assert [name for name in after if after[name] != before[name]] == ["agi_zh"]


def test_a_task_may_pin_its_revision(cached: Cached, tmp_path: Path) -> None:
    cached("me/mine", OLD)
    cached("me/mine", TAGGED, "v1")
    found = {}
    for revision in ("main", "v1", NEW):
        path = tmp_path / "own.yaml"
        path.write_text(OWN.format(revision=revision))
        found[revision] = hub_data.commits("own", task_configs([path]))
    assert found == {"main": {"me/mine": OLD}, "v1": {"me/mine": TAGGED}, NEW: {}}


def test_a_task_without_files_is_of_the_hub_whatever_folder_is_given(
    cached: Cached, tmp_path: Path
) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(OWN.format(revision="main"))
    found = set()
    for commit in (OLD, NEW):
        cached("me/mine", commit)
        assert hub_data.commits("own", task_configs([path]), tmp_path) == {"me/mine": commit}
        found.add(task_content(["own"], tmp_path, [path])["own"])
    assert len(found) == 2


def test_what_is_read_and_recorded_is_that_commit(
    cached: Cached, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ctdbench.distill.models import load_side
    from ctdbench.spec import ModelSpec

    asked: list[Any] = []

    def load_dataset(*name: Any, revision: str | None) -> dict[str, Dataset]:
        asked.append((*name, revision))
        rows = [{"goal": "To sit,", "sol1": "sit", "sol2": "fly", "label": 0}]
        return {"validation": Dataset.from_list(rows)}

    function = load_yaml(task_files()["piqa"])["custom_dataset"]
    monkeypatch.setitem(function.__globals__, "load_dataset", load_dataset)
    cached("baber/piqa", OLD)
    side = load_side(ModelSpec(model="tiny:student"))
    done = evaluate(EvaluationRequest(side.model, side.tokenizer, ["piqa"]))
    assert asked == [("baber/piqa", None, OLD)]
    assert done.settings["tasks"]["piqa"]["commits"] == {"baber/piqa": OLD}
    assert json.dumps(done.settings["tasks"]["piqa"])


def test_a_task_of_ones_own_reads_files_or_the_hub_at_one_commit(
    cached: Cached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "task: own\ncustom_dataset: !function ctdbench_tasks.data.rows\ntest_split: test\n"
        "metadata: {version: 1, hub: me/mine, config: small, files: {test: mine.jsonl}}\n"
    )
    (tmp_path / "mine.jsonl").write_text('{"q": "from a file"}\n')
    assert task_rows("own", tmp_path, [path]) == [{"q": "from a file"}]
    cached("me/mine", OLD)
    function = load_yaml(path)["custom_dataset"]

    def load_dataset(*name: Any, revision: str | None) -> dict[str, Dataset]:
        return {"test": Dataset.from_list([{"q": f"{name} at {revision}"}])}

    monkeypatch.setitem(function.__globals__, "load_dataset", load_dataset)
    assert task_rows("own", None, [path]) == [{"q": f"('me/mine', 'small') at {OLD}"}]


def test_the_commit_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(dataset: str, *_: Any, **__: Any) -> str:
        asked.append(dataset)
        return f"/hub/snapshots/{NEW}/README.md"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert [hub_data.commit("me/never") for _ in range(3)] == [NEW] * 3
    assert asked == ["me/never"]
