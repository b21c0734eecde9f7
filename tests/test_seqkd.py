"""`seqkd` is `sft`, to the last bit, on other text."""

from __future__ import annotations

import numpy as np
import pytest
from example_rows import PAIR, block_of, two_sides

from ctdbench import registry
from ctdbench.method import create, probe, probe_gradient


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_seqkd_is_sfts_loss_exactly(weight: float) -> None:
    sides = (*two_sides(), PAIR)
    expected, gradient = probe_gradient("sft", *sides, ce_weight=weight)
    found, own = probe_gradient("seqkd", *sides, ce_weight=weight)
    assert found == expected
    np.testing.assert_array_equal(own, gradient)
    assert np.abs(own).max() > 0


def test_seqkd_needs_the_teachers_text_and_no_teacher_beside_it() -> None:
    needs = create("seqkd").needs
    assert needs.text == "teacher"
    assert not needs.teacher
    assert create("sft").needs.text == "corpus"
    student, teacher = two_sides()
    assert set(probe("seqkd", student, teacher, PAIR)) == {"ce", "loss"}
    block = block_of(student, teacher)
    assert create("seqkd").terms(block, {}) == {}
    assert create("seqkd").counts(block) == {}


def test_seqkds_meta_says_what_it_asks_for() -> None:
    meta = registry.methods()["seqkd"].meta
    assert (meta["paper"], meta["year"]) == ("1606.07947", 2016)
    assert meta["needs"] == ["teacher-generated text"]
