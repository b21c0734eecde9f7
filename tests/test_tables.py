"""Tables: what is averaged, what is kept apart, and what is not claimed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_results import example, store_example

from ctdbench import registry, report, results
from ctdbench.errors import UserError
from ctdbench.report import Column, Score, Table, outcomes, statistics
from ctdbench.report.pairing import Outcomes, compare, estimate
from ctdbench.report.significance import gap_closed, holm, standings
from ctdbench.report.tables import Difference
from ctdbench.results import Result

BPB = Column("bpb_heldout", "bpb")


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CTDBENCH_CACHE", str(tmp_path / "cache"))


def without_samples(cells: Sequence[Result]) -> dict[Path, Result]:
    return {Path(cell["id"]): cell for cell in cells}


def bpb(value: float | None) -> dict[str, dict[str, float | None]]:
    return {"bpb_heldout": {"bpb": value}}


def baselines(start: float = 1.4, teacher: float = 1.0, **settings: Any) -> list[Result]:
    return [
        example("start", bpb(start), **settings),
        example("teacher", bpb(teacher), **settings),
    ]


def only(results: Sequence[Result], headline: dict[str, str] | None = None) -> Table:
    (table,) = report.comparison(without_samples(results), headline)
    return table


def scores(table: Table, column: Column = BPB) -> dict[str, Score]:
    return {row.label: row.scores[column] for row in table.rows}


def test_rows_come_as_teacher_start_sft_then_the_others() -> None:
    table = only([*(example(m, bpb(1.2)) for m in ("uld", "bld", "sft")), *baselines()])
    assert [row.method for row in table.rows] == ["teacher", "start", "sft", "bld", "uld"]


def test_cells_that_do_not_compare_have_tables_of_their_own() -> None:
    cells = [
        example("bld", bpb(1.0)),
        example("bld", bpb(1.1), budget=60_000),
        example("bld", bpb(1.2), corpus="gsm8k"),
        example("bld", bpb(1.3), limit=None),
        example("bld", bpb(1.4), pair="smol-gemma"),
        example("bld", bpb(1.5), batch_documents=8),
        example("bld", bpb(1.6), content={"corpus": "another text"}),
    ]
    tables = report.comparison(without_samples(cells))
    assert sorted(len(table.rows) for table in tables) == [1] * len(cells)
    assert len({scores(table)["bld"].value for table in tables}) == len(cells)


def test_runtime_settings_do_not_keep_cells_apart() -> None:
    cells = [example("bld", bpb(1.0), block_rows=8), example("sft", bpb(1.1), block_rows=64)]
    assert len(only(cells).rows) == 2


def test_rows_of_one_method_are_told_apart_by_what_differs() -> None:
    common = {"ce_weight": 1.0}
    cells = [
        example("uld", bpb(1.0), options={**common, "alignment": "positions"}),
        example("uld", bpb(1.1), options={**common, "alignment": "chunks"}),
        example("bld", bpb(1.2), options=common, learning_rate=3e-4),
    ]
    labels = {row.label for row in only(cells).rows}
    assert labels == {"uld alignment=positions", "uld alignment=chunks", "bld learning_rate=0.0003"}


def test_the_pairs_own_learning_rate_is_no_choice() -> None:
    own = registry.load_pair("smol-mistral").learning_rate
    cells = [example("bld", bpb(1.2), seed=seed, learning_rate=own) for seed in (1, 2)]
    (row,) = only([example("bld", bpb(1.2)), *cells]).rows
    assert (row.label, row.seeds) == ("bld", (0, 1, 2))


def test_what_auto_made_of_the_precision_tells_rows_apart_and_is_said() -> None:
    cells = [example("bld", bpb(1.0 + seed), seed=seed) for seed in range(3)]
    for cell, precision in zip(cells, ("bfloat16", "float32", "float32"), strict=True):
        cell["provenance"]["training"] = {"precision": precision}
    cells.append(example("kd", bpb(1.5)))  # an old result, which does not say
    table = only(cells)
    assert {row.label: len(row.seeds) for row in table.rows} == {
        "bld precision=bfloat16": 1,
        "bld precision=float32": 2,
        "kd": 1,
    }
    told = "Trained on machines of different precision: bld in bfloat16; bld in float32."
    assert told in table.notes
    assert not any("precision" in note for note in only(cells[1:]).notes)


def test_differences_are_from_the_sft_row_of_most_seeds() -> None:
    text = {"corpus": "gsm8k"}
    tuned = [example("sft", bpb(1.0), seed=seed, learning_rate=3e-4, **text) for seed in range(3)]
    plain = example("sft", bpb(1.0), **text)
    assert only([plain, *tuned]).reference == "sft learning_rate=0.0003"
    assert only([plain, tuned[0]]).reference == "sft"


def test_one_row_alone_has_no_rank() -> None:
    cells = [example("sft", bpb(1.0), seed=seed) for seed in range(3)]
    table = only([*cells, example("bld", bpb(1.0))])
    assert any(note.startswith("No row is ranked") for note in table.notes)


def test_a_row_says_that_it_has_a_cross_entropy_which_was_not_published() -> None:
    weights = {"gold": (0.0, 1.0, 0.5), "uld": (1.0,), "h-kl": (0.1,)}
    cells = [
        example(name, bpb(1.0), options={"ce_weight": weight})
        for name in weights
        for weight in weights[name]
    ]
    labels = {row.label.replace(" (off-policy)", "") for row in only(cells).rows}
    assert labels == {"gold", "gold+ce", "gold+0.5ce", "uld", "h-kl"}


def test_notes_tell_only_the_options_in_which_rows_differ() -> None:
    options = {
        "bld": {"ce_weight": 1.0, "kl_weight": 0.1, "slots": 10},
        "uld": {"ce_weight": 1.0, "kl_weight": 0.5},
        "kd": {"ce_weight": 1.0, "kl_weight": 0.1, "temperature": 2.0},
        "sft": {},
    }
    table = only([example(name, bpb(1.0), options=chosen) for name, chosen in options.items()])
    assert "kl_weight: 0.1 in bld, kd+ce; 0.5 in uld." in table.notes
    assert not any(name in "".join(table.notes) for name in ("ce_weight", "slots", "temperature"))


def test_cross_entropy_has_weight_1_where_terms_were_balanced_by_ratio() -> None:
    """Whatever the option says."""
    cells = [example("p-kl", bpb(1.0), options={"ce_weight": 0.1}), example("sft", bpb(1.0))]
    cells[0]["provenance"]["training"] = {"balance": "ratio"}
    assert only(cells).rows[-1].options["ce_weight"] == 1.0
    cells[0]["provenance"]["training"] = {"balance": "fixed"}
    assert only(cells).rows[-1].options["ce_weight"] == 0.1


def test_the_newest_cell_of_a_seed_counts() -> None:
    """The same request has two cells when the method's code has changed in between."""
    old = example("bld", bpb(1.0), created="2026-01-01", content={"method": "a"})
    new = example("bld", bpb(2.0), created="2026-01-02", content={"method": "b"})
    (row,) = only([new, old]).rows
    assert (row.seeds, row.scores[BPB].value) == ((0,), 2.0)


