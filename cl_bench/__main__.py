"""``python -m cl_bench``."""

from cl_bench.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
