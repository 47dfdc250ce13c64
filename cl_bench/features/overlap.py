"""How many classes of a stream a backbone has been trained on."""

from typing import Any

from cl_bench.contracts import Stream
from cl_bench.tasks.images.imagenet import CRITERION, SOURCE, among_imagenet

UNKNOWN = "unknown"


def overlap(trained_on: str | None, stream: Stream) -> dict[str, Any] | str:
    """The classes that a stream shares with what a backbone was trained on, for the record.

    ``unknown`` where no list of classes says so.

    Args:
        trained_on: name of a data set.
        stream: whose tasks may tell the names of their classes, and whose facts may tell which data
            sets hold all of them (``classes_of``).
    """
    names = [name for task in stream for name in task.facts.get("class_names", ())]
    held = stream.facts.get("classes_of", {})
    if trained_on in held:
        return {"classes": len(names), "of": len(names), "source": held[trained_on]}
    complete = len(names) == sum(len(task.classes) for task in stream)
    found = among_imagenet(names) if trained_on == "imagenet-1k" and complete else None
    if found is None:
        return UNKNOWN
    shared = [name for name, among in zip(names, found, strict=True) if among]
    return {
        "classes": len(shared),
        "of": len(names),
        "names": shared,
        "criterion": CRITERION,
        "source": SOURCE,
    }
