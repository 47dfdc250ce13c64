"""CL_Benchmark: fifteen text-classification tasks behind the T5 and LLaMA orders 1 to 6.

Rows are those of github.com/cmnfriend/O-LoRA (Wang et al., 2023), commit 07117e1. Its ``dev`` files
are its ``test`` files, so validation data is taken out of ``train``.
"""

import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.stream import Origin
from cl_bench.tasks.arguments import require
from cl_bench.tasks.text.pinned import PINNED
from cl_bench.tasks.text.prompt import Prompt
from cl_bench.tasks.text.task import TextTask, carve, text_task

COMMIT = "07117e1fc4a5f5ad9308a815a42cee8f46502dc8"

REPOSITORY = "https://github.com/cmnfriend/O-LoRA"

ORIGIN = Origin(
    f"CL_Benchmark, {REPOSITORY}, commit {COMMIT[:7]}",
    "research use; the corpora keep their own terms",
    "Wang et al., Orthogonal Subspace Learning for Language Model Continual Learning, Findings of "
    "EMNLP 2023, and the corpora's own papers",
)


LICENCES: Mapping[str, str] = {"agnews": "research and other non-commercial use (AG's corpus)"}
"""Of corpora whose terms are known here; CL_Benchmark states none of a corpus of its own."""


def origin_of(name: str, source: str, collection: Origin = ORIGIN) -> Origin:
    """Where the data of one corpus comes from, with its own licence.

    Args:
        name: of the corpus.
        source: where its rows were read.
        collection: that it is a part of.
    """
    unknown = f"{name}: terms of its own, which the collection does not state"
    licence = f"{LICENCES.get(name, unknown)}; collection: {collection.licence}"
    return replace(collection, source=source, licence=licence)


@dataclass(frozen=True)
class Source:
    """A task of the benchmark.

    Attributes:
        category: in the prompt, and the folder it lies in.
        labels: in the order of the prompt's options.
        train: rows of its training file.
        test: rows of its test file.
    """

    category: str
    labels: tuple[str, ...]
    train: int
    test: int


FIVE_STARS = ("very negative", "negative", "neutral", "positive", "very positive")

SOURCES: Mapping[str, Source] = {
    "dbpedia": Source(
        "TC",
        (
            "Company",
            "Educational Institution",
            "Artist",
            "Athlete",
            "Office Holder",
            "Mean of Transportation",
            "Building",
            "Natural Place",
            "Village",
            "Animal",
            "Plant",
            "Album",
            "Film",
            "Written Work",
        ),
        14000,
        7600,
    ),
    "yahoo": Source(
        "TC",
        (
            "Society & Culture",
            "Science & Mathematics",
            "Health",
            "Education & Reference",
            "Computers & Internet",
            "Sports",
            "Business & Finance",
            "Entertainment & Music",
            "Family & Relationships",
            "Politics & Government",
        ),
        10000,
        7600,
    ),
    "agnews": Source("TC", ("World", "Sports", "Business", "Science or Technology"), 4000, 7600),
    "amazon": Source("SC", FIVE_STARS, 5000, 7600),
    "yelp": Source("SC", FIVE_STARS, 5000, 7600),
    "IMDB": Source("SC", ("Good", "Bad"), 2000, 7600),
    "SST-2": Source("SC", ("Good", "Bad"), 2000, 872),
    "MNLI": Source("NLI", ("neutral", "entailment", "contradiction"), 3000, 7600),
    "CB": Source("NLI", ("entailment", "contradiction", "neutral"), 250, 56),
    "RTE": Source("NLI", ("contradiction", "entailment"), 2000, 277),
    "QQP": Source("QQP", ("False", "True"), 2000, 7600),
    "WiC": Source("WiC", ("True", "False"), 2000, 638),
    "COPA": Source("COPA", ("A", "B"), 400, 100),
    "BoolQA": Source("BoolQA", ("True", "False"), 2000, 3270),
    "MultiRC": Source("MultiRC", ("False", "True"), 2000, 4848),
}

_LONG = {
    4: "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC yahoo",
    5: "MultiRC BoolQA WiC MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yelp amazon yahoo",
    6: "yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC BoolQA WiC",
}

ORDERS: Mapping[int, tuple[str, ...]] = {
    1: ("dbpedia", "amazon", "yahoo", "agnews"),
    2: ("dbpedia", "amazon", "agnews", "yahoo"),
    3: ("yahoo", "amazon", "agnews", "dbpedia"),
    **{order: tuple(names.split()) for order, names in _LONG.items()},
}
"""The published orders. 1 to 3, which the papers call five tasks, hold four."""

COMPLETE = ("agnews", "amazon", "SST-2", "MNLI", "CB", "RTE", "QQP", "WiC", "COPA", "BoolQA")
"""Tasks whose both files are in public snapshots of the repository."""


