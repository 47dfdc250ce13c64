"""Reading the directory of a run."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cl_bench.contracts import UsageError
from cl_bench.errors import printable
from cl_bench.metrics import Matrix
from cl_bench.metrics.mixed import is_mixed
from cl_bench.tracking.files import CONFIG, DATA, LOCK, PUT_BACK, RESULTS, read_json, read_text
from cl_bench.tracking.journal import read_journal
from cl_bench.tracking.renamed import present
from cl_bench.tracking.tables import Tables, metrics_of
from cl_bench.tracking.verify import read_matrix, verified, verify_tables, verify_weights

DEEPEST, LONGEST = 50, 2**22
"""Levels and characters of a configuration; more are no run's."""


_Safe: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Settings(_Safe):
    """YAML as OmegaConf reads it: ``1e-3`` is a number, dates are text, no key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if len(set(names)) < len(names):
            raise yaml.constructor.ConstructorError(None, None, "a key stands there twice", None)
        found: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return found


_Settings.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if not pair[0].endswith((":timestamp", ":float"))]
    for first, pairs in _Safe.yaml_implicit_resolvers.items()
}
_Settings.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"(?:[-+]?\d+(?:_\d+)*\.[\d_]*(?:[eE][-+]?\d+)?|[-+]?\d+(?:_\d+)*[eE][-+]?\d+"
        r"|\.\d+(?:_\d+)*(?:[eE][-+]\d+)?|[-+]?\d+(?:_\d+)*(?::[0-5]?\d)+\.[\d_]*|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        re.ASCII,
    ),
    list("-+0123456789."),
)


@dataclass(frozen=True)
class Run:
    """What a report needs of a run, read from its directory.

    Attributes:
        directory: where it was read.
        task_names: columns of R.
        matrix: R, (T + 1, T), NaN where nothing was evaluated.
        task_id_known: whether the task id was known at test time.
        status: ``completed``, ``failed``, ``interrupted``, or ``unfinished`` if nobody wrote how
            it ended: it is still running, or was killed.
        facts: stream, strategy, seed and whatever else the run was opened with.
        task_aware: R with the task id known, of class-incremental runs; else all NaN.
        incremental: summaries beside the matrix's, by name, where the run has what they need.
        confusion: how tasks learned so far are taken for one another, (t, t); None where not told.
        metrics: of every task.
        general: by tasks learned, scores on tasks that the stream does not teach; may be empty.
        started: when, as the record has it.
    """

    directory: Path
    task_names: list[str]
    matrix: Matrix
    task_id_known: bool
    status: str
    facts: dict[str, Any]
    task_aware: Matrix
    incremental: Mapping[str, float] = field(default_factory=dict)
    confusion: Matrix | None = None
    metrics: Sequence[str] = ()
    general: Mapping[int, Mapping[str, float | None]] = field(default_factory=dict)
    started: str = ""

    @property
    def title(self) -> str:
        """Stream, strategy and seed, as far as they are known."""
        named = [str(self.facts[k]) for k in ("stream", "strategy") if k in self.facts]
        seed = [f"seed {self.facts['seed']}"] if "seed" in self.facts else []
        return printable(" · ".join(named + seed) or self.directory.name)


AFTERWARDS = "general"
"""Folder of a run with what was measured on its weights when it was over."""


def read_results(directory: Path | str) -> list[dict[str, Any]]:
    """The events of a run, in order; half a last line, as a kill leaves it, is left out.

    Raises:
        UsageError: there is no such file, or a line is not what the run wrote; says which.
    """
    return [line.event for line in read_journal(Path(directory))]


def read_config(directory: Path | str) -> dict[str, Any]:
    """The configuration of a run: plain values, no expression is evaluated.

    Classes and settings that have moved since are where they are now, so that a run of an earlier
    version resumes, and compares as equal.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    path = Path(directory) / CONFIG
    text = read_text(path)
    try:
        _require_bounded(text)
        if "${" in text:
            config: Any = OmegaConf.to_container(OmegaConf.create(text))
        else:  # nothing is left to resolve: the same values, many times faster
            config = _plain(yaml.load(text, Loader=_Settings))  # noqa: S506: a safe loader
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, AssertionError) as error:
        said = " ".join(str(error).split()) or "no settings are in it"
        raise UsageError(f"{path} is damaged ({said}); {PUT_BACK}") from None
    if not isinstance(config, dict):
        raise UsageError(f"{path} holds no configuration of a run; {PUT_BACK}")
    return present({str(key): value for key, value in config.items()})


