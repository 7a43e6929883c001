"""Laws that hold for every shape, dtype, rank, scale and memory layout, on inputs chosen by hypothesis."""

import copy

import hypothesis.strategies as st
import pytest
import torch
from helpers import DTYPES, Draw, bound, double, error
from hypothesis import given, settings

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact, projunn_t, reference
from projunn_manifold.sketching.factored_tensor import FactoredTensor
from projunn_manifold.sketching.samplers import SAMPLERS


@st.composite
def cases(draw):
    m = draw(st.integers(1, 9))
    n = m + draw(st.sampled_from([0, 0, 1, 4]))
    batch = draw(st.sampled_from([(), (), (0,), (1,), (3,), (2, 2)]))
    numbers = Draw(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    k = draw(st.sampled_from([1, 2, 3, 12, None]))
    variant = draw(st.sampled_from([UnitaryLowRank, UnitaryLowRankExact]))
    manifold = variant(k, sampler=draw(st.sampled_from(sorted(SAMPLERS))))
    x = numbers.point(*batch, n, m, dtype=dtype)
    rank = draw(st.integers(0, m))
    g = numbers.matrix(*batch, n, rank, dtype=dtype) @ numbers.matrix(*batch, m, rank, dtype=dtype).mH
    g = g * 10.0 ** draw(st.integers(-25, 3))
    if draw(st.booleans()):
        x = x.mT.contiguous().mT
    if draw(st.booleans()):
        g = g.mH.contiguous().mH  # column-major and, for complex numbers, a lazy conjugate
    return manifold, x, g


def stays_on_the_manifold_and_its_tangent_space(case):
    manifold, x, g = case
    if x.numel() == 0:
        with torch.no_grad():
            assert manifold.retr(x, -1.0 * manifold.egrad2rgrad(x, g)).shape == x.shape
        return
    with torch.no_grad():
        u = manifold.egrad2rgrad(x, g)
        dense = u.clone() if isinstance(u, FactoredTensor) else u
        size = float(torch.linalg.matrix_norm(double(g)).max())
        normal = double(x).mH @ double(dense)
        tolerance = bound(x.dtype) * max(size, 1e-300)
        assert error(normal, -normal.mH) <= tolerance
        for step in (-0.1 * u, -0.1 * dense):
            y, carried = manifold.retr_transp(x, step, dense)
            gram = double(y).mH @ double(y)
            assert error(gram, torch.eye(x.shape[-1], dtype=gram.dtype).expand_as(gram)) <= bound(x.dtype, size)
            normal = double(y).mH @ double(carried)
            assert error(normal, -normal.mH) <= tolerance * max(1.0, size)
        lengths = [reference.inner(double(p), double(v), double(v)).sqrt() for p, v in ((x, dense), (y, carried))]
        assert (lengths[0] - lengths[1]).abs().max().item() <= 3 * tolerance * max(1.0, size)


def gradient_and_rate_may_trade_a_factor(case, exponent):
    """A gradient c G at the rate η/c moves X as G does at η, in double precision; c a power of two: no rounding."""
    manifold, x, g = case
    x, g = double(x), double(g)
    if x.numel() == 0:
        return
    size = torch.linalg.matrix_norm(g).max()
    g = g / (size if size else 1.0)
    scale = 2.0**exponent
    y = copy.deepcopy(manifold).step_(x.clone(), g, 0.7)
    assert error(y, manifold.step_(x.clone(), g * scale, 0.7 / scale)) <= 4 * bound(x.dtype)


def commutes_with_changes_of_basis(case, k):
    """projUNN-T: T(P X R, P a, R^H b) = P T(X, a, b) R."""
    x = case[1]
    if x.numel() == 0:
        return
    numbers = Draw(k)
    n, m = x.shape[-2:]
    p, r = numbers.point(n, n, dtype=x.dtype), numbers.point(m, m, dtype=x.dtype)
    a, b = numbers.factors(tuple(x.shape), k, x.dtype, 0.7)
    moved = projunn_t(p @ x @ r, p @ a, r.mH @ b)
    assert error(moved, p @ projunn_t(x, a, b) @ r) <= bound(x.dtype)


FEW = settings(max_examples=300, deadline=None, derandomize=True)
MANY = settings(max_examples=8000, deadline=None, derandomize=True)  # three laws: 24 000 examples
LAWS = {
    stays_on_the_manifold_and_its_tangent_space: (cases(),),
    gradient_and_rate_may_trade_a_factor: (cases(), st.integers(-100, 100)),
    commutes_with_changes_of_basis: (cases(), st.integers(1, 3)),
}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_laws(law):
    FEW(given(*LAWS[law])(law))()


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_laws_on_many_examples(law):
    MANY(given(*LAWS[law])(law))()
