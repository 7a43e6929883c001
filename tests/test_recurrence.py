"""The recurrence as one function: states and all derivatives equal those of a graph of operators for every step."""

import geoopt
import pytest
import torch
from helpers import bound, error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact, optim, sampling
from projunn_manifold.factors import FactoredTensor
from projunn_manifold.recurrence import NONLINEARITIES, recurrence, step_by_step

CASES = [(dtype, name) for dtype in (torch.float32, torch.float64) for name in NONLINEARITIES]
CASES += [(dtype, name) for dtype in (torch.complex64, torch.complex128) for name in ("modrelu", "none")]


def arguments(draw, dtype, name, *, steps=5, batch=3, m=4, n=7, beta=True):
    real = torch.empty((), dtype=dtype).real.dtype
    tensors = {
        "x": draw.matrix(steps, batch, m, dtype=dtype),
        "h0": draw.matrix(batch, n, dtype=dtype),
        "inward": draw.matrix(n, m, dtype=dtype),
        "weight": draw.point(n, n, dtype=dtype),
        "beta": draw.matrix(n, dtype=dtype) if beta else None,
        "bias": draw.matrix(n, dtype=real) * 0.5 if name == "modrelu" else None,
    }
    return {key: t if t is None else t.requires_grad_() for key, t in tensors.items()}


@pytest.mark.parametrize(("dtype", "name"), CASES, ids=str)
@pytest.mark.parametrize("beta", [True, False])
@pytest.mark.parametrize("steps", [1, 6])
def test_states_and_gradients_are_those_of_the_steps(draw, dtype, name, beta, steps):
    given = arguments(draw, dtype, name, steps=steps, beta=beta)
    states = recurrence(**given, nonlinearity=name, factored=False)
    expected = step_by_step(*given.values(), NONLINEARITIES[name])
    size = max(1.0, states.abs().max().item())
    assert error(states.flatten(0, 1), expected.flatten(0, 1)) <= size * bound(dtype)
    inputs = [t for t in given.values() if t is not None]
    g = draw.matrix(*states.shape, dtype=dtype)
    for found, exact in zip(
        torch.autograd.grad(states, inputs, g), torch.autograd.grad(expected, inputs, g), strict=True
    ):
        assert found.shape == exact.shape
        assert found.dtype == exact.dtype
        assert (found - exact).abs().max() <= bound(dtype) * 20 * max(1.0, exact.abs().max().item())


@pytest.mark.parametrize("name", NONLINEARITIES)
def test_derivatives_of_derivatives(draw, name):
    given = arguments(draw, torch.float64, name, steps=3, batch=2, m=2, n=3)
    if name == "modrelu":
        given["bias"] = (given["bias"].detach().abs() + 0.1).requires_grad_()  # no kink nearby
    inputs = [t for t in given.values() if t is not None]
    keys = [key for key, t in given.items() if t is not None]

    def function(*tensors):
        named = dict.fromkeys(given) | dict(zip(keys, tensors, strict=True))
        return recurrence(**named, nonlinearity=name, factored=False)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("variant", [UnitaryLowRank, UnitaryLowRankExact])
@pytest.mark.parametrize("sampler", ["lsi", "column", "subspace", "svd"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("kind", ["geoopt sgd", "geoopt momentum", "sgd", "momentum", "adam"])
def test_the_gradient_that_is_never_formed_makes_the_step_of_the_dense_one(
    draw, monkeypatch, variant, sampler, dtype, kind
):
    """Same draws, hence the same factors to rounding, in every optimiser; no multiple of X is looked for in them."""
    monkeypatch.setattr(sampling, "without_normal_part", lambda g, x, k: sampling.Dense(g))
    given = arguments(draw, dtype, "modrelu", steps=4, batch=3, n=32)
    g = draw.matrix(4, 3, 32, dtype=dtype)
    points = []
    for factored in (True, False):
        w = geoopt.ManifoldParameter(given["weight"].detach().clone(), manifold=variant(2, sampler=sampler))
        step = {
            "geoopt sgd": lambda w: geoopt.optim.RiemannianSGD([w], lr=0.01),
            "geoopt momentum": lambda w: geoopt.optim.RiemannianSGD([w], lr=0.01, momentum=0.9),
            "sgd": lambda w: optim.RiemannianSGD([w], lr=0.01),
            "momentum": lambda w: optim.RiemannianSGD([w], lr=0.01, momentum=0.9),
            "adam": lambda w: optim.RiemannianAdam([w], lr=0.01),
        }[kind](w).step
        for _ in range(3):
            w.grad = None
            states = recurrence(**(given | {"weight": w}), nonlinearity="modrelu", factored=factored)
            (states * g).real.sum().backward()
            assert isinstance(w.grad, FactoredTensor) == factored
            step()
        points.append(w.detach())
    assert error(*points) <= 1e3 * bound(dtype)


def test_accumulated_clipped_and_read_gradients_are_right(draw):
    given = arguments(draw, torch.float64, "relu", n=12)
    results = []
    for factored in (True, False):
        w = torch.nn.Parameter(given["weight"].detach().clone())
        for _ in range(2):
            states = recurrence(**(given | {"weight": w}), nonlinearity="relu", factored=factored)
            states.square().sum().backward()
            results.append(w.grad.clone())
        norm = torch.nn.utils.clip_grad_norm_([w], 0.5)
        results += [norm[None, None], w.grad.clone(), w.grad.abs(), torch.linalg.svdvals(w.grad)[None]]
        w.grad.zero_()
        assert not w.grad.any()
    half = len(results) // 2
    for found, exact in zip(results[:half], results[half:], strict=True):
        assert torch.allclose(found, exact, rtol=1e-10, atol=1e-10)


class Largest(TorchDispatchMode):
    """Remembers the largest new storage that an operator makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if FactoredTensor in types:
            return NotImplemented  # it has no storage, and its own operators come here in turn
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and not isinstance(t, FactoredTensor):
                storage = t.untyped_storage()
                self.size = max(self.size, storage.nbytes() * (storage.data_ptr() not in known))
        return result


@pytest.mark.parametrize("factored", [True, False])
def test_no_gradient_of_the_matrix_is_in_memory(draw, factored):
    n = 512
    w = geoopt.ManifoldParameter(torch.eye(n), manifold=UnitaryLowRank(1))
    x, inward = draw.matrix(3, 2, 4, dtype=torch.float32), draw.matrix(n, 4, dtype=torch.float32).requires_grad_()
    optimizer = optim.RiemannianSGD([w, inward], lr=0.1)
    with Largest() as largest:
        states = recurrence(x, x.new_zeros(2, n), inward, w, None, None, "relu", factored=factored)
        states.sum().backward()
        optimizer.step()
    assert (largest.size >= 4 * n * n) != factored


def test_the_states_may_not_be_changed_before_the_gradient(draw):
    states = recurrence(**arguments(draw, torch.float64, "tanh"), nonlinearity="tanh", factored=False)
    with torch.no_grad():
        states.zero_()
    with pytest.raises(RuntimeError, match="modified inplace"):
        states.sum().backward()


def test_autocast_does_not_reach_the_recurrence(draw):
    given = arguments(draw, torch.float32, "relu")
    expected = recurrence(**given, nonlinearity="relu", factored=False)
    exact = torch.autograd.grad(expected.sum(), given["weight"])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = recurrence(**given, nonlinearity="relu", factored=False)
        assert torch.equal(states, expected)
        assert torch.equal(torch.autograd.grad(states.sum(), given["weight"])[0], exact)
