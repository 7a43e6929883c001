"""Under torch.compile: pure functions, and forward and backward of layers, are one graph; steps are made outside it.

What is compiled is compared with itself uncompiled: to rounding where torch makes other operators of it, and to the
last bit where it is not compiled at all.
"""

import copy
import shutil

import geoopt
import pytest
import torch
import torch.distributed as dist
from helpers import bound, error

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact, distributed, layers, optim, projunn_d, projunn_t
from projunn_manifold.optim.constrained import raw_step_
from projunn_manifold.sketching.factored_tensor import FactoredTensor

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


IGNORED = pytest.mark.filterwarnings(  # torch's own, while it compiles
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
    "ignore:<class 'torch.autograd.function.Function'> should not be instantiated:DeprecationWarning",
)


# -- layers: forward and backward are one graph --------------------------------------------------------------------

WIDE = 64  # here the gradient of a weight is kept, uncompiled, as the factors that it is the product of
LAYERS = {
    "linear": (lambda dtype: layers.UnitaryLinear(8, 8, dtype=dtype), (5, 8)),
    "wide linear": (lambda dtype: layers.UnitaryLinear(8, 5, dtype=dtype), (5, 8)),
    "converted": (lambda dtype: layers.unitary_(torch.nn.Linear(8, 8, dtype=dtype)), (5, 8)),
    "modrelu": (lambda dtype: layers.ModReLU(8, dtype=dtype), (5, 8)),
    "cell": (lambda dtype: layers.UnitaryRNNCell(3, 8, dtype=dtype), (5, 3)),
    "two-layer network": (lambda dtype: layers.UnitaryRNN(3, 8, 2, "tanh", dtype=dtype), (4, 5, 3)),
    "network of two directions": (
        lambda dtype: layers.UnitaryRNN(3, 8, 2, dtype=dtype, bidirectional=True),
        (4, 5, 3),
    ),
    "network of a function": (lambda dtype: layers.UnitaryRNN(3, 8, nonlinearity=torch.sin, dtype=dtype), (4, 5, 3)),
    "wide network": (lambda dtype: layers.UnitaryRNN(3, WIDE, dtype=dtype), (4, 5, 3)),
    "convolution": (lambda dtype: convolution(dtype)(3, 4, image_size=6, dtype=dtype), (2, 3, 6, 6)),
    "strided convolution": (
        lambda dtype: convolution(dtype)(4, 4, image_size=6, stride=2, groups=2, dtype=dtype),
        (2, 4, 6, 6),
    ),
    "wide convolution": (lambda dtype: convolution(dtype)(WIDE, WIDE, image_size=3, dtype=dtype), (2, WIDE, 3, 3)),
    "exponential": (lambda dtype: layers.ExpConv2d(2, image_size=6, kernel_size=3, dtype=dtype), (2, 2, 6, 6)),
    "exponential, one channel": (
        lambda dtype: layers.ExpConv1d(1, image_size=6, kernel_size=3, dtype=dtype),
        (2, 1, 6),
    ),
    "convolutional network": (
        lambda dtype: layers.UnitaryConvRNN(1, image_size=6, kernel_size=3, dtype=dtype),
        (3, 2, 1, 6, 6),
    ),
}


def convolution(dtype: torch.dtype) -> type:
    return layers.UnitaryConv2d if dtype.is_complex else layers.OrthogonalConv2d


def forward_and_backward(function, module, x):
    """Return the output and the gradients of input and parameters."""
    x = x.clone().requires_grad_()
    output = function(x)
    output = output[0] if isinstance(output, tuple) else output
    inputs = [x, *module.parameters()]
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    gradients = torch.autograd.grad((output * weights).real.sum(), inputs)
    return [output.detach(), *gradients]


def largest_difference(found, expected):
    return max(((f - e).abs().max() / e.abs().max().clamp_min(1)).item() for f, e in zip(found, expected, strict=True))


