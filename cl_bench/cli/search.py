"""Searches from the command line: writing down what was chosen, and running with it.

``python -m cl_bench -m +search=ewc +stream=permuted_digits`` leaves ``chosen.json`` in the sweep's
directory; ``selected=<that directory>`` takes its values, and the record says where they are from.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from cl_bench.cli.ledger import Ledger
from cl_bench.cli.sweep import flat
from cl_bench.errors import UsageError

CHOSEN, RESULTS = "chosen.json", "optimization_results.yaml"


def write_chosen(sweep: Path) -> str | None:
    """Gather the trials of a finished search; returns what to say, None where it was no search."""
    if not (sweep / RESULTS).is_file():
        return None
    from cl_bench.tracking.aside import SUPERSEDED
    from cl_bench.tracking.files import read_json
    from cl_bench.tracking.verify import require_numbers

    best: Any = OmegaConf.to_container(OmegaConf.load(sweep / RESULTS))
    values: dict[str, Any] = best["best_params"]
    trials = []
    for path in sorted(sweep.rglob("summary.json")):
        try:
            summary = read_json(path) or {}
            require_numbers(summary, ("acc",), path)
        except UsageError as damage:
            print(f"left out: {damage}", file=sys.stderr)
            continue
        if "search" not in summary or SUPERSEDED in path.relative_to(sweep).parts:
            continue
        config = dict(flat(OmegaConf.to_container(OmegaConf.load(path.parent / "config.yaml"))))
        trials.append(
            {
                "values": {name: config.get(name.lstrip("+")) for name in values},
                "acc": summary["acc"],
                "run": str(path.parent.relative_to(sweep)),
                "strategy": summary["strategy"],
                "stream": summary["stream"],
                "tasks": summary["search"]["tasks"],
            }
        )
    if not trials:
        return None
    first = trials[0]
    trials.sort(key=lambda trial: -(trial["acc"] if trial["acc"] is not None else -1.0))
    chosen = {
        "strategy": first["strategy"],
        "stream": first["stream"],
        "tasks": first["tasks"],
        "split": "validation",
        "trials": len(Ledger(sweep).latest()),
        "values": {name.lstrip("+"): value for name, value in values.items()},
        "acc": best["best_value"],
        "all": [{"values": t["values"], "acc": t["acc"], "run": t["run"]} for t in trials],
    }
    temporary = sweep / f"{CHOSEN}.tmp"
    temporary.write_text(json.dumps(chosen, indent=2) + "\n")
    os.replace(temporary, sweep / CHOSEN)
    said = " ".join(f"{name}={value}" for name, value in chosen["values"].items())
    return (
        f"chosen in {chosen['trials']} trials on validation data of {', '.join(chosen['tasks'])}: "
        f"{said}\nrun with it: +strategy={chosen['strategy']} selected={sweep}"
    )


def apply_selection(cfg: DictConfig, choices: Mapping[str, Any], task: Sequence[str]) -> None:
    """Put the values that a search chose in place of the defaults.

    Args:
        cfg: whose ``selected`` names the search's directory, or one with searches in it.
        choices: which option of each group was chosen.
        task: the job's overrides; one of a chosen value is refused.

    Raises:
        UsageError: there is no such search, there are several, or an override contradicts it.
    """
    if cfg.get("selected") is None:
        return
    if not isinstance(cfg.selected, str):
        raise UsageError(f"selected={cfg.selected}: name the directory of a finished search")
    from cl_bench.tracking.files import read_json

    folder = Path(cfg.selected)
    strategy = "+".join([str(choices.get("strategy")), *(cfg.get("also") or {})])
    stream = str(choices.get("stream"))
    found = []
    for path in sorted(folder.rglob(CHOSEN)):
        chosen = read_json(path) or {}
        if (chosen.get("strategy"), chosen.get("stream")) == (strategy, stream):
            found.append((path.parent, chosen))
    if len(found) != 1:
        there = ", ".join(str(path) for path, _ in found) or "none"
        raise UsageError(
            f"selected={folder}: one finished search for {strategy} on {stream} is needed there, "
            f"found {there}; make one with -m +search={strategy} +stream={stream}, or name its "
            "directory"
        )
    directory, chosen = found[0]
    given = {word.lstrip("+").partition("=")[0] for word in task}
    for name, value in chosen["values"].items():
        if name in given:
            raise UsageError(f"{name}=... contradicts selected={folder}, which chose {value}")
        with open_dict(cfg):
            OmegaConf.update(cfg, name, value)
    kept = ("tasks", "split", "trials", "values", "acc", "all")
    with open_dict(cfg):
        cfg.selected = {"source": str(directory), **{k: chosen[k] for k in kept}}
