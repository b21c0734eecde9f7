"""The store: one JSON file a cell, written atomically and last; its files tell a cell's state.

`<store>/<pair>/<method>/<cell id>/result.json`, and beside it `samples/<task>.jsonl`,
`metrics.jsonl`, `checkpoints/` and, where it was to be kept, `model/`. The baselines of a pair are
cells of the methods `start` (the student before training) and `teacher`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic reads typing's own from Python 3.12 on

from ctdbench import atomic, registry
from ctdbench.errors import UserError
from ctdbench.labels import row_label
from ctdbench.registry import MethodInfo
from ctdbench.spec import BASELINE, check_name

if TYPE_CHECKING:
    import pandas

RESULT_VERSION = 1
RESULT, METRICS, CHECKPOINTS = "result.json", "metrics.jsonl", "checkpoints"
MODEL = "model"  # the trained student, where it was asked to be kept
TRACKING = "tracking"  # what a tracker that was asked for keeps on disk
REQUEST = "request.yaml"  # what a sweep gave `run`
TRIALS = "trials"  # below a store: one of its own for cells that settings were chosen by
START, TEACHER = "start", "teacher"
State = Literal["absent", "resumable", "failed", "done"]
Scores = dict[str, dict[str, float | None]]
_OPEN = ConfigDict(extra="allow")  # a result may hold more than this version knows


class Cost(TypedDict, total=False):
    """What a cell took.

    cpu_seconds: processor time of one process's training. flops: floating-point operations.
    peak_memory_bytes: the most that training held at once, on the accelerator, else of all memory.
    processes: that trained it, each on a GPU of its own or on all threads of a machine.
    """

    __pydantic_config__ = _OPEN  # type: ignore[misc]

    train_seconds: float
    cpu_seconds: float
    eval_seconds: float
    flops: float | None
    peak_memory_bytes: int | None
    text_bytes: int
    student_tokens: int
    teacher_tokens: int
    steps: int
    processes: int


class StoredModel(TypedDict):
    """A model of a pair, as it was asked for."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]

    model: str


class StoredPair(TypedDict):
    """A pair, as it was asked for."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]

    name: str
    teachers: Annotated[list[StoredModel], Field(min_length=1)]
    learning_rate: NotRequired[float]


class StoredTrain(TypedDict):
    """How a cell was trained, as it was asked for."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]

    corpus: str
    budget: int
    learning_rate: NotRequired[float | None]


class StoredEval(TypedDict, total=False):
    """What a cell was evaluated on, as it was asked for."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]

    tasks: list[str]
    limit: int | None
    limits: dict[str, int | None]


class StoredOptions(TypedDict, total=False):
    """A method's options, as they were asked for or by default."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]

    ce_weight: float


class StoredSpec(TypedDict):
    """What was asked for; `spec.RunSpec` by the version that wrote it."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]

    method: str
    pair: StoredPair
    seed: int
    options: StoredOptions
    train: StoredTrain
    eval: StoredEval


class Hardware(TypedDict, total=False):
    """What a cell was computed on."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]

    machine: str
    cores: int
    threads: int
    memory_bytes: int
    gpus: list[str]


class Provenance(TypedDict, total=False):
    """Where a result comes from: code, machine, and what followed from the settings."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]

    created: str
    versions: dict[str, str]
    hardware: Hardware
    git: dict[str, Any] | None
    training: dict[str, Any]
    evaluation: dict[str, Any]


class Point(TypedDict):
    """Scores of a cell on its way: "task.metric" -> value after so many bytes of text."""

    text_bytes: int
    scores: dict[str, float | None]


class Result(TypedDict):
    """One cell's outcome: task -> metric -> value, null where a number is not finite.

    points: before the end of training, where `eval.points` asked for some.
    """

    version: Literal[1]
    id: str
    status: Literal["done", "failed"]
    spec: StoredSpec
    content: dict[str, str]
    scores: Scores
    stderr: Scores
    cost: Cost
    provenance: Provenance
    notes: list[str]
    points: NotRequired[list[Point]]


_RESULT = TypeAdapter(Result)


def baselines(teachers: int) -> list[str]:
    """Names of a pair's baselines: its teachers (`teacher`, `teacher-2`, ...) and `start`."""
    return [TEACHER, *(f"{TEACHER}-{number}" for number in range(2, teachers + 1)), START]


def is_baseline(method: str) -> bool:
    """Whether a cell's method is the name of a baseline."""
    return BASELINE.fullmatch(method) is not None


def cell_dir(store: Path, pair: str, method: str, cell_id: str) -> Path:
    """A cell's folder; raises UserError for a name that is no slug or that leaves the store."""
    named = {"pair": pair, "method": method, "cell": cell_id}
    folder = store.joinpath(*(check_name(name, kind) for kind, name in named.items()))
    if not folder.resolve().is_relative_to(store.resolve()):
        raise UserError(f"{folder} lies outside the store {store}", "remove that link")
    return folder