def test_baselines_serve_every_budget_but_not_another_text_or_limit() -> None:
    cells = [example("bld", bpb(1.0), budget=size) for size in (60_000, 90_000)]
    for table in report.comparison(without_samples([*cells, *baselines()])):
        assert [row.method for row in table.rows] == ["teacher", "start", "bld"]
    others = [*baselines(limit=3), *baselines(corpus="gsm8k"), *baselines(pair="smol-short")]
    table = only([cells[0], *others, *baselines(content={"corpus": "b"})[:0]])
    assert [row.method for row in table.rows] == ["bld"]
    assert "No teacher and no start was evaluated with these settings." in table.notes
    stale = baselines(content={"tasks": "old"})
    assert len(only([example("bld", bpb(1.0), content={"tasks": "new"}), *stale]).rows) == 1


def test_files_are_told_by_their_content_and_not_by_their_path() -> None:
    """As in a cell's id; the title names the first cell's file."""

    def here(cell: Result, folder: str) -> Result:
        side = {"model": f"dir:{folder}/model", "tokenizer": f"dir:{folder}/tokenizer"}
        cell["spec"]["pair"]["teachers"][0].update(side)  # type: ignore[typeddict-item]
        cell["spec"]["train"]["corpus"] = f"jsonl:{folder}/text"
        return cell

    def cell(method: str, text: str = "1") -> Result:
        return example(method, bpb(1.0), content={"corpus": text})

    first, moved = here(cell("bld"), "/a"), here(cell("sft"), "/b")
    start, another = here(cell("start"), "/a"), here(cell("uld", "2"), "/a")
    found = report.comparison(without_samples([first, moved, start, another]))
    assert [[row.method for row in table.rows] for table in found] == [
        ["start", "sft", "bld"],
        ["uld"],
    ]
    assert "jsonl:/a/text" in found[0].title
    kept = report.comparable(moved, without_samples([first, moved, start, another])).values()
    assert [result["spec"]["method"] for result in kept] == ["bld", "sft", "start"]


