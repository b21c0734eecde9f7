"""What each method costs beside the bare cost, measured in one run, and how it is shown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ctdbench.launch.bench.measure import Function, Timing, extra_peak_bytes, interleaved

BARE = "bare"
GAP = "  "


@dataclass(frozen=True)
class Candidate:
    """What is measured: functions called one after the other, by name. base: its bare cost."""

    name: str
    phases: Mapping[str, Function]
    base: str = BARE

    def run(self) -> None:
        """All phases once."""
        for function in self.phases.values():
            function()


@dataclass(frozen=True)
class Cost:
    """What a candidate costs.

    phases: times by name. ratio: of all its phases' medians to its base's. extra_bytes: the most
    memory that it holds beside what was held before.
    """

    name: str
    phases: dict[str, Timing]
    ratio: float
    extra_bytes: int
    base: str = BARE


@dataclass(frozen=True)
class Costs:
    """Costs by ratio; setting: what they were measured on; refused: methods that have none."""

    title: str
    setting: dict[str, Any]
    costs: list[Cost]
    refused: dict[str, str] = field(default_factory=dict)


def measure(
    candidates: Sequence[Candidate], repeats: int = 7, *, progress: bool = False
) -> list[Cost]:
    """Costs of candidates that are timed in turns, by ratio."""
    functions = {
        f"{candidate.name} {phase}": function
        for candidate in candidates
        for phase, function in candidate.phases.items()
    }
    timings = interleaved(functions, repeats, progress=progress)
    taken = {
        c.name: {phase: timings[f"{c.name} {phase}"] for phase in c.phases} for c in candidates
    }
    seconds = {name: sum(t.median for t in phases.values()) for name, phases in taken.items()}
    costs = [
        Cost(
            candidate.name,
            taken[candidate.name],
            seconds[candidate.name] / seconds[candidate.base],
            extra_peak_bytes(candidate.run),
            candidate.base,
        )
        for candidate in candidates
    ]
    return sorted(costs, key=lambda cost: cost.ratio)


def machine(device: torch.device, precision: str) -> dict[str, Any]:
    """What times depend on beside the inputs."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "precision": precision}
    return {"device": "cpu", "threads": torch.get_num_threads(), "precision": precision}


def render(found: Costs, format_name: str) -> str:
    """As text in columns (`terminal`) or `json`, with times in milliseconds."""
    if format_name == "json":
        costs = [_record(cost) for cost in found.costs]
        return json.dumps({**asdict(found), "costs": costs}, indent=2) + "\n"
    setting = ", ".join(f"{name} {value}" for name, value in found.setting.items())
    lines = [found.title, setting, "", *_table(found.costs)]
    lines += [f"{name} is not measured: {reason}" for name, reason in found.refused.items()]
    return "\n".join(lines) + "\n"


def _record(cost: Cost) -> dict[str, Any]:
    record = asdict(cost)
    phases = record.pop("phases")
    return record | {
        "milliseconds": {
            phase: {name: round(1000 * value, 3) for name, value in timing.items()}
            for phase, timing in phases.items()
        }
    }


def _table(costs: Sequence[Cost]) -> list[str]:
    phases = list(costs[0].phases)
    rows = [["", *(f"{phase} ms" for phase in phases), "ratio", "extra MB"]]
    for cost in costs:
        times = [f"{1000 * cost.phases[phase].median:.1f}" for phase in phases]
        rows.append([cost.name, *times, f"{cost.ratio:.2f}", f"{cost.extra_bytes / 1e6:.1f}"])
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [GAP.join([row[0].ljust(first), *map(str.rjust, row[1:], widths)]) for row in rows]
