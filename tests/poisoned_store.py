"""A store whose every text tries to run a script in the report that shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ctdbench import results

OWNED = "owned"
# Without a slash, so that a file can have it in its name; it leaves attributes of either quote.
IMAGE = f"\"'><img src=x onerror=\"document.title='{OWNED}'\">"
CLOSING = "\x1b]0;\x07</pre></code></td></svg></style></script>"  # after what XML does not allow
SCRIPT = f"{CLOSING}<script>document.title='{OWNED}'</script>{IMAGE}"


def poison(store: Path) -> None:
    """Put markup into names, ids, labels, notes, options, versions, outputs and logs of a store."""
    for path in store.glob("*/*/*/result.json"):
        result = _poisoned(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(result), encoding="utf-8")
        for file in path.parent.glob("metrics.jsonl"):
            _rewrite(file, [row | {f"ce{SCRIPT}": row["ce"]} for row in _read(file)])
        for file in path.parent.glob("samples/*.jsonl"):
            _rewrite(file, [_poisoned_row(row) for row in _read(file)])
            file.rename(file.with_stem(file.stem + IMAGE))


def _poisoned(result: dict[str, Any]) -> dict[str, Any]:
    spec = result["spec"]
    result["id"] += SCRIPT
    spec["method"] += SCRIPT * (not results.is_baseline(spec["method"]))
    spec["train"]["corpus"] += SCRIPT
    spec["eval"]["tasks"] = [task + IMAGE for task in spec["eval"]["tasks"]]
    spec |= {"pair": _dirty(spec["pair"]), "options": _dirty(spec["options"])}
    for part in ("cost", "provenance", "content", "notes"):
        result[part] = _dirty(result[part])
    for part in ("scores", "stderr"):
        result[part] = {
            task + IMAGE: {metric + SCRIPT: value for metric, value in metrics.items()}
            for task, metrics in result[part].items()
        }
    return result


def _dirty(data: Any) -> Any:
    """Every text, and one more name in every mapping."""
    if isinstance(data, dict):
        return {name: _dirty(value) for name, value in data.items()} | {f"more{SCRIPT}": SCRIPT}
    if isinstance(data, list):
        return [_dirty(value) for value in data]
    return data + SCRIPT if isinstance(data, str) else data


def _poisoned_row(row: dict[str, Any]) -> dict[str, Any]:
    kept = {"weight", "chance"}
    texts = {name: row[name] + SCRIPT for name in ("id", "output") if name in row}
    metrics = {n + SCRIPT: value for n, value in row.items() if n not in kept and n not in texts}
    return {name: row[name] for name in row if name in kept} | texts | metrics


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _rewrite(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
