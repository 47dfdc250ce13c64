"""``python -m cl_bench export=<run directory> task=k``: the weights, for use without this package.

Networks of transformers are written by ``save_pretrained``, with what serves them beside; any other
as a program of ``torch.export``, which holds the architecture too and needs none of our classes.
Both come with the plain weights as safetensors and a model card.
"""

import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from cl_bench.cli.build import build
from cl_bench.cli.exported import WeightsAlone, load, write_adapter, write_pretrained
from cl_bench.cli.recorded import OBJECT, Recorded, named, read_recorded
from cl_bench.cli.trust import locate, read_trust
from cl_bench.contracts import Strategy, UsageError
from cl_bench.contracts.strategy import overrides
from cl_bench.experiment.checkpoint import (
    Checkpoints,
    CheckpointSettings,
    DamagedError,
    read_checkpoint,
)
from cl_bench.experiment.weights import TaskWeights, damaged, encoded, read_weights
from cl_bench.learners.protection import EXTRA
from cl_bench.metrics import tasks_learned
from cl_bench.report.card import heads_section, model_card
from cl_bench.tracking import read_matrix, read_results
from cl_bench.tracking.files import read_json, write_atomically

WEIGHTS, PROGRAM, CARD = "model.safetensors", "network.pt2", "README.md"


@dataclass(frozen=True)
class Order:
    """What an export is asked for.

    Attributes:
        run: which run.
        learned: after how many tasks, the row of the accuracy matrix.
        target: the folder to write.
        data: what ``data.json`` says of the stream.
        adapter: whether the change since the start is written, instead of the network.
        word: how it was asked for, in messages.
    """

    run: Recorded
    learned: int
    target: Path
    data: Mapping[str, Any]
    adapter: bool = False
    word: str = "export"


