"""Experiments from Python: ``from cl_bench import run``."""

import copy
import inspect
import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, cast

from omegaconf import open_dict
from torch import nn

from cl_bench.cli.compose import composed
from cl_bench.cli.jobs import quote
from cl_bench.cli.recorded import OBJECT
from cl_bench.cli.run import run_config
from cl_bench.contracts import Strategy, UsageError
from cl_bench.contracts import Stream as AnyStream
from cl_bench.experiment import Result
from cl_bench.experiment.reopen import Resume
from cl_bench.optimizers import OptimizerFactory
from cl_bench.tasks.own import Stream

__all__ = ["Stream", "run"]

GROUPS = {"stream": "+stream", "strategy": "+strategy", "model": "model", "optimizer": "optimizer"}
"""How each part is named on a command line."""


def run(
    stream: str | AnyStream,
    strategy: str | Strategy,
    model: str | nn.Module | None = None,
    optimizer: str | OptimizerFactory | None = None,
    *,
    overrides: Sequence[str] = (),
    run_dir: Path | str | None = None,
    seed: int = 0,
    resume: Resume = False,
) -> Result:
    """Run one experiment, and record it as the command line does.

    Every part is a name, as on the command line, or an object. A stream's name brings the model,
    optimizer, batch size and number of epochs of its yaml; a stream object brings none, so those
    are the defaults of ``conf/config.yaml``. Strategies and models are copied first: running the
    same cell twice gives the same result twice.

    Args:
        stream: ``"permuted_digits"``, or a :class:`~cl_bench.contracts.Stream`.
        strategy: ``"gpm"``, or a :class:`~cl_bench.contracts.Strategy`.
        model: ``"mlp"``, or a module that gives features (n, ...); its weights are taken as they
            are. None leaves it to the stream.
        optimizer: ``"sgd"``, or what builds an optimizer from parameter groups, for example
            ``functools.partial(torch.optim.SGD, lr=0.1)``. None leaves it to the stream.
        overrides: further settings, as on the command line: ``["trainer.max_epochs=3"]``.
        run_dir: where to; None takes ``runs/<stream>/<strategy>/<time>-seed<k>``.
        seed: of everything but a model that is given as an object.
        resume: go on with the run in ``run_dir``; everything else must be as it was. ``"start"``
            begins it again and moves what it recorded to ``superseded`` in its directory.

    Returns:
        The accuracy matrix, the summary, the directory, and what has learned.

    Raises:
        UsageError: whatever the caller can put right; results so far are kept.
    """
    listed = isinstance(overrides, Sequence) and not isinstance(overrides, str)
    if not (listed and all(isinstance(word, str) for word in overrides)):
        raise UsageError(
            f'overrides={overrides!r}: give a list of them, such as ["trainer.max_epochs=3"]'
        )
    if not isinstance(run_dir, str | os.PathLike | None):
        raise UsageError(f"run_dir={run_dir!r}: give a path, or None")
    if resume not in (False, True, "start"):
        raise UsageError(f'resume={resume!r}: use False, True or "start"')
    if not isinstance(cast(object, seed), Integral):
        raise UsageError(f"seed={seed!r}: must be a whole number; by default 0")
    parts = {"stream": stream, "strategy": strategy, "model": model, "optimizer": optimizer}
    names = {k: v for k, v in parts.items() if isinstance(v, str)}
    given = {k: v for k, v in parts.items() if v is not None and not isinstance(v, str)}
    _require_kinds(given)
    _refuse_twice(overrides, given, {"seed": seed != 0, "run_dir": run_dir is not None})
    if resume and run_dir is None:
        raise UsageError("resume=True: say which run, with run_dir=...")
    words = [f"{GROUPS[k]}={v}" for k, v in names.items()]
    words += [f"seed={seed}", *overrides]
    cfg, choices = composed(words)
    cfg.run_dir = None if run_dir is None else str(run_dir)
    for part, value in given.items():
        with open_dict(cfg):
            cfg[part] = {OBJECT: _name(value), **_settings(value)}
        choices[part] = value.name if isinstance(value, AnyStream) else _short(value)
    copies = {k: copy.deepcopy(v) if k in ("strategy", "model") else v for k, v in given.items()}
    return run_config(cfg, _command(words, given, run_dir), choices, resume, copies, words)


def _require_kinds(given: Mapping[str, Any]) -> None:
    kinds: dict[str, Any] = {"stream": AnyStream, "strategy": Strategy, "model": nn.Module}
    for part, value in given.items():
        if inspect.isclass(value) and part != "optimizer":
            raise UsageError(f"{part}={value.__name__}: give an object, {value.__name__}(...)")
        if part in kinds and not isinstance(value, kinds[part]):
            wanted = kinds[part].__name__
            raise UsageError(f"{part}={value!r}: give a name, or a {wanted}")
        if part == "optimizer" and not callable(value):
            what = f"{type(value).__name__}(...)" if "\n" in repr(value) else repr(value)
            raise UsageError(
                f"optimizer={what}: give a name, or what builds one: "
                "functools.partial(torch.optim.SGD, lr=0.1)"
            )


def _refuse_twice(
    overrides: Sequence[str], given: Mapping[str, Any], arguments: Mapping[str, bool]
) -> None:
    """Raise :class:`UsageError` if an override is for what an argument says, or an object is.

    Args:
        overrides: as they were given.
        given: the parts that are objects.
        arguments: of other arguments that overrides may stand for, whether each was given.
    """
    for word in overrides:
        key = word.lstrip("+~").partition("=")[0]
        part = key.partition(".")[0]
        if part in given or (part == "widths" and "model" in given):
            part = "model" if part == "widths" else part
            raise UsageError(f"{word}: has no effect, as {part} is given as an object")
        if arguments.get(key):
            raise UsageError(f"{word}: has no effect beside {key}=...; give one of them")


def _name(value: Any) -> str:
    """Where its class, or the function behind a partial, is defined."""
    made = getattr(value, "func", value)
    kind = made if inspect.isclass(made) or inspect.isroutine(made) else type(made)
    return f"{kind.__module__}.{kind.__qualname__}"


def _settings(value: Any) -> dict[str, Any]:
    """Plain values among its attributes or a partial's arguments, for the record."""
    if isinstance(value, nn.Module):
        return {"description": repr(value)}
    held = getattr(value, "keywords", None) or getattr(value, "__dict__", {})
    return {
        k: v
        for k, v in held.items()
        if not k.startswith("_") and k != OBJECT and isinstance(v, bool | int | float | str)
    }


def _short(value: Any) -> str:
    return _name(value).rpartition(".")[2].lower()


def _command(words: Sequence[str], given: Mapping[str, Any], run_dir: Path | str | None) -> str:
    """The same on the command line, or as far as it goes, the call in Python."""
    if given:
        objects = ", ".join(f"{k}=<{_name(v)}>" for k, v in given.items())
        return f"cl_bench.run({objects}, overrides={list(words)})"
    where = [] if run_dir is None else [f"run_dir={run_dir}"]
    return " ".join(["python -m cl_bench", *map(quote, [*words, *where])])
