"""Maps the folders `methods/`, `tasks/`, `results/` to packages; the rest is in pyproject.toml."""

from setuptools import find_packages, setup

mapped = {"ctdbench_methods": "methods", "ctdbench_tasks": "tasks", "ctdbench_results": "results"}
found = find_packages(include=["ctdbench", "ctdbench.*"])
setup(packages=[*found, *mapped], package_dir=mapped)
