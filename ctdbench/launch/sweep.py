"""A grid run here: trials, their best values, then the cells of the table, one process each.

    STORE/<pair>/<method>/<cell id>/    a cell; its log.txt, and request.yaml that made it
    STORE/trials/                       a store of its own for trials, so that no table has them

A cell is what its files say (`results.state`), so the same sweep again goes on where it stopped.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from ctdbench import atomic, results
from ctdbench.launch.grid import GridCell, Line, Tuning, key_of, unique
from ctdbench.launch.local import Job, Launcher
from ctdbench.launch.progress import last_line
from ctdbench.results import Result, State
from ctdbench.spec import RunSpec, TrainSpec

if TYPE_CHECKING:
    from ctdbench.distill.corpus import Corpus
    from ctdbench.launch.cell import Cell

# A log holds all that a cell's process says, folders of this machine included: it stays here.
LOG = "log.txt"
# Removed to compute a cell anew.
OWN = (results.RESULT, results.METRICS, results.CHECKPOINTS, results.TRACKING, LOG)
When = Literal["always", "never", "only-missing", "only-failed"]
RUNS: dict[When, tuple[State, ...]] = {
    "always": ("absent", "resumable", "failed", "done"),
    "never": (),
    "only-missing": ("absent", "resumable"),
    "only-failed": ("failed",),
}
ASKED_TO_STOP = (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT)
DIVERGED = "not finite"  # stands in the note of a cell whose loss or gradient was that


@dataclass(frozen=True)
class Place:
    """A cell of a grid with its folder in a store."""

    title: str
    cell: Cell

    @property
    def state(self) -> State:
        """As its files say."""
        return results.state(self.cell.folder, keeps_model=self.cell.spec.train.keep_model)

    @property
    def result(self) -> Result | None:
        """Done or failed; None for neither."""
        path = self.cell.folder / results.RESULT
        return results.read_result(path) if path.is_file() else None


@dataclass(frozen=True)
class Tuned:
    """What a row's trials said. value: None where they decide nothing; then `why` says so.

    scores: of the values whose trial has one.
    """

    value: Any
    scores: dict[Any, float]
    why: str = ""


@dataclass(frozen=True)
class Sweep:
    """Lines with all options resolved, and where their cells go.

    arguments: of `run`, beside what a request file holds (plugins, trust).
    """

    lines: Sequence[Line]
    store: Path
    when: When = "only-missing"
    arguments: tuple[str, ...] = ()

    def run(self, launch: Launcher) -> list[Place]:
        """Run what `when` says, trials first; the cells of the table as far as they are decided."""
        run_places(self.trials, launch, self.when, self.arguments)
        finals = self.finals()
        run_places(finals, launch, self.when, self.arguments)
        return finals

    def next_jobs(self) -> list[Job]:
        """What would run first: trials, else the cells of the table that are decided."""
        first = due_jobs(self.trials, self.when, self.arguments)
        return list(first or due_jobs(self.finals(), self.when, self.arguments))

    @cached_property
    def trials(self) -> list[Place]:
        """Every trial once."""
        cells = [cell for line in self.lines for cell in line.trials]
        return places(cells, self.store / results.TRIALS)

    def tuned(self) -> list[Tuned]:
        """By line, what its trials say by now."""
        known = {key_of(place.cell.spec): place for place in self.trials}
        return [
            choose(line.tuning, [known[cell.key] for cell in line.trials])
            if line.tuning
            else Tuned(None, {})
            for line in self.lines
        ]

    def finals(self) -> list[Place]:
        """The cells of the table, of the rows that are decided; every row's first seed first."""
        decided = zip(self.lines, self.tuned(), strict=True)
        rows = [line.finals(found.value) for line, found in decided if not found.why]
        cells = [cell for seed in zip_longest(*rows) for cell in seed if cell is not None]
        return places(cells, self.store)


def run_places(
    chosen: Sequence[Place],
    launch: Launcher,
    when: When = "only-missing",
    arguments: tuple[str, ...] = (),
) -> None:
    """Run those of the cells that `when` says; what came of each is in its folder."""
    from ctdbench.launch.cell import finished

    for place in chosen:
        finished(place.cell.folder)  # tidies where a sweep was killed right after a result
    due = due_jobs(chosen, when, arguments)
    for place in due.values():
        _write_request(place)
    if due:
        launch(list(due), lambda job, status: settle(due[job], status))


