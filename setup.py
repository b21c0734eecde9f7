"""Maps the top-level folders `methods/` and `tasks/` to packages; the rest is in pyproject.toml."""

from setuptools import find_packages, setup

mapped = {"ctdbench_methods": "methods", "ctdbench_tasks": "tasks"}
found = find_packages(include=["ctdbench", "ctdbench.*"])
setup(packages=[*found, *mapped], package_dir=mapped)
