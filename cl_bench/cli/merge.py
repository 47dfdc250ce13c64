"""``python -m cl_bench merge base=<dir> models=[a,b] rule=opcm to=<dir>``: checkpoints merged.

One tensor after another, so that memory holds a few of the largest. What was merged lies beside the
target until all is done: the same command, given again after a kill, goes on from there.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from cl_bench.cli.merge_order import Order, read_order
from cl_bench.cli.tensorfiles import INDEX, TYPES, Entry, Sequential, Weights, index_of
from cl_bench.contracts import UsageError
from cl_bench.merging import RULES, Average, Fold, Part, shaped
from cl_bench.report.merge_card import merge_card
from cl_bench.tracking.files import explained, read_json, write_atomically

COPIED = (
    "config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "vocabulary.json",
)  # fmt: skip
"""Files of the base that the merge needs too."""
EVERY_SECONDS = 5.0
"""Between two lines of progress."""

Folding = Callable[[str], Tensor]
"""Of a tensor's name."""


def main(words: Sequence[str]) -> int:
    """Do what the words after ``merge`` say; the exit status is 0."""
    if {"-h", "--help"} & set(words):
        print(f"{(__doc__ or '').strip()}\n\nRules: {', '.join(RULES)}")
    else:
        merge(words)
    return 0


def merge(arguments: Sequence[str]) -> Path:
    """Merge what the command line names, and return the folder.

    Args:
        arguments: ``base=``, ``models=[...]``, ``rule=`` and ``to=``, options of the rule,
            ``skip=[...]``, ``vectors=[...]``, and ``moments=[...]`` for OTA.

    Raises:
        UsageError: something is missing or does not fit together, before any work; or a tensor
            holds what is no number, or the disk is full.
    """
    order = read_order(arguments)
    work = order.target.with_name(f".{order.target.name}.merge")
    with explained(work):
        work.mkdir(parents=True, exist_ok=True)
        if work.is_symlink():
            raise UsageError(f"{work} is a link: remove it")
    lock = FileLock(work / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"to={order.target}: another process is merging into it") from None
    try:
        _require_same_order(order, work)
        _merge(order, work)
    except KeyboardInterrupt as interrupt:
        interrupt.add_note("the same command goes on with the merge from here")
        raise
    except UsageError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise UsageError(
            f"cannot write {work} ({error.__cause__.strerror}): free some space, or see that you "
            "may write there, and give the same command again, which goes on"
        ) from error
    finally:
        lock.release()
    (work / "lock").unlink(missing_ok=True)
    for name in ("order.json", "measures.json", "update.safetensors"):
        (work / name).unlink(missing_ok=True)
    with explained(order.target):
        work.replace(order.target)
    size = sum(p.stat().st_size for p in order.target.iterdir())
    print(f"{len(order.models)} models are merged in {order.target} ({size / 1e6:.1f} MB)")
    return order.target


def _require_same_order(order: Order, work: Path) -> None:
    """An unfinished merge goes on only if it is this one; refuse to mix two."""
    identity = {
        "rule": repr(order.rule),
        "skip": list(order.skip),
        "vectors": list(order.vectors),
        "files": [w.identity() for w in (order.base, *order.models, *order.moments)],
    }
    before = read_json(work / "order.json") if (work / "order.json").exists() else None
    if before is None:
        write_atomically(work / "order.json", json.dumps(identity).encode())
    elif before != identity:
        raise UsageError(
            f"to={order.target}: {work} holds an unfinished merge with other options or other "
            "files: delete it, or give another to=<folder>"
        )


def _merge(order: Order, work: Path) -> None:
    measures = list(_measured(order, work))
    folding = _folding(order, measures)
    factor = None
    if not order.rule.normed:
        factor = order.rule.factor(0.0, sum(measures) / len(measures))
    else:
        entries = [
            replace(e, dtype="F64" if e.dtype == "F64" else "F32")
            for e in order.entries.values()
            if order.kind(e.name) in ("matrix", "vector")
        ]
        scratch = work / "update.safetensors"
        with Sequential(scratch, entries) as file:
            for entry in _told(entries[file.done :], len(entries), "folded"):
                file.append(folding(entry.name).view(entry.shape))
        updates = Weights(scratch, str(scratch))
        squares = (float(updates.get(e.name).double().square().sum()) for e in entries)
        factor = order.rule.factor(math.sqrt(sum(squares)), sum(measures) / len(measures))
        folding = updates.get
    count = len(order.entries)
    for name, entries in order.base.files.items():
        with Sequential(work / name, entries) as file:
            for entry in _told(entries[file.done :], count, "written"):
                file.append(_tensor(order, entry, folding, factor))
    if len(order.base.files) > 1:
        write_atomically(work / INDEX, index_of(order.base.files))
    _copy(order, work)
    sources = [(str(w.path), w.folder) for w in (order.base, *order.models)]
    card = merge_card(order.name, order.options, order.rule.folds, sources)
    write_atomically(work / "README.md", card.encode())


