"""`python -m cpbench` is `cpbench`."""

from cpbench.cli import main

main()
