"""A paper's numbers beside ours: differences, and noise as in every other table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from example_outcomes import outcomes
from example_results import example, store_example
from scipy import stats

from ctdbench import recipes, report, results
from ctdbench.recipes import Scale
from ctdbench.report import papers, statistics
from ctdbench.report.outcomes import Samples
from ctdbench.report.pairing import compare
from ctdbench.report.reproduction import Comparison, Ours, Reproduction, side_by_side
from ctdbench.report.reproduction_text import render
from ctdbench.results import Result

BLD1 = ("Llama-3.2-3B -> Qwen2 tokenizer", "bld")
BINOMIAL = 196 * math.sqrt(0.7568 * 0.2432 / 1838)  # half the interval of BLD1's 75.68 on PIQA
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def ours(
    store: Path,
    values: Sequence[float],
    *,
    method: str = "bld",
    seed: int = 0,
    task: str = "piqa",
    metric: str = "acc",
) -> Result:
    """A cell with these outcomes, one a document."""
    mean = sum(values) / len(values)
    result = example(method, {task: {metric: mean}}, seed=seed)
    path = store_example(store, result) / "samples" / f"{task}.jsonl"
    path.parent.mkdir(exist_ok=True)
    rows = [{"id": f"{i}-x", "weight": 1.0, metric: value} for i, value in enumerate(values)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return result


def right(share: float, size: int = 500) -> list[float]:
    count = round(share * size)
    return [1.0] * count + [0.0] * (size - count)


def wilson(share: float, size: int = 500) -> list[float]:
    """Per cent."""
    found = stats.binomtest(round(share * size), size).proportion_ci(method="wilson")
    return [100 * found.low, 100 * found.high]


def compared(
    name: str, store: Path, own: Ours, key: tuple[str, str] = BLD1, scale: Scale = "paper"
) -> Reproduction:
    recipe = recipes.load(name)
    samples = Samples(results.find(store))
    return side_by_side(recipe, scale, recipe.measures(scale, data=True), {key: own}, samples)


def cell(found: Reproduction, name: str, task: str) -> Comparison:
    places = [one.column.task if one.column else "" for one in found.measures]
    (line,) = [line for line in found.lines if line.name == name]
    return line.cells[places.index(task)]


def test_noise_is_that_of_both_sides(store: Path) -> None:
    """Paper: 75.68 on 1,838 items, no error printed; ours: 70 % of 500."""
    far = ours(store, right(0.70))
    score = cell(compared("bld-table1", store, Ours((far,))), "bld", "piqa")
    assert score.difference is not None
    assert score.difference.value == pytest.approx(-5.68)
    assert score.margin == pytest.approx(math.hypot(wilson(0.70)[1] - 70, BINOMIAL))
    assert score.within is False
    assert "~" in score.marks
    near = ours(store, right(0.72), seed=1)
    assert cell(compared("bld-table1", store, Ours((near,))), "bld", "piqa").within is True
    above = cell(compared("bld-table1", store, Ours((ours(store, right(0.9)),))), "bld", "piqa")
    assert above.margin == pytest.approx(math.hypot(90 - wilson(0.9)[0], BINOMIAL))


def test_a_printed_error_is_used_and_another_protocol_is_marked(store: Path) -> None:
    key = ("OpenMath2-Llama3.1-8B -> Gemma2 2B", "alm")
    own = ours(store, right(0.70), task="gsm8k", metric="exact_match_flexible")
    score = cell(compared("alm-table3", store, Ours((own,)), key), "alm", "gsm8k")
    assert score.difference is not None
    side = 70 - wilson(0.70)[0] if score.difference.value > 0 else wilson(0.70)[1] - 70
    assert score.margin == pytest.approx(math.hypot(side, 1.96 * 1.28))
    assert score.marks == "≠"


def test_without_the_papers_error_the_noise_is_ours_and_says_so(store: Path) -> None:
    key = ("Llama-3.2-3B -> Qwen2 tokenizer", "mined")
    found = compared("bld-table1", store, Ours((ours(store, right(0.33), task="agi_zh"),)), key)
    score = cell(found, "mined", "agieval_cn")
    assert (score.margin, score.marks) == (pytest.approx(wilson(0.33)[1] - 33), "°")
    assert "34.76?" in render(found)


def test_our_interval_is_that_of_every_table(store: Path) -> None:
    """Of three seeds: t over documents and seeds."""
    cells = tuple(ours(store, right(0.70 + seed / 50), seed=seed) for seed in range(3))
    score = cell(compared("bld-table1", store, Ours(cells)), "bld", "piqa").ours
    (table,) = report.comparison(results.find(store))
    (shown,) = table.rows[0].scores.values()
    assert score is not None
    assert shown.low is not None
    assert score.value == pytest.approx(72)
    assert [score.value, score.low, score.high] == pytest.approx(
        [100 * shown.value, 100 * shown.low, 100 * (shown.high or 0)]
    )


def test_without_outcomes_there_is_no_verdict(store: Path) -> None:
    bare = example("bld", {"piqa": {"acc": 0.7}})
    store_example(store, bare)
    score = cell(compared("bld-table1", store, Ours((bare,))), "bld", "piqa")
    assert score.difference is not None
    assert score.difference.value == pytest.approx(-5.68)
    assert score.margin is score.within is None


def test_at_cpu_scale_gains_over_the_base_row_are_compared(store: Path) -> None:
    base, own = right(0.60), right(0.55)
    both = Ours((ours(store, own),), base=ours(store, base, method="teacher"))
    found = compared("bld-table1", store, both, scale="cpu")
    score = cell(found, "bld", "piqa")
    test = compare(outcomes(own), outcomes(base, seeds=()))
    assert test.test == "exact McNemar"
    assert score.gains is not None
    assert score.gains[1] is not None
    assert score.gains[1][:3] == pytest.approx((-5, 100 * test.low, 100 * test.high))
    assert score.difference is not None
    assert score.difference.value == pytest.approx(-5 - (75.68 - 75.46))
    theirs = math.hypot(BINOMIAL, 196 * math.sqrt(0.7546 * 0.2454 / 1838))
    assert score.margin == pytest.approx(math.hypot(100 * test.high + 5, theirs))
    assert "cannot be compared" in found.title
    text = render(found)
    assert max(map(len, text.splitlines())) <= 118
    row = next(line.split() for line in text.splitlines() if "75.68" in line)
    assert row[:6] == ["bld", "|", "75.68?", "+0.22", "55.00", "-5.00"]


def test_a_gain_is_up_where_less_is_better(store: Path) -> None:
    """Bits a byte fall by 0.1, 0.2 and so on."""
    base = [1.0 + item / 10 for item in range(1, 9)]
    recipe = recipes.load("bld-table1")
    measures = recipe.measures("cpu", data=False)
    kind = {"task": "bpb_heldout", "metric": "bpb"}
    cells = Ours((ours(store, [1.0] * 8, **kind),), base=ours(store, base, method="start", **kind))
    samples = Samples(results.find(store))
    found = side_by_side(recipe, "cpu", measures, {BLD1: cells}, samples)
    (line,) = [line for line in found.lines if line.name == "bld"]
    (gains,) = [one.gains for one in line.cells if one.ours]
    assert gains is not None
    assert gains[0] is None
    assert gains[1] is not None
    interval = statistics.paired_bootstrap(base, [1.0] * 8)
    assert gains[1][:3] == pytest.approx((0.45, interval.low, interval.high))


def test_no_number_of_another_table_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """BLD's and ALM's tables have rows and tasks of the same names; so have ALM's own."""

    def text(name: str) -> str:
        recipe = recipes.load(name)
        measures = recipe.measures("paper", data=True)
        return render(side_by_side(recipe, "paper", measures, {}, Samples({})))

    before = {name: text(name) for name in recipes.names()}
    real = papers._tables()
    for name in recipes.names():
        recipe = recipes.load(name)
        own = (recipe.paper, recipe.table)
        mixed = {
            table: numbers
            if table == own
            else {key: replace(one, value=99.99) for key, one in {**real[own], **numbers}.items()}
            for table, numbers in real.items()
        }
        monkeypatch.setattr(papers, "_tables", lambda tables=mixed: tables)
        assert text(name) == before[name]
        assert "99.99" not in before[name]