def places(folder: Path, name: str, split: str) -> list[Path]:
    """Where a file may lie, our packed form first, then the repository's own."""
    return [
        folder / f"{name}.{split}.jsonl.gz",
        folder / f"{name}.{split}.jsonl",
        folder / SOURCES[name].category / name / f"{split}.json",
    ]


def folder_of(data_dir: str | None, offline: str) -> Path:
    """The folder with the benchmark's files.

    Args:
        data_dir: from the configuration.
        offline: what runs without it, as advice.

    Raises:
        UsageError: there is none.
    """
    get = (
        f"get them with: git clone {REPOSITORY} && git -C O-LoRA checkout {COMMIT[:7]}, then add "
        f"stream.data_dir=O-LoRA/CL_Benchmark"
    )
    remedy = f"CL_Benchmark's files; {get}. {offline}".strip()
    require(data_dir is not None, "data_dir", data_dir, remedy)
    folder = Path(str(data_dir))
    require(folder.is_dir(), "data_dir", data_dir, f"no such folder; it should hold {remedy}")
    return folder


def read_rows(path: Path) -> list[tuple[str, str]]:
    """(text, label) of every row of a file.

    Raises:
        UsageError: it is no such file.
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
        # Not splitlines: reviews hold characters that Unicode, unlike JSON lines, ends a line with.
        lines = [line for line in text.split("\n") if line.strip()]
        whole = json.loads(text) if path.suffix == ".json" else map(json.loads, lines)
        return [(str(row["sentence"]), str(row["label"])) for row in whole]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}: not rows of {{sentence, label}} ({type(error).__name__}: {error}); get the "
            "file again"
        ) from error


def digest(rows: Sequence[tuple[str, str]]) -> str:
    """SHA-256 of (text, label) rows, in the repository's form or the packed one."""
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()


def find_files(
    folder: Path, files: Sequence[tuple[str, str]], offline: str
) -> dict[tuple[str, str], Path]:
    """Where each (task, split) lies.

    Raises:
        UsageError: some are missing; names what is expected where.
    """
    found: dict[tuple[str, str], Path] = {}
    missing = []
    for name, split in files:
        candidates = places(folder, name, split)
        there = next((path for path in candidates if path.is_file()), None)
        if there is None:
            packed, _, upstream = (str(path.relative_to(folder)) for path in candidates)
            missing.append(f"{packed} or {upstream}")
        else:
            found[name, split] = there
    if missing:
        raise UsageError(
            f"stream.data_dir={folder}: missing {'; '.join(missing)}. The repository's own files "
            f"({REPOSITORY}, commit {COMMIT[:7]}, folder CL_Benchmark) have them. {offline}".strip()
        )
    return found


def benchmark_tasks(
    names: Sequence[str],
    folder: Path,
    prompt: Prompt,
    validation_fraction: float,
    split_seed: int,
    offline: str,
    verify: bool = True,
) -> list[TextTask]:
    """Tasks from the benchmark's files.

    Args:
        names: of the tasks, in order.
        folder: where the files are.
        prompt: lays prompts out.
        validation_fraction: share of the training rows that is taken out.
        split_seed: decides which.
        offline: what to run where files are missing, as advice.
        verify: whether rows must be the benchmark's own.

    Raises:
        UsageError: files are missing, or their rows are not the benchmark's: another number, or, of
            files whose sum is known, others.
    """
    require(
        0 <= validation_fraction < 1,
        "validation_fraction",
        validation_fraction,
        "a share of the training rows in [0, 1)",
    )
    files = [(name, split) for name in names for split in ("train", "test")]
    found = find_files(folder, files, offline)
    tasks = []
    for index, name in enumerate(names):
        source = SOURCES[name]
        rows = {split: read_rows(found[name, split]) for split in ("train", "test")}
        for split, wanted in (("train", source.train), ("test", source.test)):
            if len(rows[split]) != wanted:
                raise UsageError(
                    f"{found[name, split]}: {len(rows[split])} rows, the benchmark's file has "
                    f"{wanted}; get it from {REPOSITORY} at commit {COMMIT[:7]}"
                )
            if verify and digest(rows[split]) != PINNED.get((name, split), digest(rows[split])):
                raise UsageError(
                    f"{found[name, split]}: its rows are not the benchmark's (their SHA-256 is "
                    f"another); get it from {REPOSITORY} at commit {COMMIT[:7]}, or learn what is "
                    "there with stream.verify=false"
                )
        origin = origin_of(name, str(folder))
        train, validation = carve(rows["train"], name, validation_fraction, split_seed)
        tasks.append(
            text_task(
                name,
                index,
                {"train": train, "validation": validation, "test": rows["test"]},
                source.category,
                source.labels,
                prompt,
                origin,
            )
        )
    return tasks
