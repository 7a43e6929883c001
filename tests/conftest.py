"""One thread, and random numbers of its own for every test."""

import pytest
import torch
from helpers import Draw

torch.set_num_threads(1)  # the matrices are small: a second thread costs more than it saves


@pytest.fixture
def draw(request: pytest.FixtureRequest) -> Draw:
    """Give every test its own reproducible numbers."""
    return Draw(sum(ord(c) * (i + 1) for i, c in enumerate(request.node.name)) % 2**31)