def test_comparable_keeps_the_cells_of_one_table() -> None:
    cell = example("bld", bpb(1.0))
    cells = [cell, example("sft", bpb(1.0)), example("sft", bpb(1.0), budget=60_000), *baselines()]
    found = report.comparable(cell, without_samples(cells))
    kept = [result["spec"]["method"] for result in found.values()]
    assert kept == ["bld", "sft", "start", "teacher"]


def test_sft_on_the_teachers_own_text_says_what_it_is() -> None:
    note = "sft is sequence-level KD here"
    table = only([example("sft", bpb(1.0))])
    assert table.rows[0].label == "sft (seqkd)"
    assert any(note in line for line in table.notes)
    for other in ({"corpus": "gsm8k"}, {"pair": "smol-gemma"}):
        table = only([example("sft", bpb(1.0), **other)])
        assert table.rows[0].label == "sft"
        assert not any(note in line for line in table.notes)


def test_failed_cells_are_told_and_have_no_row() -> None:
    table = only([example("bld", bpb(1.0), status="failed"), example("sft", bpb(1.0))])
    assert [row.method for row in table.rows] == ["sft"]
    assert "failed: bld seed 0: loss is not finite at step 3" in table.notes


def test_a_score_that_is_missing_is_not_invented() -> None:
    cells = [example("bld", bpb(None)), example("sft", bpb(1.1)), *baselines()]
    table = only(cells)
    assert BPB not in next(row for row in table.rows if row.method == "bld").scores


def test_the_headline_metric_is_the_one_asked_for() -> None:
    cells = [example("bld", {"piqa": {"acc": 0.5, "acc_bytes": 0.6}})]
    assert only(cells).columns == (Column("piqa", "acc"),)
    assert only(cells, {"piqa": "acc_bytes"}).columns == (Column("piqa", "acc_bytes"),)
    assert only(cells, {"piqa": "f1"}).columns == (Column("piqa", "acc"),)


def test_one_seed_has_no_rank() -> None:
    one, other = (example("bld", bpb(1.0), seed=seed) for seed in range(2))
    assert any("takes 3 seeds. The interval of a row of one" in note for note in only([one]).notes)
    assert "No row is ranked: that takes 3 seeds." in only([one, other]).notes


# With outcomes


def stored(
    store: Path,
    values: dict[str, list[np.ndarray]],
    *,
    task: str = "bpb_heldout",
    metric: str = "bpb",
) -> dict[Path, Result]:
    """Cells of those methods, an array of outcomes for each seed; a document weighs 1."""
    for method, seeds in values.items():
        for seed, outcome in enumerate(seeds):
            cell = example(method, {task: {metric: float(outcome.mean())}}, seed=seed)
            rows = [
                {"id": f"{i}-x", "weight": 1.0, metric: value, "chance": 0.5}
                for i, value in enumerate(outcome.tolist())
            ]
            results.write_jsonl_atomic(
                store_example(store, cell) / "samples" / f"{task}.jsonl", rows
            )
    return results.find(store, status=None)


