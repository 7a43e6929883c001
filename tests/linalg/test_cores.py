"""Cores by series are those of eigendecompositions, and what is too long for a series is left to these."""

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers import bound

from projunn_manifold.linalg import cores, products
from projunn_manifold.moves.angle import GEODESIC, POLAR

EPS = bound(torch.float64)
pytestmark = pytest.mark.skipif(products.compiled_loops() is None, reason="needs numba")


@pytest.fixture(autouse=True)
def _loaded():
    products.matrix(torch.eye(2))  # loads the loops


def skew(n, size, dtype, seed=0):
    draw = np.random.default_rng(seed)
    a = draw.standard_normal((n, n)).astype(dtype)
    if np.iscomplexobj(a):
        a += 1j * draw.standard_normal((n, n))
    a = a - a.conj().T
    return a * (size / (np.linalg.norm(a) or 1))  # a real one of one row is zero


def exact(e, polar):
    """f(E) - I by scipy, which knows neither series nor eigenvectors of ours."""
    eye = np.eye(len(e))
    return (scipy.linalg.polar(eye + e)[0] if polar else scipy.linalg.expm(e)) - eye


SIZES = [1e-3, 0.05, 0.5, 0.999]
both = pytest.mark.parametrize("polar", [True, False], ids=["D", "T"])
dtypes = pytest.mark.parametrize("dtype", [np.float64, np.complex128])


@both
@dtypes
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("n", [2, 4, 5, 16])
def test_phases_are_those_of_the_dense_functions(n, size, dtype, polar):
    e = skew(n, size, dtype)
    found = cores.phases(e, polar)
    assert found.dtype == dtype
    assert np.linalg.norm(found - exact(e, polar)) <= EPS
    g = found + np.eye(n)
    assert np.linalg.norm(g.conj().T @ g - np.eye(n)) <= EPS


@both
@dtypes
@pytest.mark.parametrize("size", [1e-12, 1e-5])
def test_small_increments_keep_their_digits(size, dtype, polar):
    e = skew(6, size, dtype)
    series = e + e @ e / 2  # of both, but for the third order
    assert np.linalg.norm(cores.phases(e, polar) - series) <= (EPS + size**2) * size


@both
@dtypes
@pytest.mark.parametrize("scale", [-0.3, 1.0])
@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_the_core_of_rank_k_moves_by_the_dense_function(k, scale, dtype, polar):
    """In an orthonormal basis of [a, X b'] with X b' = Q R, [I, 0; 0, R] F [I, 0; 0, R]^H is f(E) on what S spans."""
    omega, draw = skew(k, 0.2, dtype), np.random.default_rng(1)
    r = np.triu(draw.standard_normal((k, k))).astype(dtype)
    r *= 0.3 / np.linalg.norm(r)
    core = cores.rank_k(omega, r, scale, polar)
    zero = np.zeros((k, k))
    e = scale * np.block([[omega, r.conj().T / 2], [-r / 2, zero]])
    basis = np.block([[np.eye(k), zero], [zero, r]])
    assert np.linalg.norm(basis @ core @ basis.conj().T - exact(e, polar)) <= EPS


@both
def test_what_is_too_long_or_not_finite_is_left_to_eigenvectors(polar):
    e = skew(4, 1.001, np.float64)
    assert cores.phases(e, polar) is None
    assert cores.rank_k(e[:2, :2], np.eye(2), 1.0, polar) is None
    e[0, 1] = np.nan
    assert cores.phases(e, polar) is None


def test_tensors_and_unknown_angles_are_left_to_eigenvectors():
    e = skew(4, 0.1, np.float64)
    assert cores.phases(torch.from_numpy(e), True) is None
    assert cores.phases(e, None) is None
    assert cores.rank_k(e, np.eye(4), torch.ones(()), True) is None
    assert (POLAR.polar, GEODESIC.polar) == (True, False)


def test_any_layout_of_an_array_is_taken():
    e = skew(4, 0.1, np.complex128)
    assert np.array_equal(cores.phases(np.asfortranarray(e), True), cores.phases(e, True))
    assert np.array_equal(cores.phases(np.tile(e, (2, 2))[:4, :4], False), cores.phases(e, False))
