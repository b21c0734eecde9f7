"""Readers of YAML, of the command line and of results under random input: one line, or accepted."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from example_results import example
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from ctdbench import registry, request, results
from ctdbench.cli import app
from ctdbench.errors import UserError
from ctdbench.launch import preflight

pytestmark = pytest.mark.usefixtures("own_cache")
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["tiny", "sft", "200kB", "hub:a/b", "dir:..", "jsonl:", "../x", "\x1b[0m"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["method", "pair", "train", "eval", "options", "tasks", "model"])
            | st.text(max_size=5),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)
YAML_SIGNS = st.text(st.sampled_from("{}[]:,-?!&*#|>%@`'\"\\\n\t 0x1e.~<=aé\0\ud800"), max_size=40)


def refusal(call: Callable[[], Any]) -> UserError | None:
    """How a call is refused; any other exception is none."""
    try:
        call()
    except UserError as error:
        return error
    return None


def test_every_text_is_yaml_or_an_error_that_names_the_file() -> None:
    @settings(max_examples=300, deadline=None)
    @given(text=YAML_SIGNS | st.text(max_size=30))
    def check(text: str) -> None:
        error = refusal(lambda: registry.parse_yaml(text, "run.yaml"))
        assert error is None or str(error).startswith("run.yaml")

    check()


@quick
@given(fields=st.dictionaries(st.sampled_from(request.FIELDS) | st.text(max_size=4), VALUES))
def test_every_config_file_is_a_request_or_an_error(
    fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_text(yaml.safe_dump({"method": "sft", "pair": "tiny"} | fields))
    error = refusal(lambda: request.resolve_options(request.build_spec({}, path)).cell_id({}))
    assert error is None or error.exit_code == 2


OPTIONS = (
    *("--method", "--pair", "--seed", "--budget", "--tasks", "--limit", "--data-dir", "--config"),
    *("--store", "--set", "--plugin", "--block-rows", "--trust-remote-code", "--format", "--into"),
    *("--debug", "--help", "--version", "--", "-"),
)
WORDS = st.sampled_from(
    (
        *("run", "table", "list", "tiny", "sft", "bld", "0", "-1", "1e9", "200kB", "piqa", "all"),
        *("train.clip=1", "method.x=[", "eval.tasks=a", "=", ".", "..", "/dev/null", "nowhere"),
    )
)


@settings(max_examples=150, deadline=None)
@given(
    command=st.sampled_from(["run", "table", "list", "figures", "publish", "check", "reproduce"]),
    rest=st.lists(st.sampled_from(OPTIONS) | WORDS | st.text(max_size=6), max_size=7),
)
def test_every_command_line_is_served_or_refused_in_one_line(
    command: str, rest: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "commands"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(registry, "_plugins", {})
        # Nothing is computed: a request that is in order stops where the work would begin.
        patch.setattr(preflight, "preflight", _stop)
        patch.setattr(request, "resolve_options", _stop)
        outcome = CliRunner().invoke(app, [command, *rest])
    assert outcome.exit_code in (0, 2, 3), outcome.stderr
    assert "--debug shows where" not in outcome.stderr
    if outcome.exit_code and "--debug" not in rest:
        assert [line[:7] for line in outcome.stderr.splitlines()] == ["error: "], outcome.stderr


def _stop(*_: Any) -> Any:
    raise UserError("in order")


def _paths(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every value in JSON data."""
    found = [above] if above else []
    entries = value.items() if isinstance(value, dict) else ()
    for key, inner in [*entries, *(enumerate(value) if isinstance(value, list) else ())]:
        found += _paths(inner, (*above, key))
    return found


STORED = example(
    "alm", {"piqa": {"acc": 0.5}, "bpb_heldout": {"bpb": 1.25}}, options={"ce_weight": 0.5}
)
STORED["spec"]["eval"]["limits"] = {"piqa": 6}
STORED["points"] = [{"text_bytes": 1000, "scores": {"bpb_heldout.bpb": 1.5}}]
ROWS = [{"id": f"{index}-a", "weight": 1.0, "acc": float(index % 2)} for index in range(6)]


class ChangedStore:
    """A store of one cell, in which one value at a time is another."""

    def __init__(self, root: Path) -> None:
        self.store = root / "runs"
        self.folder = self.store / "smol-mistral" / "alm" / "cell"
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)

    def check(self, part: str, place: tuple[Any, ...], value: Any) -> None:
        """The store with that value there is shown, or refused with its folder named."""
        parts = {"result": deepcopy(STORED), "rows": deepcopy(ROWS)}
        *above, last = place
        inner = parts[part]
        for name in above:
            inner = inner[name]
        inner[last] = value
        (self.folder / results.RESULT).write_text(json.dumps(parts["result"]))
        lines = "".join(json.dumps(row) + "\n" for row in parts["rows"])
        (self.folder / "samples" / "piqa.jsonl").write_text(lines)
        outcome = CliRunner().invoke(app, ["table", "--store", str(self.store)])
        assert outcome.exit_code in (0, 2), outcome.stderr
        if outcome.exit_code:
            (line,) = outcome.stderr.splitlines()
            assert str(self.folder) in line or "no results" in line


PLACES = [("result", place) for place in _paths(STORED)] + [
    ("rows", place) for place in _paths(ROWS)
]


@quick
@given(place=st.sampled_from(PLACES), value=VALUES)
def test_a_store_with_a_changed_result_is_shown_or_the_file_is_named(
    place: tuple[str, tuple[Any, ...]], value: Any, tmp_path: Path
) -> None:
    ChangedStore(tmp_path).check(*place, value)


@pytest.mark.slow  # one and a half minutes for all places
@pytest.mark.parametrize("place", PLACES, ids=lambda place: "-".join(map(str, place[1])))
def test_any_kind_of_value_at_any_place_is_shown_or_the_file_is_named(
    place: tuple[str, tuple[Any, ...]], tmp_path: Path
) -> None:
    store = ChangedStore(tmp_path)
    for value in (None, True, 1, -1, 10**20, 1.5, "", "x", [], [1], ["a"], [None], {}, {"a": 1}):
        store.check(*place, value)


@quick
@given(start=st.integers(0, 3000), end=st.integers(0, 3000), by=st.binary(max_size=6))
def test_a_result_of_other_bytes_is_read_or_named(
    start: int, end: int, by: bytes, tmp_path: Path
) -> None:
    whole = json.dumps(STORED).encode()
    path = tmp_path / "result.json"
    path.write_bytes(whole[:start] + by + whole[end:])
    error = refusal(lambda: results.state(tmp_path))
    assert error is None or str(path) in str(error)
