"""A published table run here: its recipe as cells, one after the other, and both side by side.

    plan = table_plan.plan(recipes.load("bld-table1"), Ask(scale="cpu", budget=20_000))
    plan = plan.resolved(request.resolve_options)
    text = render(compare(plan, run(plan, store), store))

Every cell is an ordinary one: what is finished is found again, what broke off resumes. Nothing
here imports torch before the first cell.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from ctdbench import results
from ctdbench.errors import Terminated, UserError
from ctdbench.launch.grid import GridCell, key_of
from ctdbench.launch.sweep import places
from ctdbench.launch.table_plan import Plan, PlannedRow
from ctdbench.recipes import Measure, Setting, Source, told
from ctdbench.report import grouping
from ctdbench.report.outcomes import Samples
from ctdbench.report.reproduction import Ours, Reproduction, side_by_side, source_notes
from ctdbench.results import Result
from ctdbench.spec import RunSpec, format_bytes

DONE, OPEN, NO_TEXT, CANNOT = "done", "to do", "not known without the text", "cannot run"
Check = Callable[[Sequence[RunSpec]], list[UserError]]  # what would fail (`preflight.preflight`)


def problems(plan: Plan, check: Check) -> list[UserError]:
    """What keeps the cells from running; empty where nothing does."""
    return _without_text(plan) or check(list(plan.cells.values()))


def describe(plan: Plan, store: Path, check: Check) -> tuple[str, list[UserError]]:
    """A resolved plan as text: cells, which of them are done, all settings with their source.

    And what keeps cells from running, which is in the text, too.
    """
    failing = _without_text(plan)
    if failing:
        states = dict.fromkeys(plan.cells, NO_TEXT)
    else:
        states, failing = _states(plan, store, check)
    titles = plan.titles
    count = sum(state == DONE for state in states.values())
    lines = [f"{plan.recipe.name} at {plan.ask.scale} scale: {plan.recipe.title}", ""]
    lines += [f"{len(states)} cells, {count} done already:"]
    lines += [f"  {titles[key]}: {state}" for key, state in states.items()]
    lines += [f"  {title}: {why}" for title, why in map(_absence, plan.rows) if why]
    lines += [f"would fail: {problem}" for problem in failing]
    lines += ["", "Columns:", *map(_column, plan.measures), ""]
    return "\n".join([*lines, *_settings(plan)]) + "\n", failing


def run(
    plan: Plan, store: Path, say: Callable[[str], None] = lambda _: None
) -> dict[str, Result | str]:
    """Run or resume every cell; by identity its result, or why it failed.

    A cell that fails does not stop the others.
    """
    from ctdbench.launch.cell import run_cell

    outcomes: dict[str, Result | str] = {}
    titles = plan.titles
    for number, (key, spec) in enumerate(plan.cells.items(), 1):
        try:
            result: Any = run_cell(spec, store)
            outcomes[key] = result
            state = f"{DONE} already" if result["was_done"] else DONE
        except Terminated:
            raise
        except Exception as error:
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise  # the other processes are still in this cell
            outcomes[key] = reason = _reason(error)
            state = f"failed: {reason}"
        say(f"[{number}/{len(titles)}] {titles[key]}: {state}")
    return outcomes


def compare(plan: Plan, outcomes: Mapping[str, Result | str], store: Path) -> Reproduction:
    """The paper's numbers beside those of the outcomes and of the baselines in the store."""
    ours = {}
    for row in plan.rows:
        beside = list(_results_of(row.setting, plan, outcomes))
        base_role = plan.recipe.base_row(row.setting).baseline
        base = _baseline(store, beside, base_role)
        if row.row.baseline:
            own = _baseline(store, beside, row.row.baseline)
            why = "" if own else "no cell of its pair was finished"
            ours[row.setting.name, row.name] = Ours((own,) if own else (), base, why)
        else:
            ours[row.setting.name, row.name] = _measured(row, outcomes, base)
    here = {setting.name: plan.here(setting) for setting in plan.recipe.settings}
    setup = [*source_notes(plan.recipe, plan.ask.scale, here), *_setup(plan)]
    samples = Samples(_by_folder(store, ours.values()))
    return side_by_side(plan.recipe, plan.ask.scale, plan.measures, ours, samples, setup)


def _by_folder(store: Path, ours: Iterable[Ours]) -> dict[Path, Result]:
    cells = [(cell, cell["spec"]) for own in ours for cell in (*own.cells, own.base) if cell]
    return {
        results.cell_dir(store, spec["pair"]["name"], spec["method"], cell["id"]): cell
        for cell, spec in cells
    }


