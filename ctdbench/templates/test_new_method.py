"""`new-method` against its formula on numbers made by hand, and every check of `ctdbench check`."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ctdbench import registry
from ctdbench.cli import app
from ctdbench.method import PairTables, Rows, probe

FILE = Path(__file__).with_name("new_method.py")
PAIR = PairTables.build([b"a", b"b", b"ab"], [b"b", b"a"])  # "a" and "b" are common


@pytest.fixture(autouse=True)
def _plugin() -> None:
    registry.add_plugin(FILE)


def rows(probabilities: list[list[float]], chunk: list[int]) -> Rows:
    """Predictions of one document's tokens; which token came does not matter here."""
    count = torch.arange(len(chunk))
    return Rows(
        logits=torch.tensor(probabilities).log(),
        token=torch.zeros_like(count),
        chunk=torch.tensor(chunk),
        supervised=count >= 0,
        document=torch.zeros_like(count),
        byte_start=count,
        byte_end=count + 1,
    )


def test_the_formula() -> None:
    """Two chunks; the second has two rows on the student's side, and its last one counts."""
    student = rows([[0.1, 0.4, 0.5], [0.2, 0.2, 0.6], [0.3, 0.1, 0.6]], [0, 1, 1])
    teacher = rows([[0.5, 0.5], [0.25, 0.75]], [0, 1])
    first = 0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8)  # a: 0.1 / 0.5, b: 0.4 / 0.5
    second = 0.0  # a: 0.3 / 0.4, b: 0.1 / 0.4, as the teacher has it
    found = probe("new-method", student, teacher, PAIR)
    assert found["kl"] == pytest.approx((first + second) / 2)


def test_the_contract() -> None:
    """What every method must hold: `ctdbench check new-method --plugin new_method.py`."""
    outcome = CliRunner().invoke(app, ["check", "new-method", "--plugin", str(FILE)])
    assert outcome.exit_code == 0, outcome.output
