"""A method in a package of its own, built and installed into a fresh environment: the tutorial's
last part. The fresh environment sees this one's packages, so torch is not installed anew."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from test_tutorials import METHOD, shell, steps

TITLES = ("pyproject.toml", "skew_kl.py")
OFFLINE = {"PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}  # 0: on
COMMANDS = {"ctdbench": "ctdbench.cli", "pip": "pip._internal.cli.main"}
COMMAND = "#!{python}\nimport sys\nfrom {module} import main\n\nsys.exit(main())\n"


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of a new environment with what is installed here; pip installs into it."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    places = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    outer = [path for path in sys.path if path in site.getsitepackages()]
    lines = [f"import site; site.addsitedir({path!r})\n" for path in outer]
    Path(places.stdout.strip(), "outer.pth").write_text("".join(lines))
    for name, module in COMMANDS.items():
        command = folder / "bin" / name
        command.write_text(COMMAND.format(python=python, module=module))
        command.chmod(0o755)
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    return {**os.environ, **OFFLINE, "PATH": path, "CTDBENCH_CACHE": str(folder / "cache")}


@pytest.mark.slow
def test_a_package_adds_a_method(fresh: dict[str, str], tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for step in steps(METHOD):
        if step.title in TITLES:
            (tmp_path / step.title).write_text(step.body, encoding="utf-8")
    (commands,) = [step.body for step in steps(METHOD) if step.language == "sh"]
    install, *rest = commands.splitlines()
    assert "skew-kl" not in shell("ctdbench list methods", elsewhere, fresh)
    shell(install, tmp_path, fresh)
    listed, checked, row = (shell(command, elsewhere, fresh) for command in rest)
    assert "  skew-kl  skew-kl: KL to a mixture with the teacher" in listed
    assert "2402.03898" in listed
    assert "21 of 21 checks passed" in checked
    assert "\nskew-kl  " in row
    shell("ctdbench check skew-kl --set method.alpha=0.5", elsewhere, fresh)