def due_jobs(chosen: Sequence[Place], when: When, arguments: tuple[str, ...]) -> dict[Job, Place]:
    """The commands of those of the cells that `when` says."""
    due = {place.cell.folder: place for place in chosen if place.state in RUNS[when]}
    begun = {_baselines(p.cell.spec) for p in chosen if (p.cell.folder / results.METRICS).exists()}
    return {_job(place, begun, arguments): place for place in due.values()}


def _write_request(place: Place) -> None:
    from ctdbench.launch.provenance import without_private

    request = place.cell.spec.model_dump(mode="json", exclude={"trust_remote_code"})
    text = yaml.safe_dump(without_private(request), sort_keys=False, allow_unicode=True)
    atomic.write_bytes(place.cell.folder / results.REQUEST, text.encode())


def _job(place: Place, begun: Collection[str], arguments: tuple[str, ...]) -> Job:
    """A command that runs the cell. Of cells with the same baselines one starts alone: its training
    begins, and its metrics, once they are there. begun: baselines that are there."""
    folder = place.cell.folder
    command = (
        *(sys.executable, "-m", "ctdbench", "run", "--config", str(folder / results.REQUEST)),
        *("--store", str(place.cell.store), *arguments),
    )
    baselines = _baselines(place.cell.spec)
    return Job(
        place.title,
        command,
        folder / LOG,
        group="" if baselines in begun else baselines,
        opened=folder / results.METRICS,
        stale=tuple(folder / name for name in OWN) if place.state == "done" else (),
    )


def _baselines(spec: RunSpec) -> str:
    """Equal for cells with the same start and teacher."""
    neutral = TrainSpec(corpus=spec.train.corpus)
    same = {"method": results.START, "seed": 0, "options": {}, "train": neutral}
    return key_of(spec.model_copy(update=same))


def places(cells: Iterable[GridCell], store: Path) -> list[Place]:
    """Every cell once, with its folder; loads every text once."""
    from ctdbench.distill.corpus import load_corpus
    from ctdbench.launch.cell import Cell
    from ctdbench.launch.content import decontaminated

    texts: dict[tuple[Any, ...], tuple[Corpus, list[str]]] = {}
    found = []
    for grid_cell in unique(cells):
        spec = grid_cell.spec
        key = (spec.train.corpus, spec.eval.tasks, spec.eval.data)
        if key not in texts:
            texts[key] = decontaminated(load_corpus(spec.train.corpus, spec.eval.data), spec)
        corpus, notes = texts[key]
        found.append(Place(grid_cell.title, Cell(spec, store, corpus, notes)))
    return found


def choose(tuning: Tuning, trials: Sequence[Place]) -> Tuned:
    """The value with the best score; the first of equal ones.

    A trial that diverged is worse than any that did not. One that broke for another reason, or that
    is not there yet, decides nothing.
    """
    column = tuning.column
    scores: dict[Any, float] = {}
    for value, place in zip(tuning.values, trials, strict=True):
        result = place.result
        if result is None:
            return Tuned(None, scores, f"{place.title} is not done")
        if result["status"] == "failed":
            if DIVERGED not in result["notes"][0]:
                return Tuned(None, scores, f"{place.title} failed: {result['notes'][0]}")
            continue
        score = result["scores"].get(column.task, {}).get(column.metric)
        if score is None:
            return Tuned(None, scores, f"{place.title} has no {tuning.select}")
        scores[value] = score
    if not scores:
        return Tuned(None, scores, f"{trials[0].title} and its like all diverged")
    best = min if column.lower_is_better else max
    return Tuned(best(scores, key=lambda value: scores[value]), scores)


def settle(place: Place, status: int) -> str:
    """What came of a cell's process.

    One that a signal ended is recorded as failed, for it could not do that itself; unless it was
    asked to stop.
    """
    if place.state != "done" and status in ASKED_TO_STOP:
        return "stopped; the same command resumes it"
    if place.state != "done" and status < 0:
        name = signal.Signals(-status).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        place.cell.record_failure(ChildProcessError(f"killed by {name}{hint}"))
    if place.state in ("done", "failed"):
        return told(place)
    log = place.cell.folder / LOG
    return f"{last_line(log) or f'exit code {status}'} ({log})"


def told(place: Place) -> str:
    """State and, of a failed cell, the reason and where its log is."""
    result = place.result
    if result is None or result["status"] == "done":
        return place.state
    return f"failed: {result['notes'][0]} ({place.cell.folder / LOG})"
