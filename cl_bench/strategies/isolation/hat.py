"""Hard Attention to the Task (Serra, Suris, Miron & Karatzoglou, ICML 2018, "HAT").

Every task learns a mask over the units of each hidden layer, a = sigmoid(s e), with s from 1 / smax
to smax within every epoch, and smax at test. Weights between units of old tasks are closed to later
ones: their gradient is multiplied by 1 - min(a_i, a_j), with the largest masks so far. The loss
gets lambda sum a (1 - a_old) / sum (1 - a_old), so that a task takes few units that are free.

The rule follows github.com/joansj/hat; we have not checked the paper's equation numbers. Masks are
soft: a unit whose e is near 0 is closed in part. What is closed wholly stays to the bit.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, cast

from torch import Tensor, nn

from cl_bench.contracts import (
    CLASSIFIED,
    Batch,
    Learner,
    Needs,
    State,
    Statistics,
    Task,
)
from cl_bench.contracts.options import Range, Strength
from cl_bench.strategies.isolation.masking import Masking
from cl_bench.subspace import ClosedWeights, Gates, steepness


class HAT(Masking):
    """Masks the units of the network, task by task.

    What tasks share beside the masked layers (normalisation) trains on the first task only.

    Args:
        strength: lambda.
        smax: steepness of the masks at test.

    Raises:
        UsageError: the network is no chain of layers (skips, or something that mixes units).
    """

    needs = Needs(
        task_id_at_test=True,
        rewrites_gradients=True,
        shardable=False,
        modalities=CLASSIFIED,
    )
    penalises_weights = False

    def __init__(
        self, strength: Strength = 0.75, smax: Annotated[float, Range(least=1)] = 400.0
    ) -> None:
        super().__init__()
        self.strength, self.smax = strength, smax
        self.owned: list[Tensor] = []  # the largest masks so far, by layer
        self.closed = ClosedWeights({}, stepwise=False)

    def modules(self, learner: Learner) -> Mapping[str, nn.Module]:
        """Gates for every task that was begun."""
        return {f"task{t}": Gates(self.chain(learner).units) for t in range(self.begun)}

    def gates(self, learner: Learner, t: int | None) -> Gates:
        """Those of task t."""
        return cast(Gates, learner.extras(self)[f"task{t}"])

    def guarded(self, learner: Learner) -> frozenset[str]:
        """The masked layers, heads that tasks share, and what the first task alone trains."""
        kept = {*self.chain(learner, "auto").parameters, *learner.others((), norms=False)}
        return frozenset(n for n, p in learner.network.named_parameters() if p in kept)

    def setup(self, learner: Learner, task: Task) -> None:
        """Attach the task's masks, and close what older tasks own."""
        super().setup(learner, task)
        taken = self.chain(learner, "auto").taken(self.owned) if self.owned else {}
        if taken:
            learner.hold_others(taken, norms=False)
        for name, gates in learner.extras(self).items():
            gates.requires_grad_(name == f"task{task.index}")
        self.closed = ClosedWeights(taken, learner.projectable == "step")

    def param_groups(self, learner: Learner) -> Iterable[dict[str, Any]]:
        """The network, and the gates without weight decay."""
        gates = [p for p in learner.extras(self).parameters() if p.requires_grad]
        own = {id(p) for p in gates}
        others = [p for p in learner.trainable_parameters() if id(p) not in own]
        return [{"params": others}, {"params": gates, "weight_decay": 0.0}]

    def sharpness(self, learner: Learner) -> float:
        """The s of this step: it grows within every epoch."""
        now = learner.progress
        return steepness(now.step * now.epochs / max(now.steps, 1) - now.epoch, self.smax)

    def mask(self, learner: Learner, index: int, layer: int, training: bool) -> Tensor:
        """By s in training, by smax at test."""
        s = self.sharpness(learner) if training else self.smax
        return self.gates(learner, index).mask(layer, s)

    def penalty(self, learner: Learner, batch: Batch, out: Tensor) -> Tensor | None:
        """The price of units that no older task owns."""
        gates = self.gates(learner, self.shown)
        return self.strength * gates.price(self.sharpness(learner), self.owned)

    def constrain(self, learner: Learner) -> None:
        """Close owned weights; give the gates the gradients that a steady s would."""
        self.closed.constrain()
        self.gates(learner, self.shown).make_steady(self.sharpness(learner), self.smax)

    def after_step(self, learner: Learner, batch: Batch, out: Tensor) -> None:
        """Momentum, Adam and weight decay: close the step itself. Gates stay in their range."""
        self.closed.after_step()
        self.gates(learner, self.shown).limit()

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """The largest masks so far own."""
        self.owned = self.gates(learner, task.index).joined(self.smax, self.owned)

    def release(self, learner: Learner) -> None:
        """No masks, nothing closed."""
        super().release(learner)
        self.closed = ClosedWeights({}, stepwise=False)

    def state_dict(self) -> State:
        """What is owned, and how many tasks have gates."""
        return {"owned": list(self.owned), "begun": self.begun}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.owned, self.begun = list(state["owned"]), state["begun"]