def _without_text(plan: Plan) -> list[UserError]:
    """The papers' own text has to be given."""
    recipe, ask = plan.recipe, plan.ask
    if ask.scale == "paper" and ask.corpus is None:
        assert recipe.training.data is not None
        return [
            UserError(
                f"{recipe.name} trains on {recipe.training.data.value}, which ctdbench does not "
                "fetch",
                "give that text by --corpus jsonl:PATH, or run the design with --scale cpu",
            )
        ]
    return []


def _states(plan: Plan, store: Path, check: Check) -> tuple[dict[str, str], list[UserError]]:
    """Of every cell whether it is done or could be; and each reason why one could not, once."""
    refused = {
        pair: check([spec for spec in plan.cells.values() if spec.pair.name == pair])
        for pair in plan.by_pair
    }
    states = dict.fromkeys(plan.cells, CANNOT)
    runnable = [
        GridCell(plan.titles[key], spec)
        for key, spec in plan.cells.items()
        if not refused[spec.pair.name]
    ]
    for place in places(runnable, store):
        states[key_of(place.cell.spec)] = DONE if place.state == "done" else OPEN
    by_text = {str(problem): problem for found in refused.values() for problem in found}
    return states, list(by_text.values())


def _reason(error: Exception) -> str:
    line = str(error).partition("\n")[0]
    return line if isinstance(error, UserError) else f"{type(error).__name__}: {line}"


def _results_of(
    setting: Setting, plan: Plan, outcomes: Mapping[str, Result | str]
) -> Iterator[Result]:
    """Finished cells of a setting's pair."""
    pair = setting.pair_at(plan.ask.scale)
    for outcome in outcomes.values():
        if not isinstance(outcome, str) and outcome["spec"]["pair"]["name"] == pair:
            yield outcome


def _baseline(store: Path, cells: list[Result], name: str | None) -> Result | None:
    """The newest baseline that was measured on what these cells were measured on."""
    if not cells or name is None:
        return None
    found = results.find(store, pair=cells[0]["spec"]["pair"]["name"], method=name).values()
    matching = [result for result in found if grouping.is_baseline_of(result, cells[0])]
    return max(matching, key=lambda result: str(result["provenance"]["created"]), default=None)


def _measured(row: PlannedRow, outcomes: Mapping[str, Result | str], base: Result | None) -> Ours:
    found = [outcomes[key] for spec in row.specs if (key := key_of(spec)) in outcomes]
    failed = next((outcome for outcome in found if isinstance(outcome, str)), "")
    cells = tuple(outcome for outcome in found if not isinstance(outcome, str))
    return Ours(cells, base, row.absent or ("" if found else "not run"), failed)


def _absence(row: PlannedRow) -> tuple[str, str]:
    role = f"the {row.row.baseline} of its pair" if row.row.baseline else ""
    return row.title, role or row.absent


def _column(measure: Measure) -> str:
    task = measure.column.task if measure.column else measure.runs.task if measure.runs else ""
    return f"  {task}: {measure.note or 'ours alone'}"


def _setup(plan: Plan) -> tuple[str, ...]:
    """What was asked for, for the notes below a table."""
    ask = plan.ask
    spec = next(iter(plan.cells.values()), None)
    if spec is None:
        return ()
    budgets = sorted({cell.train.budget for cell in plan.cells.values()})
    text = f"{' or '.join(map(format_bytes, budgets))} of {spec.train.corpus} text"
    pairs = ", ".join(plan.by_pair)
    limit = f"at most {ask.limit} items a task" if ask.limit else "every item of a task"
    notes = [f"Here: {pairs}; {text}; {limit}; {ask.seeds} seed{'s' * (ask.seeds > 1)}."]
    if ask.seeds == 1:
        notes.append("One seed: the noise is of the items alone; another seed may differ by more.")
    if ask.scale == "paper":
        notes.append(
            "The budget of text is the recipe's, for documents of full length; shorter ones are "
            "neither packed nor padded, so that they make more steps than the paper's."
        )
    return tuple(notes)


def _settings(plan: Plan) -> list[str]:
    lines = ["Settings (paper: stated there; ours: not found, our choice; here: what is run):"]
    trained = {row.setting.label: row.setting for row in plan.rows if row.row.method}
    for setting in trained.values():
        stated, here = plan.recipe.stated(setting), plan.here(setting)
        lines.append(f"  {setting.label}")
        for source in get_args(Source):
            lines += [f"    {source:5}  {line}" for line in told(stated, source, here)]
    return [*lines, "Everything else is ctdbench's default.", *_setup(plan)]
