"""Rows of the tasks in this folder, for lm-evaluation-harness: ``custom_dataset`` of their yaml."""

import json
from pathlib import Path
from typing import Any


def rows(file: str = "", **_: Any) -> dict[str, Any]:
    """``{"test": rows}`` of the file of that name beside this one."""
    import datasets

    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
