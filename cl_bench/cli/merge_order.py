"""What ``python -m cl_bench merge`` is asked for: read, and checked before any work."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from cl_bench.cli.tensorfiles import Entry, Weights, require_same
from cl_bench.contracts import UsageError
from cl_bench.contracts.checking import check
from cl_bench.contracts.options import known, shown
from cl_bench.merging import RULES, Rule, make_rule, options_of

VECTORS = (
    "*embed*", "*wte*", "*wpe*", "*shared.weight", "*relative_attention_bias*", "*lm_head*",
    "*classifier*", "*score*", "*text_projection*", "heads.*",
)  # fmt: skip
"""Names of tensors of two dimensions and more that rules do not treat as matrices."""
STATISTICS = ("running_mean", "running_var")
KEYS = ("base", "models", "rule", "to", "skip", "vectors", "moments")


@dataclass(frozen=True)
class Order:
    """What a merge is asked for.

    Attributes:
        base, models, moments: weights of before fine-tuning, of the models, and of the optimizers'
            squared gradients, which only some rules need.
        rule: with its options; ``name`` is what it was called, ``options`` what was typed.
        skip: patterns of tensors that stay as the base has them.
        vectors: patterns of tensors that are no matrices to the rule.
        target: the folder to write.
    """

    base: Weights
    models: Sequence[Weights]
    moments: Sequence[Weights]
    name: str
    options: Mapping[str, Any]
    rule: Rule
    target: Path
    skip: Sequence[str] = ()
    vectors: Sequence[str] = VECTORS
    entries: Mapping[str, Entry] = field(default_factory=dict)

    def kind(self, name: str) -> str:
        """``base`` (as it is there), ``statistic`` (averaged), ``matrix`` or ``vector``."""
        entry = self.entries[name]
        if not entry.floating or _any(name, self.skip):
            return "base"
        if name.endswith(STATISTICS):
            return "statistic"
        return "matrix" if len(entry.shape) > 1 and not _any(name, self.vectors) else "vector"


def read_order(arguments: Sequence[str]) -> Order:
    """What the command line asks for.

    Raises:
        UsageError: something is missing, is no setting, or does not fit together.
    """
    given = _words(arguments)
    for key in ("base", "models", "rule", "to"):
        if key not in given:
            raise UsageError(
                f"merge: {key}= is missing; python -m cl_bench merge base=<dir> "
                "models=[<dir>,<dir>] rule=opcm to=<dir>"
            )
    name = given["rule"]
    if name not in RULES:
        raise UsageError(f"rule={name}: {_no_rule(name)}")
    options = {k: v for k, v in given.items() if k not in KEYS}
    rule = _rule(name, options)
    target = Path(str(given["to"]))
    if target.exists():
        raise UsageError(f"to={target} is there already: delete it, or give another to=<folder>")
    for key in ("models", "skip", "vectors", "moments"):
        value = given.get(key, [])
        if not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            raise UsageError(f"{key}={shown(value)}: a list of texts, {key}=[a,b]")
    paths = {key: list(given.get(key, [])) for key in ("models", "moments")}
    if not paths["models"]:
        raise UsageError("models=[]: name at least one model")
    if rule.needs_moments != bool(paths["moments"]) or (
        rule.needs_moments and len(paths["moments"]) != len(paths["models"])
    ):
        raise UsageError(
            f"rule={name}, moments={shown(paths['moments'])}: only ota takes them, one safetensors "
            "file for each model, with the optimizer's squared gradients under the weights' names"
        )
    base = Weights(Path(str(given["base"])), f"base={given['base']}")
    models = [Weights(Path(p), f"models: {p}") for p in paths["models"]]
    moments = [Weights(Path(p), f"moments: {p}") for p in paths["moments"]]
    skip = given.get("skip", [])
    entries = base.entries
    skipped = [n for w in (base, *models) for n in w.entries if _any(n, skip)]
    for model in models:
        require_same(base, model, skipped)
    for one in moments:
        for entry in one.entries.values():
            if entry.name in entries and entry.shape != entries[entry.name].shape:
                raise UsageError(f"{one.said}: {entry.name} has another shape than the weight")
    return Order(
        base, models, moments, name, options, rule, target, skip,
        given.get("vectors", VECTORS), entries,
    )  # fmt: skip


def _words(arguments: Sequence[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for word in arguments:
        key, equals, text = word.partition("=")
        if not equals or key in given:
            raise UsageError(f"{word}: merge takes key=value, each key once")
        try:
            given[key] = text if key in ("base", "to", "rule") else yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"{word}: cannot be read ({' '.join(str(error).split())})") from None
    return given


def _no_rule(name: str) -> str:
    if name == "core_space":
        return "merges low-rank factors, from Python: cl_bench.merging.core_space"
    if name == "fw":
        return "needs gradients on data, from Python: cl_bench.merging.FrankWolfe"
    return f"there is no such rule; one of {', '.join(RULES)}.{known(name, tuple(RULES))}"


def _rule(name: str, options: Mapping[str, Any]) -> Rule:
    inner = options.get("inner")
    if name == "dare" and inner is not None and inner not in RULES.keys() - {"dare", "ota"}:
        raise UsageError(f"inner={inner}: the name of a rule, but dare and ota")
    allowed = options_of(name, inner)
    for key, value in options.items():
        if key not in allowed:
            raise UsageError(
                f"{key}={shown(value)}: rule={name} takes {', '.join(sorted(allowed))}, and the "
                f"merge {', '.join(KEYS)}.{known(key, [*allowed, *KEYS])}"
            )
    kinds = [RULES[name], *([RULES[inner or "task_arithmetic"]] if name == "dare" else [])]
    found = dict(options)
    for kind in kinds:
        own = {k: v for k, v in found.items() if k != "inner"}
        found.update(check(kind, own))
    try:
        return make_rule(name, found)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
