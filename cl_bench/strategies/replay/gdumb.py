"""GDumb: Greedy Sampler and Dumb Learner (Prabhu et al., ECCV 2020).

A memory holds as many samples of every class as there is room for. Of a task nothing else is
learned: the network begins from its first weights and learns the memory.
"""

from cl_bench.contracts import CLASSIFIED, Learner, Needs, Plan, Stream, Task, likewise
from cl_bench.contracts.options import Count
from cl_bench.strategies.replay.buffer import Exemplars, Part, labels_of, rows_by_class
from cl_bench.strategies.replay.classwise import Classwise, shuffled


class GDumb(Classwise):
    """Learns a balanced memory, from scratch.

    Args:
        memory: samples kept, over all classes.
    """

    needs = Needs(
        modalities=CLASSIFIED,
        scenarios=frozenset({"class", "task"}),
        own_weights=True,  # it puts the first ones back in every task
    )

    def __init__(self, memory: Count = 500) -> None:
        super().__init__(memory, "random")

    def plan(self, stream: Stream, t: int) -> Plan:
        """The memory, with samples of the new task in it.

        Raises:
            UsageError: the memory is too small.
        """
        self.require_room(stream)
        task, ahead = stream[t], Exemplars(self.kept.memory)
        ahead.load_state_dict(self.kept.state_dict())
        own = rows_by_class(labels_of(task), task.classes)
        ahead.take(task.train, shuffled(own, self.seed, task))
        return Plan(likewise(task.train, Part(ahead.batch())))

    def setup(self, learner: Learner, task: Task) -> None:
        """All heads that were seen learn, each from its first weights."""
        learner.reset_weights()
        learner.train_heads("seen")