def _plain(value: Any) -> Any:
    """``value`` if it holds nothing but what a configuration can."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str | int | float):
                raise ValueError(f"the key {key!r} is no name")
            _plain(inner)
    elif isinstance(value, list):
        for inner in value:
            _plain(inner)
    elif not (value is None or isinstance(value, str | int | float | bytes)):
        raise ValueError(f"a value of type {type(value).__name__}, as no record has one")
    return value


def _require_bounded(text: str) -> None:
    """Raise ``ValueError`` where a short text would make an endless configuration."""
    if len(text) > LONGEST:
        raise ValueError(f"longer than {LONGEST >> 20} MiB")
    depth = 0
    for event in yaml.parse(text, Loader=_Safe):
        opens = isinstance(event, yaml.CollectionStartEvent)
        depth += opens - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it refers to itself, as no record does")
        if depth > DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} deep")


def read_run(directory: Path | str, weights: bool = False) -> Run:
    """Everything a report shows, from the directory alone.

    Args:
        directory: of the run.
        weights: whether weights that are kept are held against the record too.

    Raises:
        UsageError: the directory holds no run, one that was never evaluated, or files that are not
            as the run wrote them.
    """
    path = Path(directory)
    names, _ = read_matrix(path)
    lines = verified(path, names)
    if weights:
        verify_weights(path, lines)
    tables = Tables(names)
    for line in lines:
        tables.take(line.event)
    verify_tables(path, lines, tables)
    statuses = [line.event for line in lines if line.event["event"] == "status"]
    if not statuses or "task_id_known" not in statuses[0]:
        raise UsageError(f"{path / RESULTS} does not begin with how the run started; {PUT_BACK}")
    facts = {k: v for k, v in statuses[0].items() if k not in ("event", "time", "status", "files")}
    ended = statuses[-1]["status"]
    return Run(
        directory=path,
        task_names=names,
        matrix=tables.matrix,
        task_id_known=bool(facts.pop("task_id_known")),
        status="unfinished" if ended == "started" else ended,
        facts=facts,
        task_aware=tables.task_aware,
        incremental=tables.incremental(read_json(path / DATA) or {}),
        confusion=tables.last_confusion,
        metrics=metrics_of(read_json(path / DATA) or {}, len(names)),
        general=tables.general or asked_afterwards(path),
        started=str(lines[0].event.get("time", "")),
    )


def asked_afterwards(directory: Path) -> dict[int, dict[str, float | None]]:
    """What ``general=<run>`` has measured since: scores by tasks learned and general task."""
    found: dict[int, dict[str, float | None]] = {}
    for path in sorted((directory / AFTERWARDS).glob("*.json")):
        for row, values in (read_json(path) or {}).get("rows", {}).items():
            found.setdefault(int(row), {}).update(values)
    return dict(sorted(found.items()))


def is_mixed_run(directory: Path) -> bool:
    """Whether the tasks of a run have different metrics, as its ``data.json`` says."""
    data = read_json(directory / DATA) or {}
    return is_mixed(metrics_of(data, len(data.get("tasks") or ())))


def is_finished(directory: Path | str) -> bool:
    """Whether a run is completed, and its process has left nothing undone (such as figures)."""
    path = Path(directory)
    if (path / LOCK).exists() or not (path / RESULTS).exists():
        return False
    statuses = [e["status"] for e in read_results(path) if e["event"] == "status"]
    return statuses[-1:] == ["completed"]


def require_data(path: Path, data: Mapping[str, Any]) -> None:
    """Raise :class:`UsageError` if a run began with another fingerprint of its data."""
    then, now = (read_json(path / DATA) or {}).get("fingerprint"), data.get("fingerprint")
    if then != now:
        if not (path / DATA).exists():
            raise UsageError(f"{path / DATA} is missing; {PUT_BACK}")
        raise UsageError(
            f"the data of {path} has changed (fingerprint {then}, now {now}): a run is resumed on "
            "the data it began with"
        )