def write_json_atomic(path: Path, data: Any) -> None:
    """As `atomic.write_bytes`. JSON has no NaN and no infinity: such numbers become null."""
    text = json.dumps(_finite(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    atomic.write_bytes(path, text.encode())


def write_jsonl_atomic(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """As `write_json_atomic`, one line a row."""
    lines = (json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) for row in rows)
    atomic.write_bytes(path, "".join(line + "\n" for line in lines).encode())


def read_result(path: Path) -> Result:
    """A validated result.json; raises UserError naming the file and what is wrong with it."""
    hint = f"remove the folder {path.parent} to compute the cell again"
    try:
        return _RESULT.validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        reason = f"{field}: {first['msg']}" if field else first["msg"]
        raise UserError(f"{path} is no valid result: {reason}", hint) from error


def finished(folder: Path, *, keeps_model: bool = False) -> Result | None:
    """The result in a cell's folder if the cell is done, else None.

    keeps_model: it is to have its weights, too; a model and its scores are of one training.
    """
    result = read_result(folder / RESULT) if (folder / RESULT).is_file() else None
    lacks = keeps_model and not (folder / MODEL).is_dir()
    return result if result is not None and result["status"] == "done" and not lacks else None


def named(found: Mapping[Path, Result], cell: str, store: Path) -> Path:
    """The folder of the one cell whose id starts with `cell`; raises UserError otherwise."""
    matching = [folder for folder, result in found.items() if result["id"].startswith(cell)]
    if len(matching) != 1:
        count = f"{len(matching)} finished cells" if matching else "no finished cell"
        hint = "give the id, the name of the cell's folder"
        if Path(cell).is_dir():
            hint += f"; evaluate takes a model's folder as dir:{cell}"
        raise UserError(f"{count} in {store} whose id starts with {cell!r}", hint)
    return matching[0]


def state(folder: Path, *, keeps_model: bool = False) -> State:
    """What the files of a cell's folder say of it; raises UserError for a damaged result.

    resumable: it has a checkpoint to go on from. keeps_model: as for `finished`.
    """
    if finished(folder, keeps_model=keeps_model):
        return "done"
    if (folder / RESULT).is_file() and read_result(folder / RESULT)["status"] == "failed":
        return "failed"
    return "resumable" if any((folder / CHECKPOINTS).glob("step-*")) else "absent"


def find(
    store: Path,
    *,
    pair: str | None = None,
    method: str | None = None,
    status: Literal["done", "failed"] | None = "done",
) -> dict[Path, Result]:
    """Results by cell folder, sorted; None stands for any. Empty where there is no store."""
    below = check_name(pair, "pair") if pair else "*"
    below += "/" + (check_name(method, "method") if method else "*")
    paths = sorted(store.glob(f"{below}/*/{RESULT}"))
    read = {path.parent: read_result(path) for path in paths}
    return {folder: result for folder, result in read.items() if status in (None, result["status"])}


def load(store: Path = Path("runs")) -> pandas.DataFrame:
    """Every score of the finished cells below `store`, one row per (cell, task, metric).

    Columns: pair, method, row (as tables call it: `bld[path]`, `gold+ce`), seed, cell, task,
    metric, value, stderr, corpus, budget (bytes), learning_rate, limit, and those of `Cost`. Cells
    of one row may differ in options that `row` does not name; a table then adds them. Raises
    UserError where there is no such folder.
    """
    import pandas

    if not Path(store).is_dir():
        raise UserError(f"there is no store {store}", "give the folder that --store named")
    cells, known = find(Path(store)).values(), registry.methods()
    rows = [row for result in cells for row in _rows(result, known)]
    names = ["pair", "method", "row", "seed", "cell", "task", "metric", "value", "stderr"]
    settings = ["corpus", "budget", "learning_rate", "limit"]
    columns = [*names, *settings, *Cost.__annotations__]
    return pandas.DataFrame(rows, columns=columns)


def _rows(result: Result, known: Mapping[str, MethodInfo]) -> Iterator[dict[str, Any]]:
    spec, method = result["spec"], result["spec"]["method"]
    train, settings = spec["train"], spec["eval"]
    cell = {
        "pair": spec["pair"]["name"],
        "method": method,
        "row": method if is_baseline(method) else row_label(spec, known),
        "seed": spec["seed"],
        "cell": result["id"],
        "corpus": train["corpus"],
        "budget": train["budget"],
        "learning_rate": train.get("learning_rate") or spec["pair"].get("learning_rate"),
        "limit": settings.get("limit"),
        **result["cost"],
    }
    for task, metrics in result["scores"].items():
        errors = result["stderr"].get(task, {})
        for metric, value in metrics.items():
            score = {"task": task, "metric": metric, "value": value, "stderr": errors.get(metric)}
            yield {**cell, **score}


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
