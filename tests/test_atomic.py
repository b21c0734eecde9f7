"""What a killed process leaves in the cache goes, and what a living one writes there stays."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ctdbench import atomic
from ctdbench.errors import RunError

WRITES = """
import sys
from ctdbench import atomic
from ctdbench.cache import cache_dir
with atomic.new_folder(cache_dir() / "models" / sys.argv[1]) as folder:
    with atomic.new_file(cache_dir() / "states" / sys.argv[1]) as path:
        path.write_text("half")
        (folder / "weights").write_text("half")
        print("writing", flush=True)
        sys.stdin.readline()
"""
Writer = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CTDBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def writer(cache: Path) -> Iterator[Writer]:
    """Starts a process that writes a file and a folder of that name, until it is told a line."""
    started = []

    def start(name: str) -> subprocess.Popen[str]:
        call = [sys.executable, "-c", WRITES, name]
        process = subprocess.Popen(call, stdin=-1, stdout=-1, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=60)
    assert process.returncode == 0


def leftovers(cache: Path) -> set[str]:
    """Names that were to be, of what lies there under a temporary one."""
    return {path.name.split(".")[1] for path in cache.rglob(atomic.LEFTOVER)}


def age(cache: Path) -> None:
    """Let all that is left over have lain there for two days."""
    for path in cache.rglob(atomic.LEFTOVER):
        os.utime(path, (time.time() - 172_800,) * 2)


def test_the_next_process_removes_what_a_killed_one_left(cache: Path, writer: Writer) -> None:
    killed = writer("killed")
    killed.kill()
    killed.wait()
    (cache / "notes.mine.tmp").write_text("not ours")
    (cache / ".notes.mine.tmp").write_text("not ours")
    assert len(list(cache.rglob(atomic.LEFTOVER))) == 2
    finish(writer("soon"))  # another machine may still write to it
    assert leftovers(cache) == {"killed"}
    age(cache)
    finish(writer("next"))
    assert leftovers(cache) == set()
    assert {path.name for path in cache.glob("*/*")} == {"soon", "next"}
    assert len(list(cache.glob("*.tmp"))) == 2


def test_what_another_process_writes_stays(cache: Path, writer: Writer) -> None:
    killed = writer("killed")
    beside = writer("beside")
    killed.kill()
    killed.wait()
    age(cache)
    finish(writer("next"))  # while `beside` writes
    assert leftovers(cache) == {"killed", "beside"}
    finish(beside)
    assert (cache / "models" / "beside" / "weights").read_text() == "half"
    age(cache)
    finish(writer("last"))
    assert leftovers(cache) == set()
    assert {path.name for path in cache.glob("*/*")} == {"next", "beside", "last"}


def test_nothing_but_the_cache_is_tidied(cache: Path, tmp_path: Path, writer: Writer) -> None:
    (tmp_path / ".result.json.0123abcd.tmp").write_text("of a process in the store")
    finish(writer("a"))
    atomic.write_bytes(tmp_path / "b", b"")
    assert (tmp_path / ".result.json.0123abcd.tmp").exists()
    assert not (tmp_path / atomic.LOCK).exists()


def test_a_folder_that_came_first_stays_and_nothing_else_hides_a_failure(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "file").write_text("first")
    with atomic.new_folder(tmp_path / "first") as folder:
        (folder / "file").write_text("second")
    assert (tmp_path / "first" / "file").read_text() == "first"
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(RunError, match="link"), atomic.new_folder(tmp_path / "link") as folder:
        (folder / "file").write_text("lost")
    assert not list(tmp_path.glob(".*"))