@IGNORED
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128], ids=str)
def test_forward_and_backward_of_layers_are_one_graph(draw, name, dtype):
    torch.compiler.reset()
    make, shape = LAYERS[name]
    module, x = make(dtype), draw.matrix(*shape, dtype=dtype)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found, expected = forward_and_backward(compiled, module, x), forward_and_backward(module, module, x)
    assert largest_difference(found, expected) <= bound(dtype)
    assert not any(isinstance(t, FactoredTensor) for t in found)
    assert any(isinstance(t, FactoredTensor) for t in expected) is (name in ("wide network", "wide convolution"))


@IGNORED
@pytest.mark.parametrize("batch_first", [False, True])
def test_states_of_a_compiled_network_may_be_changed_in_place(draw, batch_first):
    torch.compiler.reset()
    network = layers.UnitaryRNN(3, 8, nonlinearity="relu", batch_first=batch_first)
    x = draw.matrix(4, 5, 3, dtype=torch.float32)

    def changed(x):
        return torch.nn.functional.relu(network(x)[0].add_(-0.1), inplace=True)

    compiled = torch.compile(changed, fullgraph=True, backend="aot_eager")
    found = forward_and_backward(compiled, network, x)
    expected = forward_and_backward(lambda x: (network(x)[0] - 0.1).relu(), network, x)
    assert largest_difference(found, expected) <= bound(torch.float32)


@IGNORED
def test_layers_for_several_grids_are_one_graph_for_any_batch(draw):
    torch.compiler.reset()
    module = torch.nn.Sequential(
        layers.OrthogonalConv2d(2, 2, image_size=4), layers.OrthogonalConv2d(2, 8, image_size=4, stride=2)
    )
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for batch in (1, 2, 5):
        x = draw.matrix(batch, 2, 4, 4, dtype=torch.float32)
        assert largest_difference([compiled(x)], [module(x)]) <= bound(torch.float32)


@COMPILER
@pytest.mark.parametrize(
    "name",
    ["linear", "convolution", *(pytest.param(n, marks=pytest.mark.slow) for n in ("wide network", "exponential"))],
)
@pytest.mark.filterwarnings("ignore")  # inductor's own, about its own deprecations and complex numbers
def test_inductor_compiles_layers(draw, name):
    torch.compiler.reset()
    make, shape = LAYERS[name]
    module, x = make(torch.float32), draw.matrix(*shape, dtype=torch.float32)
    compiled = torch.compile(module, fullgraph=True)
    found, expected = forward_and_backward(compiled, module, x), forward_and_backward(module, module, x)
    assert largest_difference(found, expected) <= bound(torch.float32)


# -- steps: those of the optimiser that is not compiled ------------------------------------------------------------


def constrained(kind, **options):
    def make(parameters):
        optimizer = kind(parameters, lr=0.01, **options)
        optim.constrain(optimizer, feedback=True)
        return optimizer

    return make


OPTIMIZERS = {
    "geoopt SGD": lambda ps: geoopt.optim.RiemannianSGD(ps, lr=0.1),
    "geoopt SGD with momentum": lambda ps: geoopt.optim.RiemannianSGD(ps, lr=0.1, momentum=0.9, stabilize=2),
    "geoopt Adam": lambda ps: geoopt.optim.RiemannianAdam(ps, lr=0.1, stabilize=2),
    "SGD": lambda ps: optim.RiemannianSGD(ps, lr=0.1),
    "SGD with momentum": lambda ps: optim.RiemannianSGD(ps, lr=0.1, momentum=0.9),
    "Adam": lambda ps: optim.RiemannianAdam(ps, lr=0.1),
    "constrained SGD": constrained(torch.optim.SGD, momentum=0.9),
    "constrained RMSprop": constrained(torch.optim.RMSprop),
    "constrained Adam": constrained(torch.optim.Adam),
}
#: Those of which torch compiles its own part, and how far that may be from the eager one in double precision: compiled,
#: torch's Adam counts its steps in a float32 tensor, and so has its bias corrections in single precision.
COMPILED_IN_PART = {
    "constrained SGD": bound(torch.float64),
    "constrained RMSprop": bound(torch.float64),
    "constrained Adam": bound(torch.float32),
}


