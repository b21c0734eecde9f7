"""`python -m ctdbench`."""

from ctdbench.cli import main

main()
