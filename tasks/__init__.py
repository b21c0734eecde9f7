"""lm-eval task files (YAML), their embedded data, and the Python functions that they name.

A task file runs Python through `!function`, so it is trusted like a plugin: read a stranger's
before you name it in `--tasks`.
"""
