"""The convolution exponential: the dense exponential of the (block-)circulant matrix, to 1e-12 in double precision."""

import pytest
import torch
from torch import nn

from projunn_manifold.layers import (
    ExpConv1d,
    ExpConv2d,
    UnitaryConvRNN,
    UnitaryConvRNNCell,
    conv_exponential,
    squash,
)

CASES = [
    (1, (5,), (3,)),
    (1, (6,), (6,)),
    (3, (4,), (3,)),
    (1, (4, 5), (3, 2)),
    (2, (3, 4), (3, 4)),
    (2, (4, 4), (1, 1)),
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def circulant(kernel, size):
    """The dense matrix of torch's circular convolution with a kernel whose centre is at (side - 1) // 2."""
    channels = len(kernel)
    points = torch.eye(channels * torch.tensor(size).prod().item(), dtype=kernel.dtype).view(-1, channels, *size)
    for axis, side in enumerate(kernel.shape[2:]):
        indices = torch.arange(-((side - 1) // 2), size[axis] + side - 1 - (side - 1) // 2) % size[axis]
        points = points.index_select(2 + axis, indices)
    convolve = {1: nn.functional.conv1d, 2: nn.functional.conv2d}[len(size)]
    return convolve(points, kernel).flatten(1).T


@pytest.mark.parametrize(("channels", "size", "kernel_size"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_it_is_the_dense_exponential(channels, size, kernel_size, dtype):
    kernel = torch.randn(channels, channels, *kernel_size, dtype=dtype)
    a = circulant(kernel, size)
    expected = torch.linalg.matrix_exp((a - a.mH) / 2)
    u = conv_exponential(kernel, size)
    assert u.dtype == dtype
    assert (circulant(u, size) - expected).abs().max() <= 1e-12
    assert (expected.mH @ expected - torch.eye(len(a))).abs().max() <= 1e-12


@pytest.mark.parametrize(("channels", "size", "kernel_size"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_its_derivatives_are_those_of_the_dense_exponential(channels, size, kernel_size, dtype):
    kernel = torch.randn(channels, channels, *kernel_size, dtype=dtype, requires_grad=True)
    weights = torch.randn(len(circulant(kernel, size)), len(circulant(kernel, size)), dtype=dtype)
    a = circulant(kernel, size)
    (expected,) = torch.autograd.grad((torch.linalg.matrix_exp((a - a.mH) / 2) * weights).real.sum(), kernel)
    (found,) = torch.autograd.grad((circulant(conv_exponential(kernel, size), size) * weights).real.sum(), kernel)
    assert (found - expected).abs().max() <= 1e-11


def test_the_written_derivative_has_derivatives():
    kernel = torch.randn(1, 1, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda k: conv_exponential(k, 4), kernel)
    assert torch.autograd.gradgradcheck(lambda k: conv_exponential(k, 4), kernel)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("layer", "size"), [(ExpConv1d, 7), (ExpConv2d, (4, 5))], ids=str)
def test_the_layer_convolves_with_its_kernel_and_keeps_norms(dtype, channels, layer, size):
    conv = layer(channels, image_size=size, kernel_size=3, dtype=dtype)
    x = torch.randn(2, channels, *conv.image_size, dtype=dtype)
    y = conv(x)
    u = circulant(conv.kernel(), conv.image_size)
    assert torch.allclose(y.flatten(1), x.flatten(1) @ u.T, atol=1e-12)
    assert torch.allclose(conv(x, conv.blocks()), y)
    assert y.norm().item() == pytest.approx(x.norm().item())
    y.abs().sum().backward()
    assert conv.generator.grad.abs().max() > 0


def test_the_network_is_its_cell_step_by_step():
    network = UnitaryConvRNN(2, image_size=(4, 5), kernel_size=3)
    cell = UnitaryConvRNNCell(2, image_size=(4, 5), kernel_size=3)
    cell.load_state_dict(network.state_dict())
    x = torch.randn(6, 3, 2, 4, 5, dtype=torch.complex64)
    states, last = network(x)
    z = torch.zeros_like(x[0])
    for t, of_step in enumerate(x):
        z = cell(of_step, z)
        assert torch.allclose(states[t], z, atol=1e-6)
    assert torch.equal(last, states[-1])
    assert torch.allclose(network(x[3:], states[2])[1], last, atol=1e-6)
    assert (states.abs() < 1).all()
    assert network(x.real)[0].dtype == torch.complex64


def test_squash_keeps_phases():
    z = torch.randn(100, dtype=torch.complex128)
    assert torch.allclose(squash(z), z / (1 + z.abs() ** 2).sqrt())
    assert torch.allclose(squash(z.real), z.real / (1 + z.real**2).sqrt())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: conv_exponential(torch.zeros(1, 2, 3), 4), r"\(C, C, \*kernel_size\)"),
        (lambda: conv_exponential(torch.zeros(1, 1, 5), 4), "does not fit"),
        (lambda: ExpConv2d(1, image_size=(4, 4, 4)), "2 of them"),
        (lambda: ExpConv2d(1, image_size=4, kernel_size=5), "does not fit"),
        (lambda: ExpConv2d(1, image_size=4)(torch.zeros(1, 1, 4, 5)), r"\(1, 4, 4\)"),
        (lambda: UnitaryConvRNN(1, image_size=4)(torch.zeros(0, 1, 1, 4, 4)), "at least one time step"),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "build",
    [lambda: ExpConv2d(2, image_size=4, kernel_size=3, dtype=torch.complex64), lambda: UnitaryConvRNN(1, image_size=4)],
)
@pytest.mark.parametrize("convert", [lambda layer: layer.double(), lambda layer: layer.to(torch.float64)])
def test_conversions_keep_complex_numbers(build, convert):
    layer = build()
    values = [p.detach().clone() for p in layer.parameters()]
    for p, value in zip(convert(layer).parameters(), values, strict=True):
        assert torch.equal(p, value.to(torch.complex128))
        assert p.dtype is torch.complex128


@pytest.mark.parametrize(("arguments", "kind"), [((0, 4), ValueError), ((1, 4, 0), ValueError), ((1, 0), ValueError)])
def test_sizes_that_are_none_are_refused(arguments, kind):
    names = ("channels", "image_size", "kernel_size")
    with pytest.raises(kind, match="int >= 1"):
        ExpConv2d(**dict(zip(names, arguments, strict=False)))


def test_a_dtype_that_has_no_transform_is_refused():
    with pytest.raises(TypeError, match="float16"):
        ExpConv2d(1, image_size=4, dtype=torch.float16)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_forward_in_single(draw, channels, dtype):
    layer = ExpConv2d(channels, image_size=(4, 5), kernel_size=3)
    x = draw.matrix(2, channels, 4, 5, dtype=torch.float32)
    y = layer(x)
    found = layer.to(dtype)(x.to(dtype))
    assert found.dtype == layer.kernel().dtype == dtype
    assert torch.allclose(found.float(), y, atol=20 * torch.finfo(dtype).eps)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap, in its own words
def test_one_channel_under_transforms_is_its_operators(draw):
    """Not the autograd function, which knows neither vmap nor forward derivatives."""
    kernel, v = (draw.matrix(1, 1, 3, dtype=torch.float64) for _ in range(2))

    def whole(kernel):
        return conv_exponential(kernel, 6)

    jacobian = torch.autograd.functional.jacobian(whole, kernel)
    derivative = torch.func.jvp(whole, (kernel,), (v,))[1]
    assert torch.allclose(derivative, (jacobian * v).sum((-3, -2, -1)), atol=1e-12)
    many = torch.vmap(whole)(torch.stack((kernel, v)))
    assert torch.allclose(many, torch.stack((whole(kernel), whole(v))), atol=1e-12)
