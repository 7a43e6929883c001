"""The pure functions under torch.compile, in one graph and without a warning that matters."""

import shutil

import pytest
import torch
from helpers import bound, error

from projunn_manifold import projunn_d, projunn_t

COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.mark.parametrize("function", [projunn_t, projunn_d])
@pytest.mark.parametrize(("shape", "k"), [((12, 12), 1), ((12, 12), 3), ((14, 6), 2), ((3, 8, 8), 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_functions_trace_as_one_graph(draw, function, shape, k, dtype):
    torch.compiler.reset()
    x, (a, b) = draw.point(*shape, dtype=dtype), draw.factors(shape, k, dtype, norm=0.5)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert error(compiled(x, a, b), function(x, a, b)) <= bound(dtype)


@COMPILER
@pytest.mark.parametrize("function", [projunn_t, projunn_d])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.filterwarnings("ignore")  # inductor's own, about its own deprecations and complex cores
def test_inductor_compiles_them(draw, function, k):
    torch.compiler.reset()
    x, (a, b) = draw.point(16, 16, dtype=torch.float32), draw.factors((16, 16), k, torch.float32, norm=0.5)
    compiled = torch.compile(function, fullgraph=True)
    assert error(compiled(x, a, b), function(x, a, b)) <= bound(torch.float32)