def read(found: dict[Path, Result], method: str, column: Column = BPB) -> Outcomes:
    cells = [cell for cell in found.values() if cell["spec"]["method"] == method]
    own = outcomes.Samples(found).outcomes(cells, column.task, column.metric)
    assert own is not None
    return own


@pytest.fixture
def found(tmp_path: Path) -> dict[Path, Result]:
    random = np.random.default_rng(0)
    document = random.normal(1, 0.2, 40)
    levels = {"start": 0.5, "teacher": 0.0, "sft": 0.3, "bld": 0.2, "uld": 0.205, "h-kl": 0.25}
    seeds = {"start": 1, "teacher": 1, "h-kl": 1}
    return stored(
        tmp_path / "runs",
        {
            name: [
                document + level + random.normal(0, 0.01) + random.normal(0, 0.02, 40)
                for _ in range(seeds.get(name, 3))
            ]
            for name, level in levels.items()
        },
    )


def test_numbers_are_those_of_the_statistics(found: dict[Path, Result]) -> None:
    (table,) = report.comparison(found)
    bld, sft, start, teacher = (read(found, name) for name in ("bld", "sft", "start", "teacher"))
    score, own = scores(table)["bld"], estimate(bld)
    assert (score.value, score.low, score.high) == (pytest.approx(own.value), own.low, own.high)
    test = compare(bld, sft)
    assert score.delta is not None
    assert (score.delta.value, score.delta.low) == pytest.approx((test.difference, test.low))
    assert score.share == gap_closed(bld, start, teacher, lower_is_better=True)
    assert start.seeds == ()
    assert sorted(bld.seeds) == [0, 1, 2]


def test_ranks_and_bold_are_the_standing(found: dict[Path, Result]) -> None:
    (table,) = report.comparison(found)
    named = {row.label: row.scores[BPB].rank for row in table.rows}
    rows = {"sft (seqkd)": "sft", "bld": "bld", "uld": "uld"}
    trained = {label: read(found, method) for label, method in rows.items()}
    (standing,) = standings({BPB: trained}, lambda column: True).values()
    assert standing.groups == (("bld", "uld"), ("sft (seqkd)",))
    assert named == {
        **dict.fromkeys(("teacher", "start", "h-kl")),
        **{label: standing.rank(label) for label in trained},
    }
    assert [row.label for row in table.rows if row.scores[BPB].best] == ["bld", "uld"]
    assert any(note.startswith("Not ranked: h-kl") for note in table.notes)


def test_differences_are_from_sft_and_adjusted_for_the_table(found: dict[Path, Result]) -> None:
    (table,) = report.comparison(found)
    assert table.reference == "sft (seqkd)"
    deltas = {label: score.delta for label, score in scores(table).items() if score.delta}
    assert set(deltas) == {"bld", "uld", "h-kl"}
    plain = {name: compare(read(found, name), read(found, "sft")).p for name in ("bld", "uld")}
    adjusted = dict(zip(plain, holm(list(plain.values())), strict=True))
    assert {name: deltas[name].p for name in plain} == pytest.approx(plain)
    assert {name: deltas[name].p_holm for name in plain} == pytest.approx(adjusted)
    assert adjusted["uld"] > plain["uld"]
    assert deltas["bld"].claimed
    assert deltas["uld"].claimed


def test_a_difference_is_that_of_the_scores_shown(found: dict[Path, Result]) -> None:
    """One seed against three is no paired test of the three's mean."""
    (table,) = report.comparison(found)
    shown = scores(table)
    delta = shown["h-kl"].delta
    assert delta == Difference(shown["h-kl"].value - shown["sft (seqkd)"].value)


def test_seeds_of_an_older_code_are_no_seeds_of_a_row() -> None:
    old = [example("bld", bpb(1.0), seed=s, content={"method": "old"}) for s in range(3)]
    new = example("bld", bpb(2.0), created="2026-01-02", content={"method": "new"})
    (row,) = only([*old, new]).rows
    assert (row.seeds, row.scores[BPB].value) == ((0,), 2.0)


