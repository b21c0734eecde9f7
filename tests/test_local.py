"""The local launcher: slots, groups, what stops it and what it shows meanwhile."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ctdbench.launch import local
from ctdbench.launch.local import Job, Stopped
from ctdbench.launch.progress import Display, last_line


def job(title: str, code: str, folder: Path, **fields: Any) -> Job:
    return Job(title, (sys.executable, "-S", "-c", code), folder / f"{title}.log", **fields)


def launched(jobs: Sequence[Job], count: int = 1) -> dict[str, int]:
    """Exit status of every job, in the order in which they ended."""
    statuses: dict[str, int] = {}

    def ended(job: Job, status: int) -> str:
        statuses[job.title] = status
        return "ended"

    places = [{"OMP_NUM_THREADS": str(number)} for number in range(1, count + 1)]
    local.run(jobs, ended, places=places, display=Display(io.StringIO()))
    return statuses


def test_every_job_runs_whatever_came_of_the_others(tmp_path: Path) -> None:
    codes = {
        "good": "print('hello')",
        "bad": "raise SystemExit(3)",
        "dead": "import os; os.abort()",
    }
    statuses = launched([job(name, code, tmp_path) for name, code in codes.items()])
    assert statuses == {"good": 0, "bad": 3, "dead": -signal.SIGABRT}
    assert (tmp_path / "good.log").read_text() == "hello\n"


def test_jobs_share_the_slots(tmp_path: Path) -> None:
    """Two that wait for each other end only if they run at once, each in its own slot."""
    code = """
import os, pathlib, sys, time
own, other = pathlib.Path({own!r}), pathlib.Path({other!r})
own.write_text(os.environ["OMP_NUM_THREADS"])
deadline = time.monotonic() + 30
while not other.exists():
    assert time.monotonic() < deadline
    time.sleep(0.02)
"""
    paths = [str(tmp_path / name) for name in "ab"]
    pairs = zip("ab", paths, paths[::-1], strict=True)
    jobs = [job(name, code.format(own=own, other=other), tmp_path) for name, own, other in pairs]
    assert launched(jobs, 2) == {"a": 0, "b": 0}
    assert sorted(Path(path).read_text() for path in paths) == ["1", "2"]


def test_what_a_group_shares_is_made_once(tmp_path: Path) -> None:
    """The others wait until the first has made it, but not until the first has ended."""
    shared, seen = tmp_path / "shared", tmp_path / "seen"
    first = f"""
import pathlib, time
time.sleep(0.3)
pathlib.Path({str(shared)!r}).touch()
deadline = time.monotonic() + 30
while not pathlib.Path({str(seen)!r}).exists():
    assert time.monotonic() < deadline
    time.sleep(0.02)
"""
    then = f"""
import pathlib
assert pathlib.Path({str(shared)!r}).exists()
pathlib.Path({str(seen)!r}).touch()
"""
    kin: dict[str, Any] = {"group": "pair", "opened": shared}
    jobs = [job("first", first, tmp_path, **kin), job("then", then, tmp_path, **kin)]
    assert launched([*jobs, job("alone", "", tmp_path)], 2) == {"alone": 0, "then": 0, "first": 0}


def test_a_group_whose_first_fails_goes_on_with_the_next(tmp_path: Path) -> None:
    kin: dict[str, Any] = {"group": "pair", "opened": tmp_path / "never"}
    jobs = [job(name, "raise SystemExit(1)", tmp_path, **kin) for name in ("a", "b")]
    assert launched(jobs, 2) == {"a": 1, "b": 1}


def test_stale_files_go_when_the_job_starts(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old/file").touch()
    code = f"import os; assert not os.path.exists({str(tmp_path / 'old')!r})"
    assert launched([job("a", code, tmp_path, stale=(tmp_path / "old",))]) == {"a": 0}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_stops_the_launcher_stops_the_jobs(tmp_path: Path, number: signal.Signals) -> None:
    """They are asked by SIGTERM, deaf to a terminal's Ctrl-C; what waits does not start."""
    code = """
import os, signal, sys, time
os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGTERM, lambda *_: (print("checkpoint", flush=True), sys.exit(143)))
print("ready", flush=True)
time.sleep(60)
"""
    jobs = [job(name, code, tmp_path) for name in "abc"]
    logs = [tmp_path / f"{name}.log" for name in "abc"]

    def interrupt() -> None:
        while not all(log.exists() and "ready" in log.read_text() for log in logs[:2]):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    ended: dict[str, int] = {}
    thread = threading.Thread(target=interrupt)
    thread.start()
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as raised:
        local.run(
            jobs,
            lambda job, status: str(ended.setdefault(job.title, status)),
            places=[{}, {}],
            display=Display(io.StringIO()),
        )
    thread.join()
    assert raised.value.number == number
    assert ended == {"a": 143, "b": 143}
    assert [log.exists() and "checkpoint" in log.read_text() for log in logs] == [True, True, False]
    assert signal.getsignal(number) is before


