"""The 8x8 handwritten digits that come with scikit-learn: 1797 images, no download."""

import numpy as np
import torch

from cl_bench.contracts.stream import Origin
from cl_bench.data import digest
from cl_bench.tasks.images.source import ImageSource, measure

ORIGIN = Origin(
    source="UCI Optical Recognition of Handwritten Digits (test part), in scikit-learn",
    licence="CC BY 4.0",
    citation=(
        "E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine "
        "Learning Repository, 1998, doi:10.24432/C50P49"
    ),
)
MAXIMUM = 16


def load_digits() -> ImageSource:
    """Shape (1, 8, 8), 10 classes, 1437 training and 360 test images.

    There is no official split of these images; 20 % of each class are the test data, chosen with a
    constant seed that is part of this data set's definition. Both keep the original order.
    """
    import sklearn.datasets
    from sklearn.model_selection import train_test_split

    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
    )
    pixels = torch.from_numpy(images.astype(np.uint8)).view(-1, 1, 8, 8)
    y = torch.from_numpy(labels.astype(np.int64))
    train_rows, test_rows = (torch.from_numpy(np.sort(rows)) for rows in (train, test))
    data = {
        "train": pixels[train_rows],
        "train_labels": y[train_rows],
        "test": pixels[test_rows],
        "test_labels": y[test_rows],
        "num_classes": torch.tensor(10),
    }
    return ImageSource(
        train=data["train"],
        train_labels=data["train_labels"],
        test=data["test"],
        test_labels=data["test_labels"],
        shape=(1, 8, 8),
        num_classes=10,
        maximum=MAXIMUM,
        moments=measure(data["train"], MAXIMUM),
        fingerprint=digest(data),
        origin=ORIGIN,
    )
