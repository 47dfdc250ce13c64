"""Digits to learn, then requests to forget all images of some of them."""

import torch

from cl_bench.contracts.options import Seed
from cl_bench.contracts.stream import Origin, Stream
from cl_bench.tasks.arguments import require
from cl_bench.tasks.digits import load_digits
from cl_bench.tasks.tensors import Split, TensorTask


class DigitTask(TensorTask):
    """Digits to learn, or to forget.

    Args:
        kind: ``learn`` or ``forget``.
    """

    def __init__(
        self, index: int, name: str, forget: bool, train: Split, test: Split, origin: Origin
    ) -> None:
        super().__init__(
            index, train, test=test, name=name, classes=range(10), origin=origin, task_id=False
        )
        self.kind = "forget" if forget else "learn"


class UnlearnDigits(Stream):
    """scikit-learn's digits: all ten are learned, then some are to be forgotten, one by one.

    What is learned is scored on digits that no request names.

    Args:
        forgotten: digits of the requests, in order.
        order_seed: of the training images.

    Raises:
        UsageError: an argument is out of range.
    """

    def __init__(self, forgotten: tuple[int, ...] = (0, 1, 2), order_seed: Seed = 0) -> None:
        right = len(set(forgotten)) == len(forgotten) < 10 and set(forgotten) <= set(range(10))
        require(
            right and bool(forgotten), "forgotten", list(forgotten), "some of 0 to 9, each once"
        )
        source = load_digits()
        (mean,), (std,) = source.moments.mean, source.moments.std
        sides: list[Split] = []
        for pixels, y in ((source.train, source.train_labels), (source.test, source.test_labels)):
            order = torch.randperm(len(y), generator=torch.Generator().manual_seed(order_seed))
            sides.append(((pixels[order] / source.maximum - mean) / std, y[order]))
        (x, y), (test_x, test_y) = sides
        kept = ~torch.isin(test_y, torch.tensor(forgotten))
        tasks = [DigitTask(0, "digits", False, (x, y), (test_x[kept], test_y[kept]), source.origin)]
        for k, digit in enumerate(forgotten):
            own, tested = y == digit, test_y == digit
            data = (x[own], y[own]), (test_x[tested], test_y[tested])
            tasks.append(DigitTask(1 + k, f"forget_{digit}", True, *data, source.origin))
        fingerprint = f"{source.fingerprint} {list(forgotten)} {order_seed}"
        super().__init__("unlearn_digits", tasks, "domain", source.shape, fingerprint)
