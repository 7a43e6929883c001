"""One thread, and random numbers of its own for every test."""

import pytest
import torch
from helpers import Draw

from projunn_manifold.linalg import products

products.compiled = products.compiled_loops()  # now, so that tests know whether there are any
torch.set_num_threads(1)  # the matrices are small: a second thread costs more than it saves


@pytest.fixture
def draw(request: pytest.FixtureRequest) -> Draw:
    """Give every test its own reproducible numbers."""
    return Draw(sum(ord(c) * (i + 1) for i, c in enumerate(request.node.name)) % 2**31)


LOOPS = pytest.param(True, marks=pytest.mark.skipif(products.compiled is None, reason="numba is not installed"))


@pytest.fixture(params=[LOOPS, False], ids=["loops", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run a test by the compiled loops, and by PyTorch's own products; tell which."""
    if not request.param:
        monkeypatch.setattr(products, "compiled", None)
    return bool(request.param)
