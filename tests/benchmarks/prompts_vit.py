"""Prompts, adapters and pairs inside a small vision transformer that was trained before.

    python tests/benchmarks/prompts_vit.py /path/to/cifar100 --to build/prompts_vit

As in ``merging_vit.py`` 36 classes of CIFAR-100 pre-train theta_0 (a file of it in ``--to`` is
taken), and the other 64 make eight tasks of 8 in a random order; here one head answers for all and
the task id is unknown. One thread. What is finished is not done again; a row that was killed begins
anew.
"""

import argparse
import functools
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from merging_vit import BASE, TASKS, images, pretrained, stream_of, vit
from torch.optim import Adam

from cl_bench import run

PAIRS, PROMPTS, ADAPTERS, WHOLE = 3e-3, 1e-2, 1e-3, 3e-4
"""Adam's rates: of pairs, prompts, adapters and the whole network; heads learn at the same.
SLCA's network learns at a hundredth of its heads' rate, as in the paper."""

ROWS: dict[str, tuple[float, tuple[str, ...]]] = {
    "ncm": (PAIRS, ()),
    "ranpac": (PAIRS, ()),
    "finetune": (WHOLE, ()),
    "ease": (ADAPTERS, ()),
    "slca": (PAIRS, (f"strategy.rate={PAIRS / 100}", "strategy.align_rate=1e-3")),
    "coda_prompt": (PROMPTS, ("strategy.blocks=[0,1,2,3]",)),
    "l2p": (PROMPTS, ()),
    "inflora": (PAIRS, ()),
    "keeplora": (PAIRS, ()),
}
"""Rates and further settings."""


def numbers(directory: Path) -> dict[str, float]:
    """What the record says of a row, accuracies in percent."""
    told = json.loads((directory / "summary.json").read_text())
    shares = {
        "average_accuracy": told["average_accuracy_by_sample"],
        "last_accuracy": told["last_accuracy_by_sample"],
        "forgetting": told["forgetting"],
        "last_task_aware": told["task_aware_acc"],
    }
    return {
        **{name: round(100 * share, 2) for name, share in shares.items()},
        "cpu_seconds": round(float((directory / "cpu_seconds").read_text())),
        "passes": told["prediction_passes"],
        "adapters": told["prediction_adapters"],
    }


def main() -> None:
    """Learn, tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("data")
    parser.add_argument("--to", type=Path, default=Path("build/prompts_vit"))
    parser.add_argument("--order", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--train", type=int, default=100, help="images a class of each task")
    parser.add_argument("--tasks", type=int, default=TASKS, help="the first so many")
    parser.add_argument("--only", nargs="*", help="rows")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.to.mkdir(parents=True, exist_ok=True)
    known = (asked.to / "theta_0.safetensors").exists()
    x = images(asked.data, asked.train if known else 300, 50)
    theta_0 = pretrained(asked.to, x["train"][:BASE], 8, epochs=15)
    network = vit(8)
    network.load_state_dict({n.removeprefix("backbone."): w for n, w in theta_0.items()})
    stream = stream_of(x, asked.order, BASE, TASKS, asked.train, "class")
    stream.tasks = stream.tasks[: asked.tasks]
    values = []
    for name, (rate, settings) in ROWS.items():
        if asked.only and name not in asked.only:
            continue
        directory = asked.to / name
        if not (directory / "cpu_seconds").exists():
            began = time.process_time()
            run(
                stream,
                name,
                network,
                functools.partial(Adam, lr=rate),
                overrides=(
                    *(f"trainer.max_epochs={asked.epochs}", "batch_size=32", "schedule=cosine"),
                    *("trainer.accelerator=cpu", "trainer.threads=1", "logger.mode=disabled"),
                    *("checkpoint.enabled=false", "alignment.enabled=false", "eval.tasks=seen"),
                    *settings,
                ),
                run_dir=directory,
                resume="start" if directory.exists() else False,
            )
            (directory / "cpu_seconds").write_text(str(time.process_time() - began))
        values.append({"strategy": name, **numbers(directory)})
        print(json.dumps(values[-1]), flush=True)
    (asked.to / "table.json").write_text(json.dumps(values, indent=1))


if __name__ == "__main__":
    main()
