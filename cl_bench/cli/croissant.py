"""``croissant=<folder>``: a generated stream as files, with metadata that say what they are.

Croissant (Akhtar et al., 2024) is MLCommons' vocabulary for data sets, on schema.org's; the file is
of version 1.0, https://docs.mlcommons.org/croissant/docs/croissant-spec.html.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from cl_bench.cli.build import build_stream
from cl_bench.cli.compose import composed
from cl_bench.contracts import Batch, Data, Strategy, Stream, Task, UsageError
from cl_bench.contracts.language import LanguageStream
from cl_bench.tracking.files import explained, write_atomically
from cl_bench.version import VERSION

SPLITS = ("train", "validation", "test")
ROWS = 10_000
"""Written at once."""

METADATA = "croissant.json"

PREFIXED = (
    "arrayShape", "citeAs", "column", "conformsTo", "containedIn", "dataBiases", "dataCollection",
    "equivalentProperty", "extract", "field", "fileProperty", "fileObject", "fileSet", "format",
    "includes", "isArray", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path",
    "personalSensitiveInformation", "recordSet", "references", "regex", "repeated", "replace",
    "samplingRate", "separator", "source", "subField", "transform",
)  # fmt: skip

CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    **{name: f"cr:{name}" for name in PREFIXED},
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
}
"""As the specification has it."""


def croissant(arguments: Sequence[str]) -> Path:
    """Write what the command line names, and return the folder.

    Args:
        arguments: the command line, ``croissant=<folder>`` and ``+stream=...`` among it.

    Raises:
        UsageError: no stream is named, it is not generated, or the folder is there already.
    """
    words = [a for a in arguments if a.partition("=")[0] != "croissant"]
    given = next(a for a in arguments if a.partition("=")[0] == "croissant")
    folder = Path(given.partition("=")[2])
    if not given.partition("=")[2] or folder.exists():
        raise UsageError(f"{given}: name a folder that is not there yet")
    cfg, _ = composed(words)
    if "stream" not in cfg:
        raise UsageError("croissant: no stream is named; add one, +stream=biography/smoke")
    stream = build_stream(cfg.stream, Strategy())
    require_generated(stream)
    command = " ".join(["python -m cl_bench", *arguments])
    with explained(folder):
        folder.mkdir(parents=True)
        try:
            described = write(stream, folder, command)
        except BaseException:
            shutil.rmtree(folder)
            raise
    size = sum(int(file["contentSize"].split()[0]) for file in described["distribution"])
    print(f"{len(described['distribution'])} files and {folder / METADATA} ({size / 1e6:.1f} MB)")
    return folder


def require_generated(stream: Stream) -> None:
    """Raise :class:`UsageError` if data of somebody else is in the stream."""
    for task in stream:
        if not task.origin.generated:
            raise UsageError(
                f"croissant: {stream.name} is not generated, its data is {task.origin.source}: "
                "what may be passed on is for its owners to describe"
            )


def write(stream: Stream, folder: Path, command: str) -> dict[str, Any]:
    """Files of all tasks and splits, and the metadata, which are returned."""
    files, records = [], []
    for task in stream:
        for split in SPLITS:
            data = getattr(task, split)
            if len(data):
                path = folder / f"{task.name}-{split}.parquet"
                schema, shapes = save(data, path, _words(stream))
                files.append(_file(path))
                records.append(_records(task, split, path.name, schema, shapes))
    origin = next(iter(stream)).origin
    licence = origin.licence
    described = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": stream.name,
        "description": (
            f"A stream of {len(stream)} tasks for continual learning, learned in this order: "
            f"{', '.join(task.name for task in stream)}. Generated: {command}. What a model reads "
            "before the first task, and what only probes look at, is not in it."
        ),
        "license": licence if " " in licence else f"https://spdx.org/licenses/{licence}.html",
        "url": "https://pypi.org/project/cl_bench",
        "version": VERSION,
        "datePublished": time.strftime("%Y-%m-%d"),
        "citeAs": origin.citation,
        "creator": {"@type": "sc:Organization", "name": origin.source},
        "identifier": stream.fingerprint,
        "distribution": files,
        "recordSet": records,
    }
    write_atomically(folder / METADATA, (json.dumps(described, indent=2) + "\n").encode())
    return described


def save(data: Data, path: Path, words: Sequence[str] = ()) -> tuple[pa.Schema, dict[str, Any]]:
    """Write samples as Parquet: a column a tensor, those of more than one number as flat lists.

    Args:
        data: the samples.
        path: of the file.
        words: what token i stands for; of text, prompts and answers are columns too.

    Returns:
        Columns with their types, and the shape of each that is flattened.
    """
    writer, shapes = None, {}
    for start in range(0, len(data), ROWS):
        index = torch.arange(start, min(start + ROWS, len(data)))
        batch = data[index]
        columns = {name: _column(value) for name, value in batch.items()}
        shapes = {name: list(v.shape[1:]) for name, v in batch.items() if v.dim() > 1}
        table = pa.table(columns | _texts(batch, words))
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()
    return writer.schema, shapes


def _column(value: Tensor) -> pa.Array:
    if value.dim() == 1:
        return pa.array(value.numpy())
    flat = value.flatten(1)
    ends = torch.arange(0, flat.numel() + 1, max(flat.shape[1], 1), dtype=torch.int32)
    return pa.ListArray.from_arrays(pa.array(ends.numpy()), pa.array(flat.flatten().numpy()))


def _texts(batch: Batch, words: Sequence[str]) -> dict[str, list[str]]:
    if not words or not {"input_ids", "labels", "attention_mask"} <= batch.keys():
        return {}
    answered = batch["labels"] >= 0
    read = batch["attention_mask"].bool() & ~answered
    return {
        name: [
            "".join(words[i] for i in row[mask].tolist())
            for row, mask in zip(batch["input_ids"], masks, strict=True)
        ]
        for name, masks in (("prompt", read), ("answer", answered))
    }


def _words(stream: Stream) -> Sequence[str]:
    return stream.vocabulary if isinstance(stream, LanguageStream) else ()


def _file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "@type": "cr:FileObject",
        "@id": path.name,
        "name": path.name,
        "contentUrl": path.name,
        "contentSize": f"{path.stat().st_size} B",
        "encodingFormat": "application/x-parquet",
        "sha256": digest,
    }


def _records(
    task: Task, split: str, file: str, schema: pa.Schema, shapes: dict[str, Any]
) -> dict[str, Any]:
    name = f"{task.name}-{split}-samples"
    fields = []
    for column in schema:
        kind = column.type.value_type if column.name in shapes else column.type
        field: dict[str, Any] = {
            "@type": "cr:Field",
            "@id": f"{name}/{column.name}",
            "name": column.name,
            "dataType": _type(kind),
            "source": {"fileObject": {"@id": file}, "extract": {"column": column.name}},
        }
        if column.name in shapes:
            shape = " x ".join(map(str, shapes[column.name]))
            field |= {"repeated": True, "description": f"shape {shape}, flat, last index fastest"}
        fields.append(field)
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": f"{split} samples of task {task.index}; its score is {task.metric}",
        "field": fields,
    }


def _type(kind: pa.DataType) -> str:
    if pa.types.is_boolean(kind):
        return "sc:Boolean"
    if pa.types.is_integer(kind):
        return "sc:Integer"
    return "sc:Float" if pa.types.is_floating(kind) else "sc:Text"
