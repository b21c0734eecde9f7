"""Runs `ctdbench` in forks of a warm process, and kills them at chosen points or moments.

A fork costs milliseconds where a start costs seconds of imports; so the cells of a sweep are forks
of it, too. As a program it reads orders, one
JSON object a line, and answers in kind; `Driver` is the other end of the pipe.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

# What is about to be done when a fork is killed at one of its calls.
POINTS = {
    "training": ("ctdbench.distill.step", "Step.gradients"),
    "checkpoint": ("ctdbench.distill.checkpoint", "fingerprint"),  # the tensors are written
    "evaluation": ("ctdbench.evaluate.runner", "_run_task"),
    "result": ("ctdbench.launch.cell", "without_private"),  # samples are written
    "rename": ("pathlib", "Path.replace"),
    "tidying": ("shutil", "rmtree"),
    "weights": ("ctdbench.distill.saving", "save"),  # the result is there
    "bar": ("tqdm.std", "tqdm.display"),  # tqdm's lock is taken
}


@dataclass(frozen=True)
class Ended:
    """code: as a shell has it. signal: what ended the process, 0 for its own exit.

    seconds: since it told of its work for the first time; what came before is loading.
    """

    code: int
    signal: int
    stderr: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


class Driver:
    """The warm process; every order is a fork of it with a process group of its own."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CTDBENCH_CACHE": str(folder / "c")}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=environment,
        )

    def start(
        self,
        *arguments: str,
        at: tuple[str, int] | None = None,
        signal: str = "SIGKILL",
        file_size: int | None = None,
    ) -> int:
        """Fork; `at`: point and how manieth call of it raises the signal. file_size: RLIMIT_FSIZE.

        Returns what `wait` asks for.
        """
        order = {"arguments": arguments, "at": at, "signal": signal, "file_size": file_size}
        return int(self._ask(order))

    def wait(self, child: int, kill_after: float | None = None) -> Ended:
        """Its end; it is killed with its group if it works for so many seconds."""
        return Ended(**self._ask({"wait": child, "kill_after": kill_after}))

    def run(self, *arguments: str, kill_after: float | None = None, **options: Any) -> Ended:
        return self.wait(self.start(*arguments, **options), kill_after)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _ask(self, order: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


# --- the warm process ---


def main() -> None:
    for module, _ in POINTS.values():
        importlib.import_module(module)
    for module in ("ctdbench.cli", "lm_eval.evaluator", "lm_eval.tasks", "scipy.stats", "pandas"):
        importlib.import_module(module)
    from ctdbench.distill.models import load_side
    from ctdbench.spec import ModelSpec

    for name in ("student", "teacher"):  # what transformers imports when it loads a model
        load_side(ModelSpec(model=f"tiny:{name}"))
    # tqdm's own lock is one for all forks: one killed while it draws a bar would keep it for ever.
    importlib.import_module("tqdm").tqdm.set_lock(threading.RLock())
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer: Any = _end(order["wait"], order["kill_after"])
        else:
            answer = os.fork()
            if answer == 0:
                _child(order)
        print(json.dumps(answer), flush=True)


def _child(order: dict[str, Any]) -> None:
    os.setsid()
    for descriptor, name in ((0, "/dev/null"), (1, "/dev/null"), (2, f"{os.getpid()}.stderr")):
        flags = os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(name, flags), descriptor)
    if order["at"]:
        _arm(*order["at"], signal.Signals[order["signal"]])
    if order["file_size"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_size"],) * 2)
    importlib.import_module("ctdbench.launch.local").subprocess = Forks  # type: ignore[attr-defined]
    _command(order["arguments"])


def _command(arguments: Sequence[str]) -> NoReturn:
    """Run it and end, without what a process does at its end."""
    from ctdbench.cli import app

    code = 1
    try:
        app(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stderr.flush()
        os._exit(code)


class Forks:
    """`subprocess` for the launcher: what it starts is a fork, not a new interpreter."""

    DEVNULL, STDOUT = subprocess.DEVNULL, subprocess.STDOUT

    class Popen:
        def __init__(self, command: Sequence[str], *, stdout: Any, env: Any, **_: Any) -> None:
            self.code: int | None = None
            self.pid = os.fork()
            if self.pid == 0:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.environ.update(env)
                os.dup2(stdout.fileno(), 1)
                os.dup2(stdout.fileno(), 2)
                _command(command[3:])  # after `python -m ctdbench`

        def poll(self) -> int | None:
            return self._status(os.WNOHANG)

        def wait(self) -> int | None:
            return self._status(0)

        def terminate(self) -> None:
            os.kill(self.pid, signal.SIGTERM)

        def kill(self) -> None:
            os.kill(self.pid, signal.SIGKILL)

        def _status(self, options: int) -> int | None:
            if self.code is None:
                found, status = os.waitpid(self.pid, options)
                self.code = os.waitstatus_to_exitcode(status) if found else None
            return self.code


def _arm(point: str, call: int, number: int) -> None:
    """Signal the own process group just before the call."""
    module, path = POINTS[point]
    *above, name = path.split(".")
    holder: Any = importlib.import_module(module)
    for part in above:
        holder = getattr(holder, part)
    own, calls = getattr(holder, name), 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.killpg(0, number)
        return own(*arguments, **named)

    setattr(holder, name, counted)


def _end(child: int, kill_after: float | None) -> dict[str, Any]:
    told, seconds, began = Path(f"{child}.stderr"), 0.0, 0.0
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if not began and told.is_file() and told.stat().st_size:
            began = time.monotonic()
        seconds = time.monotonic() - began if began else 0.0
        if found:
            break
        if began and kill_after is not None and seconds >= kill_after:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            kill_after = None
        time.sleep(0.005)
    ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    code = 128 + ended if ended else os.WEXITSTATUS(status)
    text = told.read_text(errors="replace") if told.is_file() else ""
    return {"code": code, "signal": ended, "stderr": text, "seconds": seconds}


if __name__ == "__main__":
    main()
