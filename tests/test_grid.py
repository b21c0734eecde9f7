"""How a grid is written: rows, seeds, what wins over what, and what is wrong with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_grids import TUNING, lines_of, make_grid

from ctdbench import request
from ctdbench.errors import UserError
from ctdbench.launch import grid

GRIDS = Path(__file__).resolve().parents[1] / "results" / "grids"


@pytest.mark.parametrize(
    ("text", "method", "options"),
    [
        ("sft", "sft", {}),
        ("bld[path]", "bld", {"bytes": "path"}),
        ("gold+ce", "gold", {"ce_weight": 1.0}),
        ("bld[path]+ce", "bld", {"bytes": "path", "ce_weight": 1.0}),
    ],
)
def test_a_row_is_a_method_and_options(text: str, method: str, options: dict[str, Any]) -> None:
    assert grid.parse_row(text) == (method, options)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("blt[path]", "did you mean bld"), ("sft[path]", "sft has no variants"), ("", "unknown")],
)
def test_a_row_that_no_method_answers_to(text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        grid.parse_row(text)


@pytest.mark.parametrize(
    ("stated", "seeds"), [(3, (0, 1, 2)), ("2", (0, 1)), ("4,7", (4, 7)), ([5], (5,)), ("6,", (6,))]
)
def test_seeds(stated: Any, seeds: tuple[int, ...]) -> None:
    assert grid.parse_seeds(stated) == seeds


@pytest.mark.parametrize("stated", [0, "many", "1,1", "1,x", [-1], [None], None, ","])
def test_what_are_no_seeds(stated: Any) -> None:
    with pytest.raises(ValueError, match="neither a number of seeds nor a list"):
        grid.parse_seeds(stated)


def test_rows_state_what_is_theirs() -> None:
    rows = [
        "sft",
        {"row": "bld[path]", "options": {"kl_weight": 0.5}, "seeds": [4], "label": "mine"},
        {"row": "gold", "train": {"learning_rate": 0.03}},
    ]
    sft, bld, gold = lines_of(rows=rows, seeds=2, train={"clip": 2.0})
    assert [cell.title for cell in sft.finals()] == ["tiny, sft, seed 0", "tiny, sft, seed 1"]
    assert [cell.title for cell in bld.finals()] == ["tiny, mine, seed 4"]
    assert (bld.spec.options["bytes"], bld.spec.options["kl_weight"]) == ("path", 0.5)
    assert {line.spec.train.clip for line in (sft, bld, gold)} == {2.0}
    assert gold.spec.train.learning_rate == 0.03


def test_the_command_line_wins_over_the_file() -> None:
    planned = grid.lines(
        make_grid(train={"budget": "9kB", "clip": 2.0}),
        request.build_spec,
        {"train": {"budget": "4kB"}, "eval": {"limit": 7}},
    )
    spec = planned[0].spec
    assert (spec.train.budget, spec.train.clip, spec.eval.limit) == (4000, 2.0, 7)
    assert spec.eval.tasks == ("bpb_heldout",)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"rows": ["sft", "sft"]}, "sft stands there twice"),
        ({"rows": []}, "rows"),
        ({"pairs": []}, "pairs"),
        ({"sead": 3}, "did you mean seeds"),
        ({"seeds": 2, "tuning": {**TUNING, "seed": 1}}, "fresh"),
        ({"tuning": {**TUNING, "values": [1]}}, "tuning.values"),
        ({"tuning": {**TUNING, "field": "eval.limit"}}, "tuning.field"),
        ({"tuning": {**TUNING, "select": "bpb"}}, "tuning.select"),
    ],
)
def test_a_wrong_grid_is_told_in_one_line(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as raised:
        make_grid(**fields)
    assert "\n" not in str(raised.value)


def test_settings_are_not_chosen_on_what_the_table_is_about() -> None:
    piqa = {**TUNING, "select": "piqa.acc"}
    with pytest.raises(UserError, match="the same items of piqa"):
        lines_of(eval={"tasks": ["piqa", "bpb_heldout"]}, tuning=piqa)
    lines_of(tuning=piqa)  # a task that the table does not have
    (line,) = lines_of(tuning=TUNING)
    assert {cell.spec.eval.held_out for cell in line.trials} == {"validation"}
    assert {cell.spec.eval.held_out for cell in line.finals(0.1)} == {"test"}


@pytest.mark.parametrize(
    ("select", "reported"),
    [
        ("gsm8k_bpb.bpb", "gsm8k"),
        ("gsm8k.exact_match", "gsm8k_bpb"),
        ("agi_zh.acc", "agi_zh_bpb"),
        ("teacher_jsd_pydoc.jsd", "bpb_pydoc"),
        ("bpb_pydoc.bpb", "teacher_jsd_pydoc"),
        ("arithmetic_word.bpb", "arithmetic_word"),
    ],
)
def test_the_same_items_under_another_name_are_the_same(select: str, reported: str) -> None:
    with pytest.raises(UserError, match="the table is about the same items"):
        lines_of(eval={"tasks": ["piqa", reported]}, tuning={**TUNING, "select": select})
    lines_of(eval={"tasks": ["piqa", "teacher_jsd"]}, tuning={**TUNING, "select": select})


DATA = """\
task: {name}
dataset_path: {builder}
{more}
test_split: test
doc_to_text: question
doc_to_target: answer
metric_list: [{{metric: exact_match}}]
"""


@pytest.mark.parametrize(
    ("builder", "more", "other", "alike"),
    [
        ("openai/gsm8k", "dataset_name: main", "gsm8k", True),
        ("openai/gsm8k", "dataset_name: socratic", "gsm8k", False),
        ("json", "dataset_kwargs: {data_files: {test: x.jsonl}}", "twin", True),
        ("json", "dataset_kwargs: {data_files: {train: x.jsonl, test: y.jsonl}}", "twin", False),
    ],
)
def test_a_task_of_ones_own_is_known_by_its_data(
    builder: str, more: str, other: str, alike: bool, tmp_path: Path
) -> None:
    twin = ("twin", "json", "dataset_kwargs: {data_files: ./x.jsonl}")
    for name, path, rest in (("mine", builder, more), twin):
        text = DATA.format(name=name, builder=path, more=rest)
        (tmp_path / f"{name}.yaml").write_text(text)
    files = [str(tmp_path / f"{name}.yaml") for name in ("mine", "twin")]
    settings = {"tasks": [other], "task_files": files}
    tuning = {**TUNING, "select": "mine.exact_match"}
    if alike:
        with pytest.raises(UserError, match=f"the same items of mine in {other}"):
            lines_of(eval=settings, tuning=tuning)
    else:
        assert lines_of(eval=settings, tuning=tuning)


def test_a_table_is_not_about_the_part_that_settings_are_chosen_on() -> None:
    validation = {"tasks": ["bpb_heldout"], "held_out": "validation"}
    with pytest.raises(UserError, match=r"eval\.held_out"):
        lines_of(eval=validation, tuning=TUNING)
    (line,) = lines_of(eval=validation)  # without tuning it is a setting like others
    assert line.spec.eval.held_out == "validation"


@pytest.mark.parametrize("path", sorted(GRIDS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_grids_choose_on_what_no_table_is_about(path: Path) -> None:
    planned = grid.lines(grid.read(path), request.build_spec, {})
    for line in planned:
        assert {cell.spec.eval.held_out for cell in line.trials} == {"validation"}
        assert line.spec.eval.held_out == "test"


def test_trials_keep_no_models() -> None:
    (line,) = lines_of(tuning=TUNING, train={"keep_model": True})
    assert {cell.spec.train.keep_model for cell in line.trials} == {False}
    assert {cell.spec.train.keep_model for cell in line.finals(0.1)} == {True}


def test_a_tuned_field_has_to_exist() -> None:
    (line,) = lines_of(tuning={**TUNING, "field": "train.learning_rat"})
    with pytest.raises(UserError, match="did you mean learning_rate"):
        _ = line.trials