def test_a_row_on_other_documents_is_named_and_compared_with_none(
    found: dict[Path, Result],
) -> None:
    folders = [folder for folder, cell in found.items() if cell["spec"]["method"] == "uld"]
    for folder in folders:
        path = folder / "samples" / "bpb_heldout.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        results.write_jsonl_atomic(path, [{**row, "id": f"other {row['id']}"} for row in rows])
    (table,) = report.comparison(found)
    score = scores(table)["uld"]
    assert score == Score(score.value, delta=score.delta)
    assert "bpb_heldout: no outcomes to compare of uld." in table.notes
    assert all(row.scores[BPB].rank is None for row in table.rows)  # uld might be the best
    assert scores(table)["bld"].delta.low is not None


def test_tables_of_one_title_are_numbered() -> None:
    cells = [example("bld", bpb(1.0), content={"task:x": name}) for name in "ab"]
    titles = [table.title for table in report.comparison(without_samples(cells))]
    assert titles[1] == f"{titles[0]} (2)"


def test_without_sft_differences_are_from_the_start(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    found = stored(tmp_path / "runs", {n: [random.normal(1, 1, 9)] for n in ("start", "bld")})
    (table,) = report.comparison(found)
    assert table.reference == "start"
    test = compare(read(found, "bld"), read(found, "start"))
    delta = scores(table)["bld"].delta
    assert delta is not None
    assert delta.value == pytest.approx(test.difference)


def test_a_guesser_is_at_the_floor_and_a_better_model_is_not(tmp_path: Path) -> None:
    right = {"sft": [1.0] * 26 + [0.0] * 24, "bld": [1.0] * 40 + [0.0] * 10}
    answers = {name: [np.array(values)] for name, values in right.items()}
    found = stored(tmp_path / "runs", answers, task="piqa", metric="acc")
    (table,) = report.comparison(found)
    piqa = scores(table, Column("piqa", "acc"))
    assert piqa["sft (seqkd)"].floor
    assert not piqa["bld"].floor


def test_a_bootstrap_is_computed_once(
    found: dict[Path, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = report.comparison(found)
    monkeypatch.setattr(statistics, "bootstrap", None)  # it would fail if it were called
    assert report.comparison(found) == first


def test_samples_that_cannot_be_read_are_named(found: dict[Path, Result]) -> None:
    path = next(iter(found)) / "samples" / "bpb_heldout.jsonl"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"bpb_heldout\.jsonl is no list of samples"):
        report.comparison(found)


def test_a_row_without_samples_has_its_score_and_no_more(found: dict[Path, Result]) -> None:
    folder = next(f for f, cell in found.items() if cell["spec"]["method"] == "bld")
    (folder / "samples" / "bpb_heldout.jsonl").unlink()
    score = scores(report.comparison(found)[0])["bld"]
    assert score == Score(score.value, delta=score.delta)
    assert score.delta is not None
    assert score.delta.low is None
    assert not score.delta.claimed


def test_cost_is_of_all_cores_and_a_mean_over_seeds() -> None:
    cells = [example("bld", bpb(1.0), seed=seed) for seed in range(2)]
    for seconds, cell in zip((100.0, 200.0), cells, strict=True):
        cell["cost"] |= {"train_seconds": seconds, "processes": 2}
        cell["provenance"]["hardware"] = {"threads": 4, "gpus": []}
    (row,) = only(cells).rows
    assert row.cost is not None
    assert (row.cost.device, row.cost.device_seconds) == ("CPU", 150 * 2 * 4)
    for cell in cells:
        cell["cost"]["cpu_seconds"] = 60.0  # measured: waiting for others is no cost
    (row,) = only(cells).rows
    assert row.cost is not None
    assert (row.cost.device_seconds, row.cost.seconds) == (60 * 2, 150)
    for cell in cells:
        cell["provenance"]["hardware"]["gpus"] = ["one", "two", "three"]
    (row,) = only(cells).rows
    assert row.cost is not None
    assert (row.cost.device, row.cost.device_seconds) == ("GPU", 150 * 2)
