"""A real Slurm of one node: this machine, with daemons and a configuration of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import debian
import pytest

CONFIGURATION = """\
ClusterName=ctdbench
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={worker}
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
OTHERS = ("/etc/slurm/slurm.conf", "/etc/slurm-llnl/slurm.conf", "/usr/local/etc/slurm.conf")
DAEMONS = ("slurmctld", "slurmd")


@contextmanager
def slurm_node(folder: Path) -> Iterator[None]:
    """Within, Slurm's commands talk to it; skips where it cannot be had, or another one is."""
    if "SLURM_CONF" in os.environ or any(Path(path).exists() for path in OTHERS):
        pytest.skip("this machine has a Slurm of its own, which is left alone")
    if os.geteuid():
        pytest.skip("only root can start Slurm")
    debian.need((*DAEMONS, "sbatch", "munged"), ("slurm-wlm", "munge"))
    with pytest.MonkeyPatch.context() as patch, _munge():
        patch.setenv("SLURM_CONF", str(_configured(folder)))
        daemons = [_started(name, folder) for name in DAEMONS]
        try:
            _wait_until_idle(folder)
            yield
        finally:
            subprocess.run(["scancel", "--me"], capture_output=True)
            _wait_for(lambda: not _printed("squeue", "--noheader"))
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait(60)


@contextmanager
def _munge() -> Iterator[None]:
    """Slurm's authentication; one that runs already is left as it is."""
    runs_already = bool(_printed("munge", "--no-input"))
    if not runs_already:
        subprocess.run(["service", "munge", "start"], capture_output=True)
    try:
        if not _printed("munge", "--no-input"):
            pytest.skip("munge does not start")
        yield
    finally:
        if not runs_already:
            subprocess.run(["service", "munge", "stop"], capture_output=True)


def _configured(folder: Path) -> Path:
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    host = socket.gethostname().partition(".")[0]
    controller, worker = _free_ports()
    text = CONFIGURATION.format(host=host, folder=folder, controller=controller, worker=worker)
    path = folder / "slurm.conf"
    path.write_text(text)
    return path


def _free_ports() -> list[int]:
    with socket.socket() as first, socket.socket() as second:
        for each in (first, second):
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in (first, second)]


def _started(name: str, folder: Path) -> subprocess.Popen[bytes]:
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen([name, "-D"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _wait_until_idle(folder: Path) -> None:
    if not _wait_for(lambda: _printed("sinfo", "--noheader", "--format=%T") == "idle"):
        logs = [(folder / f"{name}.log").read_text().strip()[-200:] for name in DAEMONS]
        pytest.skip(f"Slurm does not come up: {logs}")


def _wait_for(holds: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def _printed(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""
