"""Full fine-tuning under adaptive SVD (Nayak et al., ICLR 2026: "Sculpting Subspaces", OSFT).

At the beginning of a task every matrix of attention and MLP is split at its k-th singular value,
W = U_h S_h V_h^T + U_l S_l V_l^T. The leading part stays, and so does all that touches it: changes
D keep U_h^T D = 0 and D V_h = 0. In the paper k follows from the layer's importance. Nothing is
needed of old tasks, and the number of parameters does not grow.

The steps follow our notes on the authors' code, which differs from their text; docs/adaptive_svd.md
says where. We have not checked the paper's equation numbers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from cl_bench.contracts import (
    Batch,
    Learner,
    Memory,
    Needs,
    State,
    Statistics,
    Task,
    UsageError,
    split_batch,
)
from cl_bench.contracts.options import Count, Index, OnlyWith, Share, Strength
from cl_bench.strategies.svd.footprint import held_by_one
from cl_bench.strategies.svd.matrices import means, own_matrices
from cl_bench.strategies.svd.pretrained import ByPretraining
from cl_bench.subspace import (
    CosineSum,
    Kind,
    LinearMap,
    Owned,
    Owners,
    Parametrisation,
    RestrictedWeights,
    Restriction,
    Split,
    effective_rank,
    preserved_rank,
    retention_ratios,
    snapped_rank,
    spectra,
)

CROSS_ATTENTION = ("*EncDecAttention*", "*crossattention*", "*encoder_attn*")
"""What transformers' families call it: T5; GPT-2, BERT; BART and its descendants."""


