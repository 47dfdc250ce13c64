"""The command line: ``python -m cl_bench`` and ``cl-bench``."""

from cl_bench.cli.main import main

__all__ = ["main"]