class Network(nn.Module):
    """A backbone and its heads, side by side: features (n, ...) to logits (n, all their classes).

    Args:
        backbone: features from inputs.
        heads: those that are exported, in order.
    """

    def __init__(self, backbone: nn.Module, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(heads)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of all heads, one beside the other."""
        features = self.backbone(x).flatten(1)
        return torch.cat([head(features) for head in self.heads], dim=1)


def export(arguments: Sequence[str]) -> Path:
    """Write what ``export=<run directory> task=<k> to=<folder>`` asks for.

    Args:
        arguments: the command line; ``task`` is the row of the accuracy matrix, by default the
            last; ``to`` is by default ``export/task<k>`` in the run's directory; ``adapter=true``
            writes a language model's change as PEFT's low-rank pairs; ``trust`` names folders with
            code of the user's.

    Returns:
        The folder.

    Raises:
        UsageError: there is no such run or task, its weights are gone, the folder is taken, or the
            strategy gives every task weights of its own.
    """
    order = _order(arguments)
    require_one_network(order)
    weights = find_weights(order.run.directory, order.learned)
    # Not to be guessed: what lies in wait under a known name is not written into.
    scratch = order.target.with_name(f".{order.target.name}.{secrets.token_hex(8)}.tmp")
    try:
        scratch.mkdir(parents=True)
        loading = _write(order, weights, scratch)
        card = model_card(order.run.directory, order.learned, loading)
        write_atomically(scratch / CARD, card.encode())
        write_atomically(scratch / "run.yaml", OmegaConf.to_yaml(order.run.cfg).encode())
        scratch.replace(order.target)
    except OSError as error:
        raise UsageError(
            f"cannot write {order.target} ({error.strerror or error}): give to=<folder> where "
            "there is room and you may write"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    size = sum(p.stat().st_size for p in order.target.iterdir())
    print(
        f"weights after {order.learned} task(s) are in {order.target} ({size / 1e6:.1f} MB); "
        f"{CARD} says what they are and how to load them"
    )
    return order.target


def _order(arguments: Sequence[str]) -> Order:
    trust, arguments = read_trust(arguments)
    directory, others = named(arguments, "export")
    run = read_recorded("export", directory, trust)
    options = dict(text.partition("=")[::2] for text in others)
    for key in options:
        if key not in ("task", "to", "adapter"):
            raise UsageError(
                f"{key}={options[key]}: export=<run directory> takes task=<tasks learned>, "
                "to=<folder> and adapter=true"
            )
    if options.get("adapter", "false") not in ("true", "false"):
        raise UsageError(f"adapter={options['adapter']}: true or false")
    names, matrix = read_matrix(directory)
    events = read_results(directory)
    met = max((e["request"] for e in events if e["event"] == "forget"), default=0)
    asked = options.get("task", str(tasks_learned(matrix) + met))
    if not asked.isdecimal() or int(asked) > len(names) + met:
        raise UsageError(
            f"task={asked}: counts the tasks learned, as rows of accuracy_matrix.csv do, from 0 "
            f"(before any) to {len(names)}"
            + (f", and further {met} requests to forget" if met else "")
        )
    learned = int(asked)
    kind = "adapter" if options.get("adapter") == "true" else "task"
    default = directory / "export" / f"{kind}{learned:04}"
    target = Path(options["to"]) if options.get("to") else default
    if target.exists():
        raise UsageError(f"to={target} is there already: delete it, or give another to=<folder>")
    data = read_json(directory / "data.json") or {}
    if "input_shape" not in data:
        raise UsageError(
            f"export={directory}: recorded by a version that did not write down the shape of "
            f"inputs; python -m cl_bench reproduce={directory} makes a run that can be exported"
        )
    return Order(run, learned, target, data, options.get("adapter") == "true")


def require_one_network(order: Order) -> None:
    """Raise :class:`UsageError` if the weights alone are not what was scored."""
    cfg, run = order.run.cfg, f"{order.word}={order.run.directory}"
    nodes = {k: cfg.get(k) for k in ("strategy", "adapter")} | dict(cfg.get("also") or {})
    for name, node in nodes.items():
        named = node.get("_target_", node.get(OBJECT)) if isinstance(node, DictConfig) else None
        if named is None:
            continue
        with order.run.trust.importable():
            cls: Any = locate(name, named, order.run.directory, order.run.trust)
        if not (isinstance(cls, type) and issubclass(cls, Strategy)):
            raise UsageError(f"{run}: {name}={named} is no strategy")
        if order.learned == 0:
            continue
        if cls.predict is not Strategy.predict:
            raise UsageError(
                f"{run}: {cls.__name__} ({name}) answers at test itself, by "
                "what it remembers: what the network alone says is not what was scored. task=0, "
                "before any task, can be exported"
            )
        if cls.inference is not Strategy.inference and _gives_each_its_own(order, node):
            remedy = (
                "; with adapter.end=merge, or adapter.lifetime=shared, a run ends as one network"
            )
            remedy = remedy if name == "adapter" else ""
            raise UsageError(
                f"{run}: {cls.__name__} ({name}) tests every task with "
                "weights of its own, made from the shared ones and what the strategy remembers: "
                "there is no one network to export, and the shared weights alone would score "
                f"worse than the record says. task=0, before any task, can be exported{remedy}"
            )


def _gives_each_its_own(order: Order, node: DictConfig) -> bool:
    """Whether a strategy that may act around a task's evaluation does so with its options."""
    if "_target_" not in node:
        return True
    with order.run.surroundings():
        return overrides(build(node), "inference")


def find_weights(directory: Path, learned: int) -> dict[str, Tensor]:
    """The learner's weights after ``learned`` tasks, from their file or from a checkpoint.

    Raises:
        UsageError: they are not kept; says which are.
    """
    weights = TaskWeights(directory)
    if weights.path(learned).exists():
        name = weights.path(learned).relative_to(directory).as_posix()
        told = [e for e in read_results(directory) if e["event"] == "weights" and e["file"] == name]
        return read_weights(weights.path(learned), told[-1]["sha256"] if told else None)
    checkpoints = Checkpoints(directory, CheckpointSettings())
    between = {int(p.stem[4:8]): p for p in checkpoints.paths() if p.stem.endswith("step000000000")}
    if learned in between:
        try:
            state = read_checkpoint(between[learned])
        except DamagedError as error:
            raise damaged(between[learned], error) from None
        found: dict[str, Tensor] = state["start"]["weights"]
        return found
    there = ", ".join(map(str, sorted({*weights.kept(), *between}))) or "none"
    raise UsageError(
        f"task={learned}: {directory} does not keep the weights after that many tasks (it keeps: "
        f"{there}); checkpoint.weights=all keeps those after every task. To have them: "
        f"python -m cl_bench reproduce={directory} checkpoint.enabled=true checkpoint.weights=all"
    )


def _write(order: Order, weights: dict[str, Tensor], folder: Path) -> str:
    """Write the network in its best form; returns the card's section on loading."""
    heads = _heads(order)
    last = heads - 1
    weights = {
        name: tensor.cpu()
        for name, tensor in weights.items()
        if not name.startswith("heads.") or int(name.split(".")[1]) <= last
    }
    try:
        _require_no_extras(weights)
        model = _model(order)
        if hasattr(model, "save_pretrained"):
            if order.adapter:
                start = find_weights(order.run.directory, 0)
                return write_adapter(order.run, order.data, model, start, weights, folder)
            return write_pretrained(order.run, order.data, model, weights, folder, order.target)
        if order.adapter:
            raise UsageError(
                "adapter=true: PEFT's format is for models of transformers, which this is not; "
                "leave it out"
            )
        return _write_program(order, model, weights, heads, folder)
    except WeightsAlone as reason:
        print(f"the weights alone are written, without a program: {reason}")
        write_atomically(folder / WEIGHTS, encoded(weights))
        return _loading_weights(str(reason), heads_section(order.data, order.learned, heads))


def _heads(order: Order) -> int:
    """Heads that training has met."""
    return max((task["head"] + 1 for task in order.data["tasks"][: order.learned]), default=1)


def _require_no_extras(weights: Mapping[str, Tensor]) -> None:
    extras = sorted({k.split(".")[1] for k in weights if k.startswith(EXTRA)})
    if extras:
        raise WeightsAlone(
            f"they hold modules of {', '.join(extras)} beside the network's, under {EXTRA}*"
        )


def _model(order: Order) -> Any:
    cfg, data = order.run.cfg, order.data
    if "_target_" not in cfg.model:
        raise WeightsAlone(f"the model was an object of Python code ({cfg.model.get(OBJECT)})")
    sizes = {task["head"]: task["classes"] for task in data["tasks"]}
    with order.run.surroundings():
        model = build(
            cfg.model, input_shape=tuple(data["input_shape"]), vocabulary=sum(sizes.values())
        )
    return model.eval()


def _write_program(
    order: Order, model: nn.Module, weights: Mapping[str, Tensor], heads: int, folder: Path
) -> str:
    linear = []
    for i in range(heads):
        weight, bias = weights.get(f"heads.{i}.weight"), weights.get(f"heads.{i}.bias")
        if weight is None or weight.dim() != 2:
            raise WeightsAlone("its learner keeps no linear heads under the name heads")
        linear.append(nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None))
    network = Network(model, linear).eval()
    load(network, weights)
    shape = tuple(order.data["input_shape"])
    tokens = order.data.get("modality") == "tokens"
    example = torch.ones(3, *shape, dtype=torch.int64) if tokens else torch.rand(3, *shape)
    try:
        program = torch.export.export(
            network, (example,), dynamic_shapes=({0: torch.export.Dim("n", min=1)},)
        )
        same = torch.allclose(program.module()(example[:2]), network(example[:2]), atol=1e-5)
    except Exception as error:  # torch.export raises many kinds, none of them public
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise WeightsAlone(f"torch.export cannot take this network ({said[0]})") from error
    if not same:
        raise WeightsAlone("the exported program does not compute what the network does")
    write_atomically(folder / WEIGHTS, encoded(weights))
    torch.export.save(program, folder / PROGRAM)
    shown = ", ".join(map(str, ("n", *shape)))
    return (
        "## Loading\n\nThe network, architecture and weights, in plain PyTorch:\n\n```python\n"
        f'import torch\n\nnetwork = torch.export.load("{PROGRAM}").module()\n'
        f"logits = network(x)  # x: {'int64' if tokens else 'float32'} ({shown})\n```\n\n"
        f"`{WEIGHTS}` holds the same weights under the names `backbone.*` and `heads.<i>.*`, for "
        "`safetensors.torch.load_file`. Inputs are what the stream's tasks give: their scaling, "
        f"and whatever a task does to them, belong to it. The program computes as in evaluation: "
        "no dropout.\n\n" + heads_section(order.data, order.learned, heads)
    )


def _loading_weights(reason: str, outputs: str) -> str:
    return (
        "## Loading\n\nOnly weights are here, without the architecture: "
        f"{reason}.\n\n```python\nfrom safetensors.torch import load_file\n\n"
        f'weights = load_file("{WEIGHTS}")  # backbone.*, heads.<i>.*\n```\n\n'
        "Build the network as it was built for the run, and give it the tensors that begin with "
        f"`backbone.` through `load_state_dict`.\n\n{outputs}"
    )
