"""The compiled loops come when they are needed, say so, and can be taken away."""

import os
import subprocess
import sys

import pytest
import torch

from projunn_manifold import warm_up
from projunn_manifold.linalg import products

NEEDED = pytest.mark.skipif(products.compiled is None, reason="needs numba")

STEP = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, format="%(name)s|%(levelname)s|%(message)s")
{before}
from projunn_manifold import UnitaryLowRank
assert "numba" not in sys.modules or sys.modules["numba"] is None
manifold = UnitaryLowRank(1)
x = manifold.random(9, 9, dtype=torch.float64)
for _ in range(3):
    manifold.step_(x, torch.ones(9, 9, dtype=torch.float64), 0.1)
assert torch.dist(x.mT @ x, torch.eye(9)) < 1e-12
{after}
"""


def run(before="", after="", script=STEP, **variables):
    """Run a program and return what it has logged."""
    script = script.format(before=before, after=after)
    environment = {key: value for key, value in os.environ.items() if key != "PROJUNN_MANIFOLD_LOOPS"} | variables
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=240, env=environment
    )
    assert result.returncode == 0, result.stderr
    return [line for line in result.stderr.splitlines() if line.startswith("projunn_manifold|")]


def test_a_variable_takes_them_away():
    [line] = run(after='assert "numba" not in sys.modules', PROJUNN_MANIFOLD_LOOPS="0")
    assert "PROJUNN_MANIFOLD_LOOPS=0" in line


def test_what_is_missing_is_said_once():
    [line] = run(before='sys.modules["numba"] = None')
    assert "numba is not installed" in line
    assert "pip install" in line


@NEEDED
def test_numba_that_compiles_nothing_is_not_used():
    [line] = run(NUMBA_DISABLE_JIT="1")
    assert "NUMBA_DISABLE_JIT" in line


FIRST = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, format="%(name)s|%(levelname)s|%(message)s")
from projunn_manifold.linalg.products import matrix
for n in (8, 9):
    matrix(torch.eye(n)).add_product_(torch.ones(n, 1), torch.ones(n, 1))
"""


@NEEDED
def test_compilation_is_said_once_and_only_where_there_is_no_machine_code(tmp_path):
    [line] = run(script=FIRST, NUMBA_CACHE_DIR=str(tmp_path))
    assert "compiling loops" in line
    assert run(script=FIRST, NUMBA_CACHE_DIR=str(tmp_path)) == []


WARM = """
import logging, sys, torch, geoopt
logging.basicConfig(level=logging.INFO, format="%(name)s|%(levelname)s|%(message)s")
from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact, optim, warm_up
state = torch.get_rng_state()
warm_up()
assert torch.equal(torch.get_rng_state(), state)
from projunn_manifold.linalg import kernels

def machine_code():
    return {{name: len(found.signatures) for name, found in vars(kernels).items() if hasattr(found, "signatures")}}

before = machine_code()
assert sum(before.values()) > 3
for shape in ((20, 20), (3, 20, 20), (30, 20)):
    for k in (1, 2, 8):
        for make in (optim.RiemannianSGD, optim.RiemannianAdam, geoopt.optim.RiemannianAdam):
            manifold = UnitaryLowRankExact(k)
            several = [geoopt.ManifoldParameter(manifold.random(*shape), manifold=manifold) for _ in range(2)]
            for p in several:
                p.grad = torch.randn(*shape)
            make(several, lr=0.1).step()
            make(several[:1], lr=0.1).step()
assert machine_code() == before, (before, machine_code())
"""


@NEEDED
def test_after_a_warm_up_no_step_compiles():
    lines = run(script=WARM)
    assert "torch.float32 are ready" in lines[-1]
    assert all("compiling" in line for line in lines[:-1])


def test_a_warm_up_refuses_what_has_no_loops():
    with pytest.raises(TypeError, match=r"float16.*autocast"):
        warm_up(torch.float32, torch.float16)
    with pytest.raises(TypeError, match=r"dtypes, such as torch.float32, got 'float32'"):
        warm_up("float32")
    with pytest.raises(ValueError, match="k must be an int >= 1, got 0"):
        warm_up(k=(1, 0))
