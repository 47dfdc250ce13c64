"""Events: lines of ``results.jsonl``, and what they tell.

By ``event``:

* ``status``: ``status`` (``started``, ``completed``, ``failed``, ``interrupted``) and facts;
  ``files`` {name: SHA-256} are those that were written before it.
* ``weights``: ``learned`` (tasks), ``file``, ``bytes``, ``sha256``: weights that were written.
* ``guards``, before any training, of a strategy that guards some parameters and not others:
  ``share`` of the ``trained`` weights that tasks share; ``unprotected`` and, in heads of one task
  each, ``per_task`` {group of parameters: weights}.
* ``evaluation``: ``row`` (tasks learned), ``task`` (index of the task just learned, or null),
  ``task_name``, ``scores`` {task name: value}, ``task_id_known``, ``seconds`` and, where a stream
  has more to measure, ``details`` {task name: {measure: value}}. Class-incremental streams have
  ``task_aware_accuracy`` there: the score with the task id known, beside the one without; and
  ``answered_as/<i>``: the share of samples whose answer is a class of task i.
* ``epoch``: ``task``, ``epoch`` (from 1), ``train_loss``, ``learning_rate``, ``seconds``,
  ``steps``.
  Of text also ``useful_tokens``: the share of the network's positions that was not padding.
* ``steps``, where ``log_steps`` asks for it: ``task``, ``batches`` (learned of the task, or of its
  ``phase``), ``train_loss`` (mean over those since the last such line), ``learning_rate`` (now).
* ``layers``: ``task``, ``layers`` {layer: {quantity: value}}.
* ``round``, in a federation: ``task``, ``round`` (from 1), ``train_loss``, ``clients`` (sampled),
  ``dropped``, ``steps``, ``bytes_down``, ``bytes_up``, ``client_seconds``, ``seconds``.
* ``forget``, of a stream with requests to forget: ``request`` (met so far, 0 before the first),
  ``task``, ``scores`` {task: value} and ``forgotten`` {request: value} on what each names, all of
  them every time; ``details`` as above. Requests are no columns of the matrix.
* ``prequential``, of a stream that is tested first: ``task``, ``position`` (samples of the task),
  ``answered`` (of the run), ``accuracy``, ``window``, ``faded``, ``kappa``, ``state_bytes``,
  ``predict_seconds``, ``learn_seconds``.
* ``federation``, after a task of one: ``task``, ``partition`` (hash of the split), ``holders``,
  ``population``, ``rounds``, bytes of all clients (``model_down``, ``model_up``,
  ``statistics_up``, ``memory_down``), ``client_seconds``.
* ``clients``, after a task of one: ``task``, ``forgetting`` and ``newest`` (score on the task just
  learned), each a list by client, and ``summary`` {quantity: value}.
* ``probe``: ``probe`` (``curve``, ``dynamics``, ``alignment``, ``landscape``, ``connectivity``,
  ``general_text``, ``general``, ``divergence``, ``cost``), ``task``, ``values`` (nested, by task
  name) and what else the probe tells; see :mod:`cl_bench.experiment.probes`.

Tasks are indices from 0; a number that is not finite is null. A run that is resumed drops the
events after its checkpoint and writes them again: apart from times they are equal. Those that
were dropped stand in ``resumes.jsonl``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from cl_bench.tracking.files import digest


class Events(ABC):
    """Writes events that need nothing but a line."""

    @abstractmethod
    def _event(self, event: str, **fields: Any) -> None:
        """Append a line."""

    def guards(
        self,
        share: float,
        trained: int,
        unprotected: Mapping[str, int],
        per_task: Mapping[str, int],
    ) -> None:
        """What the strategy guards; see :class:`cl_bench.learners.guards.Guards`."""
        self._event(
            "guards",
            share=share,
            trained=trained,
            unprotected=dict(unprotected),
            per_task=dict(per_task),
        )

    def epoch(
        self,
        task: int,
        epoch: int,
        train_loss: float,
        learning_rate: float,
        seconds: float,
        steps: int,
        phase: str | None = None,
        **more: float,
    ) -> None:
        """One epoch of training on the task with index ``task``; epochs count from 1.

        Those of a ``phase`` after the task's own training are counted apart, and named.
        """
        self._event(
            "epoch",
            task=task,
            epoch=epoch,
            train_loss=train_loss,
            learning_rate=learning_rate,
            seconds=seconds,
            steps=steps,
            **({} if phase is None else {"phase": phase}),
            **more,
        )

    def steps(
        self, task: int, batches: int, train_loss: float, learning_rate: float, phase: str | None
    ) -> None:
        """The mean loss of the latest batches of a task, of which ``batches`` were learned."""
        values = {"train_loss": train_loss, "learning_rate": learning_rate}
        named = {} if phase is None else {"phase": phase}
        self._event("steps", task=task, batches=batches, **values, **named)

    def weights(self, learned: int, file: str, content: bytes) -> None:
        """That the network's weights after ``learned`` tasks were written to ``file``."""
        sizes = {"bytes": len(content), "sha256": digest(content)}
        self._event("weights", learned=learned, file=file, **sizes)

    def round(self, task: int, round: int, **measured: float) -> None:
        """A round of a federation on the task with index ``task``; rounds count from 1."""
        self._event("round", task=task, round=round, **measured)

    def prequential(self, task: int, position: int, **measured: float) -> None:
        """Where a stream that is tested first stands, after so many samples of a task."""
        self._event("prequential", task=task, position=position, **measured)

    def forget(self, request: int, task: int, **measured: Any) -> None:
        """Scores after ``request`` requests to forget; 0 is before the first."""
        self._event("forget", request=request, task=task, **measured)

    def federation(self, task: int, **facts: Any) -> None:
        """How a federation learned a task, and what it cost."""
        self._event("federation", task=task, **facts)

    def clients(
        self,
        task: int,
        forgetting: Sequence[float],
        newest: Sequence[float],
        summary: Mapping[str, float],
    ) -> None:
        """What single clients gained and lost by a task; in lists by client."""
        lists = {"forgetting": list(forgetting), "newest": list(newest)}
        self._event("clients", task=task, **lists, summary=dict(summary))

    def probe(self, probe: str, task: int, values: Mapping[str, Any], **details: Any) -> None:
        """What a probe measured during or after the task with index ``task``.

        Args:
            probe: its name.
            task: index of the task that is learned.
            values: numbers, nested by task name.
            details: anything else, such as ``step`` and ``seconds``.
        """
        self._event("probe", probe=probe, task=task, values=dict(values), **details)

    def status(self, status: str, **details: Any) -> None:
        """Anything that happened to the run as a whole."""
        self._event("status", status=status, **details)
