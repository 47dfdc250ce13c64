"""The model card of a merge of checkpoints."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cl_bench.errors import printable
from cl_bench.report.escape import markdown

MOST = 2**20
"""Bytes of a card that are looked at."""


def licence_of(folder: Path) -> str | None:
    """What a folder's own card says of its licence; None where it says nothing."""
    try:
        with (folder / "README.md").open("rb") as file:
            text = file.read(MOST).decode("utf-8", "replace")
    except OSError:
        return None
    parts = text.split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        facts = yaml.safe_load(parts[1])
    except (yaml.YAMLError, RecursionError, ValueError):
        return None
    said = facts.get("license") if isinstance(facts, dict) else None
    return said if isinstance(said, str) and said else None


def merge_card(
    rule: str, options: Mapping[str, Any], folds: bool, sources: Sequence[tuple[str, Path]]
) -> str:
    """What was merged, how, and under which licences.

    Args:
        rule: its name.
        options: of the rule, as they were typed.
        folds: whether the rule folds models in constant memory.
        sources: name and folder, of the base first.
    """
    licences = [licence_of(folder) for _, folder in sources]
    library = "transformers" if (sources[0][1] / "config.json").is_file() else "pytorch"
    head = {"library_name": library, "tags": ["merge", "cl_bench"]}
    if licences[0] is not None and len(set(licences)) == 1:
        head["license"] = licences[0]
    lines = ["| | weights | licence, by its own card |", "|---|---|---|"]
    for i, ((name, _), licence) in enumerate(zip(sources, licences, strict=True)):
        which = "base" if i == 0 else f"{i}"
        said = "not told" if licence is None else _plain(licence)
        lines.append(f"| {which} | {_plain(name)} | {said} |")
    typed = ", ".join(f"{k}={v}" for k, v in options.items()) or "its defaults"
    order = "The models were folded in this order, one after another."
    return (
        "\n\n".join(
            [
                f"---\n{yaml.safe_dump(head, sort_keys=False).strip()}\n---",
                f"# {len(sources) - 1} models merged by {rule}",
                f"Made by `python -m cl_bench merge rule={rule}` with {_plain(typed)}. Nothing was "
                "trained, and nobody has tested what came of it.",
                "\n".join(lines),
                order if folds else "The rule needed all models at once.",
                "Whoever passes the weights on should check what all of these licences ask for.",
            ]
        )
        + "\n"
    )


def _plain(text: str) -> str:
    return markdown(printable(text))