def problem(draw, dtype, manifold=UnitaryLowRank):
    """Return a function that makes parameters, two that share a manifold and one that has none, and a loss of them."""
    starts = [draw.point(8, 8, dtype=dtype), draw.point(9, 4, dtype=dtype), draw.matrix(3, dtype=dtype)]
    targets = [draw.matrix(*x.shape, dtype=dtype) for x in starts]

    def start():
        shared = manifold(k=1)
        points = [geoopt.ManifoldParameter(x.clone(), manifold=shared) for x in starts[:2]]
        parameters = [*points, torch.nn.Parameter(starts[2].clone())]
        return parameters, lambda: sum((p - t).abs().square().sum() for p, t in zip(parameters, targets, strict=True))

    return start


def train(optimizer, loss, compiled, count=3):
    """Make steps, of which torch.compile has the whole, the optimiser's part, that with a closure, or nothing."""
    step = optimizer.step if compiled in ("nothing", "whole") else torch.compile(optimizer.step, backend="aot_eager")

    def gradients():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    def whole():
        gradients()
        optimizer.step()

    whole = torch.compile(whole, backend="aot_eager") if compiled == "whole" else whole
    for _ in range(count):
        if compiled == "step":
            gradients()
            step()
        elif compiled == "closure":
            assert step(gradients) > 0
        else:
            whole()


@IGNORED
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("compiled", "dtype"),
    [
        ("step", torch.float64),
        ("whole", torch.complex128),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("step", torch.complex128), ("whole", torch.float64)]
        ),
        *(pytest.param("closure", dtype, marks=pytest.mark.slow) for dtype in (torch.float64, torch.complex128)),
    ],
    ids=str,
)
def test_compiled_steps_are_those_that_are_not(draw, name, dtype, compiled):
    torch.compiler.reset()
    start, ends = problem(draw, dtype), []
    for how in (compiled, "nothing"):
        parameters, loss = start()
        train(OPTIMIZERS[name](parameters), loss, how)
        ends.append(parameters)
    for found, expected in zip(*ends, strict=True):
        assert (found - expected).abs().max() <= COMPILED_IN_PART.get(name, 0)
    assert [parameters[0].manifold.draws()[1] for parameters in ends] == [6] * 2


METHODS = {
    "egrad2rgrad": lambda manifold, x, u, v: manifold.egrad2rgrad(x, u).clone(),
    "retr": lambda manifold, x, u, v: manifold.retr(x, u),
    "expmap": lambda manifold, x, u, v: manifold.expmap(x, u),
    "retr_transp": lambda manifold, x, u, v: manifold.retr_transp(x, u, v)[1],
    "expmap_transp": lambda manifold, x, u, v: manifold.expmap_transp(x, u, v)[1],
    "transp_follow_retr": lambda manifold, x, u, v: manifold.transp_follow_retr(x, u, v),
    "transp_follow_expmap": lambda manifold, x, u, v: manifold.transp_follow_expmap(x, u, v),
    "step_": lambda manifold, x, u, v: manifold.step_(x, u, 0.1),
    "retr_transp_": lambda manifold, x, u, v: manifold.retr_transp_(x, u, v, scale=-0.1),
    "raw_step_": lambda manifold, x, u, v: raw_step_(manifold, x, u, v),
    "correct_": lambda manifold, x, u, v: manifold.correct_(x),
}


@IGNORED
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_methods_that_make_steps_are_called_as_they_are(draw, name):
    torch.compiler.reset()
    dtype = torch.complex128
    given, ends = [draw.point(9, 9, dtype=dtype) * (1 + 1e-9), *(draw.matrix(9, 9, dtype=dtype) for _ in "uv")], []
    for compiled in (True, False):
        manifold, (x, u, v) = UnitaryLowRank(k=2, sweep=1), [t.clone() for t in given]

        def twice(x, u, v, manifold=manifold):
            return METHODS[name](manifold, METHODS[name](manifold, 2 * x - x, u, v), u, v) * 2

        y = (torch.compile(twice, backend="aot_eager") if compiled else twice)(x, u, v)
        ends.append((y, manifold.draws(), manifold.pop_faults()))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


