"""Peak bytes of live tensors in each of two processes against the plan: a random LLaMA, on CPUs.

    python tests/benchmarks/memory.py [--millions 50] [--only finetune,gpm,adaptive_svd,o_lora]

Two processes share the weights out (``trainer=fsdp``) and learn two tasks of a few steps.
A tensor is followed from the operation that makes it until its storage is gone or empty; what was
there before counts too. Bars: 1.15 times the plan, and 1.35 times for the resident memory beyond
that of a process that has imported everything. Prints a row a strategy; ``--json FILE`` keeps them.
"""

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from live import Live

BAR, RESIDENT = 1.15, 1.35
STRATEGIES = {
    "finetune": ["+strategy=finetune"],
    "gpm": ["+strategy=gpm", "strategy.samples=8"],
    "adaptive_svd": ["+strategy=adaptive_svd"],
    "o_lora": ["+strategy=o_lora", "strategy.targets=[q_proj,k_proj,v_proj,o_proj]"],
}
SIZES = {  # width, depth, inner width, vocabulary
    1: (128, 2, 352, 1024),
    50: (512, 12, 1408, 8192),
    400: (1024, 24, 2816, 32768),
}
LENGTH = 64


def resident(field: str) -> int:
    """Of this process, in bytes: ``VmRSS`` now, ``VmHWM`` at the most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def prepared(folder: Path, millions: int, rows: int, dtype: str) -> None:
    """A random model and two files of random letters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, depth, inner, vocabulary = SIZES[millions]
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=depth,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 128,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    ).to(getattr(torch, dtype)).save_pretrained(folder / "model")
    drawn = random.Random(0)
    for name in "ab":
        made = [
            {"prompt": "".join(drawn.choices("abcdefgh ", k=90)), "completion": "yes it is so"}
            for _ in range(rows)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, made)))


def words(
    name: str, folder: Path, precision: str, dtype: str = "float32", saves: bool = True
) -> list[str]:
    """The command line of a run."""
    return [
        *STRATEGIES[name],
        "+stream=chat",
        f"stream.data=[{folder}/a.jsonl,{folder}/b.jsonl]",
        "stream.tokenizer=bytes",
        f"stream.max_length={LENGTH}",
        "stream.test_fraction=0.25",
        f"model.name_or_path={folder}/model",
        *("trainer=fsdp", "trainer.devices=2", "trainer.accelerator=cpu"),
        *(f"trainer.precision={precision}", f"model.dtype={dtype}"),
        *("batch_size=4", "pack=1", "eval.batch_size=4", "alignment.enabled=false"),
        *("checkpoint.every_steps=2", "checkpoint.keep=1", "logger.mode=disabled"),
        f"checkpoint.enabled={str(saves).lower()}",
        f"run_dir={folder}/runs/{name}",
    ]


def work(names: list[str], folder: Path, *how: Any) -> None:
    """One of the processes: every strategy in turn, measured and planned."""
    from cl_bench.cli.compose import composed
    from cl_bench.cli.plan import planned
    from cl_bench.cli.run import run_config

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for name in names:
        cfg, choices = composed(words(name, folder, *how))
        made, _ = planned(cfg, choices)
        gc.collect()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        begun = time.perf_counter()
        with Live() as live:
            run_config(cfg, "memory", choices)
        found = {
            "strategy": name,
            "planned": made.peak,
            "phase": max(
                ("stepping", "training", "boundary", "evaluation", "checkpoint"), key=made.total
            ),
            "measured": live.peak,
            "resident": resident("VmHWM") - before,
            "seconds": time.perf_counter() - begun,
        }
        (folder / f"{name}-{dist.get_rank()}.json").write_text(json.dumps(found))
        gc.collect()
    dist.destroy_process_group()


def main() -> int:
    """Measure; the status is 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--millions", type=int, choices=list(SIZES), default=50)
    parser.add_argument("--only", default=",".join(STRATEGIES))
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--dtype", default="float32", help="of the weights")
    parser.add_argument("--rows", type=int, default=16, help="samples of a task")
    parser.add_argument("--no-checkpoints", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    names = given.only.split(",")
    if given.folder:
        work(names, given.folder, given.precision, given.dtype, not given.no_checkpoints)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepared(folder, given.millions, given.rows, given.dtype)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        options = ["--only", given.only, "--precision", given.precision]
        options += ["--dtype", given.dtype]
        options += ["--no-checkpoints"] * given.no_checkpoints
        subprocess.run(
            [sys.executable, *launcher, __file__, *options, "--folder", scratch],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
        )
        rows = []
        for name in names:
            both = [json.loads((folder / f"{name}-{r}.json").read_text()) for r in (0, 1)]
            rows.append(
                {
                    **both[0],
                    **{k: max(b[k] for b in both) for k in ("measured", "resident", "seconds")},
                }
            )
    missed = False
    for row in rows:
        row["ratio"] = row["measured"] / row["planned"]
        row["resident_ratio"] = row["resident"] / row["planned"]
        missed |= row["ratio"] > BAR or row["resident_ratio"] > RESIDENT
        print(
            f"{row['strategy']:13} planned {row['planned'] / 1e6:8.1f} MB ({row['phase']}), is "
            f"{row['measured'] / 1e6:8.1f} ({row['ratio']:.2f}), resident "
            f"{row['resident'] / 1e6:8.1f} ({row['resident_ratio']:.2f}), {row['seconds']:.0f} s"
        )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
