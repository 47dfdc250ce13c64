"""Protocols as they are declared in ``conf/board``, and the command lines that they mean."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cl_bench.contracts import UsageError
from cl_bench.places import conf_directory, options

FINETUNE = "finetune"
"""The row that a method must be told from."""

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """One method on a protocol.

    Attributes:
        name: of the cell.
        strategy: its config.
        settings: that the protocol gives it, by dotted names.
        choose: values of each setting of which one combination is chosen, a trial each.
        old_validation: whether it reads validation data of tasks that are over.
        naive: the method that it must be told from: finetuning that is given as much.
    """

    name: str
    strategy: str
    settings: Settings = field(default_factory=dict)
    choose: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    old_validation: bool = False
    naive: str = FINETUNE

    def trials(self) -> list[dict[str, Any]]:
        """The combinations among which is chosen; none where nothing is."""
        if not self.choose:
            return []
        products = itertools.product(*self.choose.values())
        return [dict(zip(self.choose, values, strict=True)) for values in products]


@dataclass(frozen=True)
class Orders:
    """The orders of tasks under which a method is run.

    Attributes:
        setting: that says which; empty where a protocol has one.
        values: of it.
        chosen_on: the value under which hyperparameters are chosen, none of ``values``.
    """

    setting: str = ""
    values: Sequence[int] = ()
    chosen_on: int | None = None


@dataclass(frozen=True)
class Protocol:
    """A stream, how it is learned, and which methods are held against each other on it.

    Attributes:
        name: of its file.
        title: in print.
        what: the setting, in a sentence.
        place: on the board, from 1.
        command: overrides of every run; ``{strategy}`` and ``{data}`` are filled in.
        seeds: of every method.
        orders: of tasks.
        trials: how many each method has; 0: settings are published ones or defaults.
        tasks: how many a trial learns.
        pretraining: what was learned before the stream; empty for nothing.
        measured: files of docs/results whose rows count as cells, and which of their rows.
        methods: by name.
    """

    name: str
    title: str
    what: str
    place: int
    command: Sequence[str]
    seeds: Sequence[int]
    methods: Mapping[str, Method]
    orders: Orders = field(default_factory=Orders)
    trials: int = 0
    tasks: int = 3
    pretraining: str = ""
    measured: Sequence[Mapping[str, Any]] = ()

    @property
    def headline(self) -> bool:
        """Whether it stands first."""
        return self.place == 1

    @property
    def naives(self) -> set[str]:
        """The methods that others must be told from."""
        return {method.naive for method in self.methods.values()}

    @property
    def needs_data(self) -> bool:
        """Whether its commands name a folder with data."""
        return any("{data}" in word for word in self.command)

    @property
    def runs(self) -> int:
        """Of a cell."""
        return len(self.seeds) * max(1, len(self.orders.values))

    def words(self, method: Method, settings: Settings, data: str | None) -> list[str]:
        """The overrides of a run of a method, but for seed and order.

        Raises:
            UsageError: it needs data, and none is named.
        """
        if self.needs_data and not data:
            raise UsageError(f"{self.name} needs data: --data FOLDER, with mnist/, cifar100/, ...")
        filled = [w.format(strategy=method.strategy, data=data) for w in self.command]
        given = {**method.settings, **settings}
        return [*filled, *(f"{key}={_word(value)}" for key, value in given.items())]

    def sweep(self, method: Method, settings: Settings, data: str | None) -> list[str]:
        """The overrides of all runs of a cell."""
        orders = self.orders
        own = [f"{orders.setting}={_list(orders.values)}"] if orders.setting else []
        return [*self.words(method, settings, data), f"seed={_list(self.seeds)}", *own]

    def search(self, method: Method, data: str | None) -> list[str]:
        """The overrides of all trials of a cell: no test data, and an order of their own."""
        orders = self.orders
        on = [f"{orders.setting}={orders.chosen_on}"] if orders.setting else []
        lists = [f"{key}={_list(values)}" for key, values in method.choose.items()]
        seal = ["search.enabled=true", f"search.tasks={self.tasks}", f"seed={self.seeds[0]}"]
        return [*self.words(method, {}, data), *lists, *seal, *on]


def _word(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")


def _list(values: Sequence[Any]) -> str:
    return ",".join(map(_word, values))


def protocols(directory: Path | None = None) -> dict[str, Protocol]:
    """All protocols by name, in the board's order.

    Args:
        directory: with a folder ``board``; None takes ours.

    Raises:
        UsageError: one is not declared as it must be; says what is wrong.
    """
    found = [_read(n, p) for n, p in options([directory or conf_directory()], "board").items()]
    return {protocol.name: protocol for protocol in sorted(found, key=lambda p: p.place)}


def _read(name: str, path: Path) -> Protocol:
    declared: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    methods = {}
    try:
        for key, own in declared.pop("methods").items():
            methods[key] = Method(**{"name": key, "strategy": key, **(own or {})})
        orders = Orders(**declared.pop("orders", {}))
        protocol = Protocol(name=name, methods=methods, orders=orders, **declared)
    except (TypeError, KeyError) as error:
        raise UsageError(f"{path}: not a protocol of the board ({error})") from None
    if FINETUNE not in methods:
        raise UsageError(f"{path}: no {FINETUNE}, from which every method must be told")
    for method in methods.values():
        if method.naive not in methods or methods[method.naive].naive != method.naive:
            raise UsageError(
                f"{path}: {method.name} must be told from {method.naive}, which is no method here "
                "that is told from nothing but itself"
            )
        trials = math.prod(len(values) for values in method.choose.values()) if method.choose else 0
        if trials != protocol.trials:
            raise UsageError(
                f"{path}: {method.name} has {trials} trials and the protocol {protocol.trials}; "
                "every method has the same number"
            )
    if protocol.trials and orders.setting and orders.chosen_on in (None, *orders.values):
        raise UsageError(f"{path}: orders.chosen_on must be an order of its own, none of values")
    return protocol
