"""A small record, written from beginning to end."""

from cl_bench.tracking import open_record

NAMES = ["perm-1", "perm-2"]
THIRD = 1 / 3


def opened(directory, **options):
    return open_record(directory, NAMES, task_id_known=False, **options)


def learn_everything(record):
    """Two tasks with numbers that a float keeps only if all its digits are written."""
    record.row(row=0, task=None, scores={"perm-1": 0.1, "perm-2": 0.2}, seconds=0.5)
    for task, (old, new) in enumerate([(0.9, 0.3), (THIRD, 0.8)]):
        record.epoch(task=task, epoch=1, train_loss=0.25, learning_rate=0.1, seconds=1.5, steps=7)
        record.layers(task=task, layers={"net.0": {"rank": 3 + task, "share": 0.5}})
        scores = {"perm-1": old, "perm-2": new}
        record.row(row=task + 1, task=task, scores=scores, seconds=0.5)
