"""`make bench-peers`: its table, and (slow) that the peers compute what we compute."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from ctdbench.launch.bench import peers
from ctdbench.launch.bench.measure import Timing
from ctdbench.launch.bench.peers_comparison import Comparison, table

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-peers" / "bin" / "python"
needs_peers = pytest.mark.skipif(
    not (ROOT / ".venv-peers" / ".installed").exists(),
    reason="`make bench-peers` has not made its environment",
)


def steady(seconds: float) -> Timing:
    return Timing(seconds, seconds, seconds)


def comparison(ours: float, theirs: float, extra: tuple[int, int]) -> Comparison:
    return Comparison("loss", (steady(ours), steady(theirs)), 20, "equal", extra, 1 / 3)


@pytest.mark.parametrize(
    ("ours", "extra", "target"),
    [
        (1.0, (10**9, 4 * 10**9), ">= 20 met, memory <= 0.33 met"),
        (2.0, (10**9, 4 * 10**9), ">= 20 MISSED, memory <= 0.33 met"),
        (1.0, (2 * 10**9, 4 * 10**9), ">= 20 met, memory <= 0.33 MISSED"),
    ],
)
def test_a_target_is_met_or_missed(ours: float, extra: tuple[int, int], target: str) -> None:
    assert comparison(ours, 30.0, extra).cells()[-1] == target


def test_a_divergence_is_bounded_where_it_has_to_be() -> None:
    seconds = (steady(1.0), steady(10.0))
    free = Comparison("path", seconds, 5, "", divergence=2.0)
    bounded = Comparison("beam", seconds, 5, "", divergence=2.0, bounded=True)
    assert free.cells()[-2:] == ["2.00", ">= 5 met"]
    assert bounded.cells()[-1] == ">= 5 met, divergence <= 1 MISSED"


def test_the_table_has_columns_and_notes() -> None:
    seconds = (Timing(1.5, 1.4, 1.6), steady(60.0))
    lines = table([Comparison("loss", seconds, 20, "equal", (10**9, 4 * 10**9), 1 / 3)]).split("\n")
    assert lines[0].split() == ["ours", "theirs", "ratio", "memory", "divergence", "target"]
    assert re.search(r"1\.5 \(1\.4-1\.6\) s, 1000 MB +60 s, 4000 MB +40\.0 +0\.25 ", lines[1])
    assert lines[2:] == ["loss: equal"]


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.main(["--only", "gold,gld"]) == 2
    assert "gld" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("genlm") is not None, reason="genlm is installed")
@pytest.mark.slow
def test_a_peer_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.main(["--only", "beam"]) == 3
    assert "make bench-peers" in capsys.readouterr().err


def measured(*arguments: str) -> str:
    command = [str(PYTHON), "-m", "ctdbench.launch.bench.peers", "--repeats", "1", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pair(pattern: str, text: str) -> tuple[float, float]:
    (found,) = re.findall(pattern, text)
    return float(found[0]), float(found[1])


@needs_peers
@pytest.mark.slow
@pytest.mark.parametrize("part", ["gold", "uld"])
def test_trl_and_we_compute_the_same_loss_and_gradient(part: str) -> None:
    text = measured("--only", part, "--rows", "24")
    ours, theirs = pair(r"loss (\S+) \(ours\), (\S+) \(theirs\)", text)
    assert ours == pytest.approx(theirs, rel=1e-5)
    (apart,) = re.findall(r"gradients (\S+) apart", text)
    assert float(apart) < 1e-4


@needs_peers
@pytest.mark.slow
def test_genlm_bytes_and_we_estimate_the_same_distributions() -> None:
    """Different prunings of the same sums: both lie close to a wide beam."""
    text = measured("--only", "beam", "--beam-bytes", "16")
    beam = text.partition("bld beam (genlm-bytes' beam):")[2]
    ours, theirs = pair(r"beam (\S+) bits \(ours\), (\S+) \(theirs\)", beam)
    assert max(ours, theirs) < 0.01


@needs_peers
@pytest.mark.slow
def test_stated_figures_are_marked_as_such() -> None:
    text = measured("--only", "xtoken")
    assert text.count("theirs is a stated figure, not of this run") == 3
