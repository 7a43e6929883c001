"""The recurrence as one function: states and all derivatives equal those of a graph of operators for every step."""

import geoopt
import pytest
import torch
from helpers import NewStorages, bound, error

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact, optim
from projunn_manifold.layers.recurrence import NONLINEARITIES, recurrence, step_by_step
from projunn_manifold.sketching.factored_tensor import FactoredTensor
from projunn_manifold.sketching.samplers import SAMPLERS

CASES = [(dtype, name) for dtype in (torch.float32, torch.float64) for name in NONLINEARITIES]
CASES += [(dtype, name) for dtype in (torch.complex64, torch.complex128) for name in ("modrelu", "tanh", "none")]


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
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("kind", ["geoopt sgd", "geoopt momentum", "sgd", "momentum", "adam"])
def test_the_gradient_that_is_never_formed_makes_the_step_of_the_dense_one(draw, variant, sampler, dtype, kind):
    """Same draws, hence the same factors to rounding, in every optimiser."""
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


@pytest.mark.parametrize("name", ["relu", "tanh", "modrelu"])
def test_first_derivatives_do_not_depend_on_create_graph(draw, name):
    """Also where the first state depends on the weight or on the input, as in a loop over a cell or over chunks."""
    given = arguments(draw, torch.float64, name)
    x, h0, weight = given["x"], given["h0"], given["weight"]
    inputs = [x, h0, weight, given["inward"]]

    def chunks(x, h0):
        first = recurrence(**(given | {"x": x[:2], "h0": h0}), nonlinearity=name, factored=False)
        second = recurrence(**(given | {"x": x[2:], "h0": first[-1]}), nonlinearity=name, factored=False)
        return first.sum() + second.square().sum()

    for loss in (chunks(x, h0), chunks(x, h0 + x[0].sum() + weight[0])):
        plain = torch.autograd.grad(loss, inputs, retain_graph=True)
        graph = torch.autograd.grad(loss, inputs, create_graph=True)
        for first, second in zip(plain, graph, strict=True):
            assert torch.allclose(first, second, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 1e-6, 1e-9, 0.0])
@pytest.mark.parametrize("way", ["one function", "steps"])
def test_complex_modrelu_near_zero(draw, way, scale):
    """Where |z| is small beside the bias, its value alone does not tell |z|."""
    z = (draw.matrix(1, 3, 7, dtype=torch.complex64) * scale).requires_grad_()
    eye, zero, bias = (
        torch.eye(7, dtype=torch.complex64),
        torch.zeros(3, 7, dtype=torch.complex64),
        torch.full((7,), 0.1),
    )
    g = draw.matrix(1, 3, 7, dtype=torch.complex64)
    given = z, zero, eye, eye, None, bias
    if way == "steps":  # the cell's
        states = step_by_step(*given, NONLINEARITIES["modrelu"])
    else:
        states = recurrence(*given, "modrelu", factored=False)
    found = torch.autograd.grad(states, z, g)[0]
    wide = [t.detach().to(torch.complex128) for t in (z, zero, eye, eye)]
    wide[0].requires_grad_()
    exact = step_by_step(*wide, None, bias.double(), NONLINEARITIES["modrelu"])
    exact = torch.autograd.grad(exact, wide[0], g.to(torch.complex128))[0]
    assert torch.isfinite(found).all()
    assert (found - exact).abs().max() <= 1e-5 * max(1.0, exact.abs().max().item())


def test_torch_func_takes_the_steps(draw):
    given = arguments(draw, torch.float64, "tanh")
    plain = {key: t if t is None else t.detach() for key, t in given.items()}

    def loss(weight):
        return recurrence(**(plain | {"weight": weight}), nonlinearity="tanh", factored=True).square().sum()

    gradient = torch.func.grad(loss)(plain["weight"])
    exact = torch.autograd.grad(loss(given["weight"]), given["weight"])[0]
    assert error(gradient, exact.clone()) <= 1e3 * bound(torch.float64)
    v = draw.matrix(7, 7, dtype=torch.float64)
    derivative = torch.func.jvp(loss, (plain["weight"],), (v,))[1]
    assert derivative.item() == pytest.approx((gradient * v).sum().item(), rel=1e-9)


def test_changes_to_the_states_after_the_gradient_do_not_reach_it(draw):
    given = arguments(draw, torch.float64, "relu", n=12)
    states = recurrence(**given, nonlinearity="relu", factored=True)
    states.square().sum().backward()
    before = given["weight"].grad.clone()
    with torch.no_grad():
        states.zero_()
    assert torch.equal(given["weight"].grad.clone(), before)


def test_an_empty_batch(draw):
    given = arguments(draw, torch.float64, "modrelu", batch=0)
    states = recurrence(**given, nonlinearity="modrelu", factored=True)
    assert states.shape == (5, 0, 7)
    states.sum().backward()
    assert not given["weight"].grad.any()


@pytest.mark.parametrize("factored", [True, False])
def test_no_gradient_of_the_matrix_is_in_memory(draw, factored):
    n = 512
    w = geoopt.ManifoldParameter(torch.eye(n), manifold=UnitaryLowRank(1))
    x, inward = draw.matrix(3, 2, 4, dtype=torch.float32), draw.matrix(n, 4, dtype=torch.float32).requires_grad_()
    optimizer = optim.RiemannianSGD([w, inward], lr=0.1)
    with NewStorages() as storages:
        states = recurrence(x, x.new_zeros(2, n), inward, w, None, None, "relu", factored=factored)
        states.sum().backward()
        optimizer.step()
    assert (max(storages.sizes) >= 4 * n * n) != factored


@pytest.mark.parametrize(("dtype", "name"), CASES, ids=str)
@pytest.mark.parametrize("factored", [True, False])
def test_changes_to_the_states_before_the_gradient_do_not_reach_it(draw, dtype, name, factored):
    given = arguments(draw, dtype, name)
    found, inputs = [], [t for t in given.values() if t is not None]
    for changed in (True, False):
        states = recurrence(**given, nonlinearity=name, factored=factored)
        loss = states.sum().abs()
        if changed:
            states.detach().zero_()
        found.append(torch.autograd.grad(loss, inputs))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first.clone(), second.clone())


def test_autocast_does_not_reach_the_recurrence(draw):
    given = arguments(draw, torch.float32, "relu")
    expected = recurrence(**given, nonlinearity="relu", factored=False)
    exact = torch.autograd.grad(expected.sum(), given["weight"])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = recurrence(**given, nonlinearity="relu", factored=False)
        assert torch.equal(states, expected)
        assert torch.equal(torch.autograd.grad(states.sum(), given["weight"])[0], exact)
