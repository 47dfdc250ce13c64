"""Small generated image data sets on disk, in the formats of the real ones."""

import numpy as np
import torch
from PIL import Image


def everything(data):
    return data[torch.arange(len(data))]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


def make_pixels(count, shape, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (count, *shape), dtype=np.uint8)


def write_folder(root, classes=4, per_class=6, shape=(6, 5, 3), split_sizes=None):
    """An imagefolder data set; returns {split: (n, *shape)} in the order of class, file."""
    written = {}
    for seed, (split, size) in enumerate((split_sizes or {"train": per_class, "test": 2}).items()):
        pixels = make_pixels(classes * size, shape, seed)
        for i, image in enumerate(pixels):
            path = root / split / f"kind{i // size}" / f"{i:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        written[split] = pixels
    return written


def write_parquet(root, labels, shape=(6, 5, 3), names=None, columns=("image", "label")):
    """``train.parquet`` and ``test.parquet`` with the given labels; returns the pixels."""
    import datasets

    root.mkdir(parents=True, exist_ok=True)
    written = {}
    for seed, (split, values) in enumerate(labels.items()):
        pixels = make_pixels(len(values), shape, seed)
        kind = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
        features = datasets.Features({columns[0]: datasets.Image(), columns[1]: kind})
        rows = {columns[0]: [Image.fromarray(p) for p in pixels], columns[1]: list(values)}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(root / f"{split}.parquet")
        written[split] = pixels
    return written