MANIFOLDS = {
    "exact": UnitaryLowRankExact(k=1),
    "dense": UnitaryLowRank(k=None),
    "scaled": geoopt.Scaled(UnitaryLowRank(k=1), 2.0),
    "product": geoopt.ProductManifold((UnitaryLowRank(k=1), (6, 6)), (UnitaryLowRank(k=1), (5, 5))),
}


@IGNORED
@pytest.mark.parametrize("name", MANIFOLDS)
def test_compiled_steps_on_manifolds_of_other_kinds(draw, name):
    torch.compiler.reset()
    x, y, ends = draw.point(6, 6, dtype=torch.float64), draw.point(5, 5, dtype=torch.float64), []
    for how in ("step", "nothing"):
        manifold = copy.deepcopy(MANIFOLDS[name])
        p = geoopt.ManifoldParameter(manifold.pack_point(x, y) if name == "product" else x.clone(), manifold=manifold)
        target = torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view_as(p)
        train(geoopt.optim.RiemannianAdam([p], lr=0.1), lambda p=p, target=target: (p * target).sin().sum(), how)
        ends.append(p)
    assert (ends[0] - ends[1]).abs().max() <= bound(torch.float64)


@pytest.mark.parametrize("name", ["geoopt SGD", "SGD", "constrained RMSprop"])
def test_steps_stay_on_the_manifold_beyond_the_limit_of_graphs(draw, name):
    torch.compiler.reset()
    start = problem(draw, torch.float64)
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        parameters, loss = start()
        train(OPTIMIZERS[name](parameters), loss, "step", count=1)
        gram = parameters[0].detach().mT @ parameters[0].detach()
        assert error(gram, torch.eye(8, dtype=torch.float64)) <= bound(torch.float64)


@pytest.mark.parametrize("name", ["geoopt SGD", "SGD", "constrained RMSprop"])
def test_a_step_is_no_graph_and_says_so(draw, name):
    torch.compiler.reset()
    parameters, loss = problem(draw, torch.float64)()
    optimizer = OPTIMIZERS[name](parameters)
    loss().backward()
    with pytest.raises(RuntimeError, match=r"_call|_move_all_|_remember"):
        torch.compile(lambda: optimizer.step(), fullgraph=True, backend="aot_eager")()


def test_steps_of_other_optimisers_are_not_interrupted(draw):
    torch.compiler.reset()
    UnitaryLowRank(k=1)  # watches all optimisers
    w = torch.nn.Parameter(draw.matrix(4, 4, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=0.5)
    w.grad, expected = torch.ones_like(w).detach(), w.detach() - 0.5
    torch._dynamo.utils.counters.clear()
    torch.compile(lambda: optimizer.step(), backend="eager")()
    assert torch.equal(w.detach(), expected)
    assert not [reason for reason in torch._dynamo.utils.counters["graph_break"] if "projunn_manifold" in reason]


def test_compiled_steps_exchange_sketches(draw):
    torch.compiler.reset()
    x, ends = draw.point(8, 8, dtype=torch.float64), []
    target = draw.matrix(8, 8, dtype=torch.float64)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for how in ("step", "nothing"):
            module = layers.unitary_(torch.nn.Linear(8, 8, bias=False, dtype=x.dtype))
            with torch.no_grad():
                module.weight.copy_(x)
            optimizer = optim.RiemannianSGD(module.parameters(), lr=0.1)
            _, exchange = distributed.data_parallel(module, optimizer)
            train(optimizer, lambda p=module.weight: (p - target).square().sum(), how)
            ends.append((module.weight.detach(), exchange.bytes))
    finally:
        dist.destroy_process_group()
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1] > 0
