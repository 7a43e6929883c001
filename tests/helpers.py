"""What all tests share: the dtypes, shapes and ranks they run over, random points, and the one tolerance.

Points come from a QR in double precision, not from the package; oracles are those of
``projunn_manifold.reference``, evaluated in double precision on the very numbers the code was given.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from projunn_manifold.sketching.factored_tensor import FactoredTensor

ROOT = Path(__file__).parent.parent
DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]

SQUARE = [(1, 1), (2, 2), (9, 9), (24, 24), (3, 12, 12), (2, 2, 6, 6)]
TALL = [(5, 1), (24, 7), (24, 23), (3, 12, 5)]
SHAPES = SQUARE + TALL
GROUPS = ("howto", "concepts", "reference")  # of pages


def page_of(name: str) -> Path:
    """The page of the documentation with this name, whatever its group is."""
    (page,) = (
        ROOT / "docs" / group / f"{name}.md" for group in GROUPS if (ROOT / "docs" / group / f"{name}.md").exists()
    )
    return page


def double(t: torch.Tensor) -> torch.Tensor:
    return t.to(torch.complex128 if t.dtype.is_complex else torch.float64)


def bound(dtype: torch.dtype, norm: float = 1.0, smallest: float = 1.0) -> float:
    """Allowed error in ‖·‖_F/√m: 50 eps, times the step's norm, over the smallest singular value."""
    return 50 * torch.finfo(dtype).eps * max(1.0, norm) / min(1.0, smallest)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest ‖actual - expected‖_F/√m over the batch, in double precision."""
    difference = double(actual) - double(expected)
    return (torch.linalg.matrix_norm(difference) / difference.shape[-1] ** 0.5).max().item()


def norm2(t: torch.Tensor) -> float:
    """Largest spectral norm over the batch."""
    return torch.linalg.matrix_norm(double(t), 2).max().item()


def ranks(shape: tuple[int, ...]) -> list[int]:
    m = shape[-1]
    return sorted({1, 2, 4, max(1, m // 2), m})


class Draw:
    """Random test input from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def matrix(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(*shape, dtype=wide, generator=self.generator).to(dtype)

    def point(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.linalg.qr(double(self.matrix(*shape, dtype=dtype))).Q.to(dtype).contiguous()

    def factors(
        self, shape: tuple[int, ...], k: int, dtype: torch.dtype, norm: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors a, b whose product a b^H has spectral norm ``norm`` in every matrix of the batch."""
        *batch, n, m = shape
        a, b = self.matrix(*batch, n, k, dtype=dtype), self.matrix(*batch, m, k, dtype=dtype)
        size = torch.linalg.matrix_norm(double(a @ b.mH), 2)[..., None, None]
        return (double(a) * (norm / size)).to(dtype), b

    def tangent(self, x: torch.Tensor, norm: float = 1.0) -> torch.Tensor:
        """Full-rank tangent at x of Frobenius norm ``norm``."""
        wide, g = double(x), double(self.matrix(*x.shape, dtype=x.dtype))
        u = g - wide @ (wide.mH @ g + g.mH @ wide) / 2
        return (u * (norm / torch.linalg.matrix_norm(u)[..., None, None].clamp_min(1e-300))).to(x.dtype)


class NewStorages(TorchDispatchMode):
    """Lists the bytes of every storage that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if FactoredTensor in types:
            return NotImplemented  # it has no storage, and its own operators come here in turn
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            is_stored = isinstance(t, torch.Tensor) and not isinstance(t, FactoredTensor)
            if is_stored and t.untyped_storage().data_ptr() not in known:
                self.sizes.append(t.untyped_storage().nbytes())
        return result


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run an example, an experiment or a benchmark in a process of its own."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def recorded(file: Path):
    """Return what a script has left in a file."""
    return json.loads(file.read_text(encoding="utf-8"))