def _tensor(order: Order, entry: Entry, folding: Folding, factor: float) -> Tensor:
    start, kind = order.base.get(entry.name), order.kind(entry.name)
    if kind == "base":
        return start
    if kind == "statistic":
        rule, fold = Average(), Fold()
        part = Part(entry.name, matrix=False)
        for delta in _deltas_of(order, entry.name):
            fold = rule.fold(fold, delta, part)
        update = rule.merged(fold, part)
    else:
        update = factor * folding(entry.name)
    return start.to(update.dtype) + update.view(entry.shape)


def _folding(order: Order, measures: Sequence[float]) -> Folding:
    """What the rule makes of a tensor's task vectors, but for the factor."""

    def folding(name: str) -> Tensor:
        fold, part = Fold(), Part(name, order.kind(name) == "matrix")
        for i, delta in enumerate(_deltas_of(order, name)):
            moments = _moments(order, i, name)
            part = replace(part, index=i, measure=measures[i], moments=moments)
            fold = order.rule.fold(fold, delta, part)
        return order.rule.merged(fold, part)

    return folding


def _measured(order: Order, work: Path) -> Iterator[float]:
    """What the rule measures of every model; kept, since it takes a pass over all of them."""
    if not order.rule.measures:
        yield from (0.0 for _ in order.models)
        return
    path = work / "measures.json"
    found: list[float] = json.loads(path.read_text()) if path.exists() else []
    for i in range(len(found), len(order.models)):
        print(f"measuring model {i + 1} of {len(order.models)}", flush=True)
        found.append(order.rule.measure(lambda i=i: _parts(order, i)))  # type: ignore[misc]
        write_atomically(path, json.dumps(found).encode())
    yield from found


def _parts(order: Order, i: int) -> Iterator[tuple[Part, Tensor]]:
    for name in order.entries:
        kind = order.kind(name)
        if kind in ("matrix", "vector"):
            part = Part(name, kind == "matrix", i, 0.0, _moments(order, i, name))
            yield part, _delta(order, i, name)


def _deltas_of(order: Order, name: str) -> Iterator[Tensor]:
    for i in range(len(order.models)):
        yield _delta(order, i, name)


def _delta(order: Order, i: int, name: str) -> Tensor:
    wide = torch.float64 if TYPES[order.entries[name].dtype] == torch.float64 else torch.float32
    delta = order.models[i].get(name).to(wide) - order.base.get(name).to(wide)
    if not bool(delta.isfinite().all()):
        raise UsageError(f"{order.models[i].said}: {name} (or the base's) holds NaN or infinity")
    return shaped(delta, order.kind(name) == "matrix")


def _moments(order: Order, i: int, name: str) -> Tensor | None:
    if not order.moments or name not in order.moments[i]:
        return None
    return shaped(order.moments[i].get(name), order.kind(name) == "matrix")


def _told(entries: Sequence[Entry], count: int, did: str) -> Iterable[Entry]:
    """The entries; now and then a line says how many are done."""
    last = time.monotonic()
    for i, entry in enumerate(entries):
        if time.monotonic() - last > EVERY_SECONDS:
            last = time.monotonic()
            print(f"{did} {i} of {len(entries)} tensors (of {count} in all)", flush=True)
        yield entry


def _copy(order: Order, work: Path) -> None:
    """Configuration and tokenizer of the base; a link may lead no further than a hub's cache."""
    cache = order.base.folder.resolve().parent.parent
    for name in COPIED if order.base.path.is_dir() else ():
        source = order.base.folder / name
        if source.is_file() and source.resolve().is_relative_to(cache):
            with explained(work / name):
                shutil.copyfile(source, work / name)