class AdaptiveSVD(ByPretraining):
    """Trains what is orthogonal to the leading singular directions of every matrix, on both sides.

    Args:
        schedule: of the preserved rank k = floor(ratio r), with r = min(n, m). ``fixed``: ratio =
            ``preserve_ratio`` everywhere. ``importance``, the paper's: ratio = mrr + I_norm (trr -
            mrr), I the mean cosine of the layer's inputs and outputs on the previous task's data,
            I_norm = I / mean over layers; refused where that mean is not positive, which happens.
            ``budget``: ratio = (i - 1) / T in the i-th of T tasks. ``effrank``: k =
            floor(exp(entropy of s / sum s)).
        preserve_ratio: for ``fixed``: the share of directions that is *kept*; what others call
            ``unfreeze_rank_ratio`` is 1 minus this.
        mrr: for ``importance``: ratio of a layer of no importance.
        trr: for ``importance``: ratio of a layer of average importance.
        tasks: for ``budget``: T.
        samples: for ``importance``: training samples that I is measured on.
        snap: move k to the largest relative gap of the singular values up to this share of r away;
            0 leaves it.
        start_task: index of the first task that is constrained; before it, everything trains. None:
            0 where the network is pre-trained, else 1.
        projection: ``two_sided`` as in the authors' code; ``block`` as their formula is printed,
            which protects neither side; ``left`` keeps U_h^T D = 0 alone, ``right`` D V_h = 0.
        parametrisation: ``projected_param`` trains a core B in W = W_0 + P_U B V_perp^T;
            ``dense_projected`` trains W and projects gradients and steps; ``factored`` trains U_l,
            S_l and V_l (the authors' code). Learning rates do not carry over to ``factored``.
        weight_decay: of what is trained in the matrices: it pulls the task's change (core), or the
            low part, old knowledge included (the other two), towards zero.
        train_rest: what else learns while tasks are constrained: ``all`` (the authors'
            code), ``norms``, or ``none`` (PEFT). Heads of a task's own always do. ``auto``:
            ``norms`` where the network is pre-trained, else ``all``.
        include: shell patterns of layer names; empty: all linear and convolutional layers inside
            the network's blocks, that is attention and MLP.
        exclude: patterns of layers to leave out: cross-attention, as in the authors' code.

    Raises:
        UsageError: an option is out of range, or no layer matches.
    """

    needs = Needs(rewrites_gradients=True, options={"first_task": "start_task"})

    def __init__(
        self,
        schedule: Literal["fixed", "importance", "budget", "effrank"] = "fixed",
        preserve_ratio: Annotated[Share, OnlyWith("schedule", ("fixed",))] = 0.5,
        mrr: Annotated[Share, OnlyWith("schedule", ("importance",))] = 0.1,
        trr: Annotated[Share, OnlyWith("schedule", ("importance",))] = 0.8,
        tasks: Annotated[Count | None, OnlyWith("schedule", ("budget",))] = None,
        samples: Annotated[Count, OnlyWith("schedule", ("importance",))] = 128,
        snap: Share = 0.0,
        start_task: Index | None = None,
        projection: Kind = "two_sided",
        parametrisation: Parametrisation = "projected_param",
        weight_decay: Strength = 0.0,
        train_rest: Literal["auto", "none", "norms", "all"] = "auto",
        include: Sequence[str] = (),
        exclude: Sequence[str] = CROSS_ATTENTION,
    ) -> None:
        if parametrisation == "factored" and projection == "block":
            raise UsageError(
                "strategy.projection=block: factors that are trained apart leave the block, "
                "whatever is projected; use strategy.parametrisation=projected_param"
            )
        if mrr > trr:
            raise UsageError(
                f"strategy.mrr={mrr}, strategy.trr={trr}: mrr is at most trr; try 0.1 and 0.8"
            )
        if schedule == "budget" and tasks is None:
            raise UsageError(
                "strategy.tasks=null: schedule=budget divides by the number of tasks; say how "
                "many the stream has, for example strategy.tasks=10"
            )
        self.schedule, self.preserve_ratio = schedule, preserve_ratio
        self.mrr, self.trr, self.tasks, self.samples = mrr, trr, tasks, samples
        self.snap, self.start_task = snap, start_task
        self.projection: Kind = projection
        self.parametrisation: Parametrisation = parametrisation
        self.weight_decay, self.train_rest = weight_decay, train_rest
        self.needs = replace(
            self.needs, first_task=start_task or 0, gathers=schedule == "importance"
        )
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.index = self.first = 0
        self.layers: list[LinearMap] = []
        self.start: dict[str, Tensor] = {}  # W_0 of this task
        self.change: dict[str, Tensor] = {}  # D of the task before
        self.importance: dict[str, float] = {}  # I, as the task before left it
        self.owners = Owners()  # of this task's matrices
        self.restricted = RestrictedWeights(projection, parametrisation)  # of this task
        self.resumed: State | None = None  # instead of finding them
        self.measured: dict[str, dict[str, float]] = {}

    def check(self, learner: Learner) -> None:
        """Something must match, and must be a matrix of its own."""
        self.targets(learner)

    def targets(self, learner: Learner) -> list[LinearMap]:
        """The matrices that are constrained: no embedding, no head, nothing that is shared.

        Raises:
            UsageError: no layer matches, or one shares its weight.
        """
        return own_matrices(learner, self.include, self.exclude)

    def guarded(self, learner: Learner) -> frozenset[str]:
        """The matrices, and what else ``train_rest`` freezes."""
        kept = [m.weight for m in self.targets(learner)]
        if self.learning_rest(learner) != "all":
            kept += learner.others(kept, norms=self.learning_rest(learner) == "norms")
        known = set(kept)
        return frozenset(name for name, p in learner.network.named_parameters() if p in known)

    def footprint(self, learner: Learner, tasks: int, processes: int) -> Memory:
        """Of the process whose matrices take the most; by the rank that the last task keeps."""
        layers = self.targets(learner)
        ratio = {"fixed": self.preserve_ratio, "importance": self.trr}.get(self.schedule, 0.5)
        if self.schedule == "budget":
            ratio = min((tasks - 1) / (self.tasks or tasks), 1.0)
        return held_by_one(
            learner,
            layers,
            processes,
            ratio if tasks > self.first_constrained(learner) else None,
            self.parametrisation,
            self.learning_rest(learner),
        )

    def setup(self, learner: Learner, task: Task) -> None:
        """Freeze what is not to learn, and remember where the task began."""
        self.index, self.first = task.index, self.first_constrained(learner)
        self.layers = self.targets(learner)
        self.owners = Owners(self.layers, apart=self.parametrisation != "dense_projected")
        self.restricted = RestrictedWeights(self.projection, self.parametrisation, self.owners)
        self.start = self.owners.weights()
        self.change = self.owners.kept(self.change)
        self.measured = {}
        if not self.constrained:
            return
        rest = self.learning_rest(learner)
        if rest != "all":
            learner.hold_others((m.weight for m in self.layers), norms=rest == "norms")
        if self.schedule == "importance" and not self.importance:  # nothing was learned before
            self.importance = means(self.cosines(learner, task))
        self.ratios()  # what is wrong should not wait for the optimizer

    @property
    def constrained(self) -> bool:
        """Whether the task under way is."""
        return self.index >= self.first

    def param_groups(self, learner: Learner) -> Iterable[dict[str, Any]]:
        """What is trained in the matrices, and everything else that learns.

        The constrained weights stand there too: loops clear, unscale and check the gradients of
        what an optimizer holds. It never steps them, since :meth:`constrain` takes their gradients.
        """
        # Not in setup: by now the weights are on the device that is to decompose them.
        if self.constrained and not self.restricted.settled:
            self.decompose() if self.resumed is None else self.resume(self.resumed)
            self.restricted.settle()
        kept, added = self.restricted.names, self.restricted.parameters()
        matrices = {id(m.weight) for m in self.layers if m.name in kept}
        learning = learner.trainable_parameters()
        others = [p for p in learning if id(p) not in matrices]
        inside = [p for p in learning if id(p) in matrices]
        own = [p for p in added if id(p) not in matrices]
        if kept and not others and not self.restricted.learns:
            raise UsageError(
                "every direction of every matrix is preserved, and strategy.train_rest="
                f"{self.train_rest} leaves nothing else to learn: preserve less"
            )
        groups: list[dict[str, Any]] = [{"params": others}]
        if not self.owners.apart:
            groups.append({"params": inside + own, "weight_decay": self.weight_decay})
            return groups
        names = self.restricted.parameter_names()
        groups.append({"params": inside, "weight_decay": self.weight_decay})
        groups.append({"params": own, "weight_decay": self.weight_decay, "owned": names})
        return groups

    def ratios(self) -> dict[str, float]:
        """Retention ratio by layer, but for ``effrank``.

        Raises:
            UsageError: importances that cannot be normalised.
        """
        names = [layer.name for layer in self.layers]
        if self.schedule == "fixed":
            return dict.fromkeys(names, self.preserve_ratio)
        if self.schedule == "budget":
            assert self.tasks is not None
            return dict.fromkeys(names, min(self.index / self.tasks, 1.0))
        if self.schedule == "effrank":
            return {}
        try:
            return retention_ratios({n: self.importance[n] for n in names}, self.mrr, self.trr)
        except ValueError as error:
            raise UsageError(
                f"strategy.schedule=importance: {error}, which cannot be normalised (inputs and "
                "outputs of these layers point nowhere in common): use strategy.schedule=fixed"
            ) from None

    def decompose(self) -> None:
        """Split every matrix; those of which nothing is preserved go on to train as they are."""
        ratios, mine = self.ratios(), self.owners.mine
        for layer in mine:
            self.start[layer.name] = self.start[layer.name].to(layer.weight.device)
        matrices = [self.start[layer.name] for layer in mine]
        for i, spectrum in spectra(matrices, alike=not self.owners.apart):
            layer, s = mine[i], spectrum.values
            k = preserved_rank(ratios[layer.name], len(s)) if ratios else effective_rank(s)
            k = snapped_rank(k, s, self.snap)
            noted = self.measured[layer.name] = {"rank": float(k), "capacity_left": 1.0}
            if layer.name in self.importance:
                noted["importance"] = self.importance[layer.name]
            if k == 0 and not layer.stacked:
                continue
            split = spectrum.split(k, low=self.parametrisation == "factored")
            free = self.attach(layer, split).free
            noted["capacity_left"] = free / (layer.out_features * layer.in_features)
            D = self.change.get(layer.name)
            if D is not None and bool(D.any()):
                # Of what the task before has learned: the share that this one may undo.
                inside = Restriction(split, "two_sided")(D.to(split.U_h))
                noted["unprotected"] = float(inside.norm() / D.norm())
        self.change = {}

    def resume(self, state: State) -> None:
        """Go on with the splits, and in them, where a run stood within this task."""
        self.resumed = None
        for layer in self.owners.mine:
            if layer.name in state["splits"]:
                device = layer.weight.device
                self.start[layer.name] = self.start[layer.name].to(device)
                self.attach(layer, Split(*state["splits"][layer.name]).to(device))
        self.restricted.load_trained(state)

    def attach(self, layer: LinearMap, split: Split) -> Restriction:
        """Have a layer learn through the parametrisation, its leading triplets kept."""
        try:
            return self.restricted.keep(layer, split, self.start[layer.name])
        except ValueError as error:
            raise UsageError(
                f"strategy.parametrisation={self.parametrisation}: {error}; use "
                "strategy.parametrisation=projected_param"
            ) from None

    def constrain(self, learner: Learner) -> None:
        """From the accumulated gradients G to those of what is trained: of B, P_U G V_perp."""
        self.restricted.pull_back()

    def after_step(self, learner: Learner, batch: Batch, out: Tensor) -> None:
        """W <- W_0 + P_U B V_perp^T, or what the parametrisation makes of its parameters."""
        self.restricted.push_forward()

    def collect(self, learner: Learner, task: Task) -> Statistics:
        """Sums of cos(x, W x) over the task's inputs x of every matrix."""
        return self.cosines(learner, task) if self.schedule == "importance" else {}

    def cosines(self, learner: Learner, task: Task) -> dict[str, CosineSum]:
        """Sums of cos(x, W x) over training samples; padding does not count."""
        layers = self.targets(learner)
        found = {m.name: CosineSum(m.whole()) for m in layers}
        whole = task.sample(self.samples, learner.seed)
        batches = split_batch(whole, learner.batch_size, learner.least_batch)
        learner.tap(layers, batches, found)
        return found

    @torch.no_grad()
    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """The task's change D, and whether what was kept still leads."""
        weights = self.owners.weights()
        for layer in self.owners.mine:
            W = weights.pop(layer.name)
            self.change[layer.name] = W - self.start[layer.name].to(W)
            split = self.restricted.splits.get(layer.name)
            leads = split is not None and split.k > 0 and bool(split.values[0] > 0)
            if split is not None and leads and self.projection == "two_sided":
                self.measured[layer.name]["low_over_kept"] = split.low_over_kept(W)
        self.measured = self.owners.told(self.measured)
        if self.schedule == "importance":
            self.importance = means(stats)

    def release(self, learner: Learner) -> None:
        """The weights are the network's own again, and always were."""
        self.restricted = RestrictedWeights(self.projection, self.parametrisation)
        self.start, self.layers, self.resumed = {}, [], None

    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """Per layer, of the task that was constrained last.

        ``rank`` k; ``capacity_left``, the share of directions in which W may change; ``importance``
        I; ``unprotected``, ||P_U D P_V|| / ||D|| for the change D of the task before under this
        task's projectors; ``low_over_kept``, the largest trained singular value over the smallest
        kept one: above 1 what was kept is no longer what leads.
        """
        return self.measured

    def state_dict(self) -> State:
        """Between tasks I and D; inside one the splits, which need not come out the same again."""
        by_layer = Owned if self.owners.apart else dict
        return {
            "importance": dict(self.importance),
            "change": by_layer(self.change),
            "measured": by_layer((name, dict(values)) for name, values in self.measured.items()),
            **self.restricted.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`; inside a task, after :meth:`setup`."""
        self.importance, self.change = dict(state["importance"]), dict(state["change"])
        self.measured = {name: dict(values) for name, values in state["measured"].items()}
        if self.layers:  # within a task each process measures what it owns
            self.measured = self.owners.kept(self.measured)
        if self.restricted.settled:
            self.restricted.load_trained(state)
        elif self.layers and state["splits"]:
            self.resumed = state