def test_a_job_that_heeds_nothing_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts as stopped, for it is this launcher that killed it."""
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.5)
    code = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), flush=True)
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""
    ended: list[int] = []
    with pytest.raises(Stopped):
        local.run(
            [job("deaf", code, tmp_path)],
            lambda _, status: str(ended.append(status)),
            places=[{}],
            display=Display(io.StringIO()),
        )
    assert ended == [-signal.SIGTERM]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "deaf.log").read_text()), 0)


def test_jobs_go_on_where_nobody_listens_any_more(tmp_path: Path) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    ended: list[int] = []

    def note(_: Job, status: int) -> str:
        ended.append(status)
        return "ended"

    jobs = [job(name, "pass", tmp_path) for name in ("one", "two")]
    local.run(jobs, note, places=[{}], display=Display(Closed()))
    assert ended == [0, 0]


def test_what_kills_the_group_kills_the_jobs(tmp_path: Path) -> None:
    code = f"""
import io, sys
from pathlib import Path
from ctdbench.launch import local
nap = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
job = local.Job("nap", (sys.executable, "-S", "-c", nap), Path({str(tmp_path / "log")!r}))
local.run([job], lambda job, status: "", places=[{{}}])
"""
    log = tmp_path / "log"
    launcher = subprocess.Popen([sys.executable, "-c", code], process_group=0)
    while not (log.exists() and log.read_text().strip()):
        assert launcher.poll() is None
        time.sleep(0.05)
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    stat = Path(f"/proc/{log.read_text().strip()}/stat")
    for _ in range(100):
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":  # dead, not yet waited for
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.05)
    pytest.fail("the job outlived its launcher's group")


def test_slots_are_gpus_else_shares_of_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setattr(local.devices, "gpus", tuple)
    names = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "CTDBENCH_WORKERS")
    assert local.slots() == [dict.fromkeys(names, "8")]
    assert local.slots(3) == [dict.fromkeys(names, "2")] * 3
    found = tuple(local.devices.Gpu(name, 8 * 2**30, True) for name in ("0", "GPU-f00"))
    monkeypatch.setattr(local.devices, "gpus", lambda: found)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in local.slots()] == ["0", "GPU-f00"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in local.slots(3)] == ["0", "GPU-f00", "0"]


def test_the_newest_line_of_a_log_commands_no_terminal(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_line(log) == ""
    log.write_bytes(b"old\nbar 10%\rbar \x1b[31m20%\x07 \xe6\x9c\x88\xff\r\n\n")
    assert last_line(log) == "bar 20% 月\ufffd"


def test_a_terminal_shows_every_running_job(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    (tmp_path / "log").write_text("step 7")
    shown = Terminal()
    with Display(shown) as display:
        display.show({"tiny, sft": tmp_path / "log"})
        display.say("[1/2] other: done")
    assert "tiny, sft: step 7" in shown.getvalue()
    assert "[1/2] other: done" in shown.getvalue()
