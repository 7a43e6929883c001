"""Convolutions in the Fourier domain: the operator, not only its blocks, is orthogonal, and is torch's convolution.

Oracles are torch's own circular convolution with the layer's kernel, and the operator's dense matrix, made by pushing
the identity through; in double precision both agree to 1e-10.
"""

import copy
import math

import geoopt
import pytest
import torch
from helpers import bound
from torch import nn

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact, manifolds_of, optim
from projunn_manifold.layers import (
    OrthogonalConv1d,
    OrthogonalConv2d,
    OrthogonalConv3d,
    UnitaryConv1d,
    UnitaryConv2d,
    UnitaryConv3d,
    fourier,
)

REAL = {1: OrthogonalConv1d, 2: OrthogonalConv2d, 3: OrthogonalConv3d}
COMPLEX = {1: UnitaryConv1d, 2: UnitaryConv2d, 3: UnitaryConv3d}
SIZES = [(1,), (2,), (5,), (6,), (4, 6), (5, 4), (3, 3), (2, 1), (2, 4, 6), (3, 2, 5)]
CHANNELS = [(4, 4), (2, 6), (6, 2)]


def signals(layer, batch=3):
    dtype = torch.float64 if isinstance(layer, tuple(REAL.values())) else torch.complex128
    return torch.randn(batch, layer.in_channels, *layer.image_size, dtype=dtype)


def operator(layer):
    """The dense matrix of the layer, without bias."""
    inputs = layer.in_channels * math.prod(layer.image_size)
    x = torch.eye(inputs, dtype=layer._dtype).view(inputs, layer.in_channels, *layer.image_size)
    y = layer(x)
    return (y if layer.bias is None else y - layer.bias.view(-1, *(1,) * layer.dims)).flatten(1).T.detach()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("real", [True, False])
def test_free_frequencies_are_half_of_a_real_grid_and_give_all_the_others(size, real):
    grid = fourier.spectrum(size, real)
    kernel = torch.randn(2, 3, *size, dtype=torch.float64 if real else torch.complex128)
    blocks = fourier.blocks_of_kernel(kernel, grid)
    assert torch.allclose(fourier.kernel_of_blocks(blocks, grid), kernel)
    assert len(grid.paired) * (2 if real else 1) + len(grid.self_conjugate) == math.prod(size)
    assert len(grid.self_conjugate) == (2 ** sum(side % 2 == 0 for side in size) if real else 0)
    free = blocks[torch.cat((grid.paired, grid.self_conjugate))]
    assert torch.allclose(fourier.everywhere(free, grid), blocks)
    if real:
        assert blocks[grid.self_conjugate].imag.abs().max() < 1e-12


STRIDED = [(size, stride) for stride in (1, 2) for size in SIZES if not any(side % stride for side in size)]
STARTS = [
    (size, start)
    for start in ({}, {"init": "identity"}, {"support": 2})
    for size in SIZES
    if start.get("support", 1) <= max(size)
]


@pytest.mark.parametrize(("size", "stride"), STRIDED, ids=str)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("classes", [REAL, COMPLEX], ids=["real", "complex"])
def test_it_is_torchs_circular_convolution_with_its_kernel(size, channels, stride, groups, classes):
    layer = classes[len(size)](*channels, image_size=size, stride=stride, groups=groups, dtype=torch.float64)
    with torch.no_grad():
        layer.bias.copy_(torch.randn_like(layer.bias))
    x = signals(layer).requires_grad_()
    y = layer(x)
    plain = layer.to_plain()
    assert torch.allclose(plain(x), y, atol=1e-10)
    g = torch.randn_like(y)
    stacks = [stack for stack in (layer.weight, layer.weight_real) if stack is not None]
    found = torch.autograd.grad(y, [x, layer.bias, *stacks], g)
    functional = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}[len(size)]
    kernel, pads = layer.kernel(), []
    for side in reversed(size):
        before = (side - 1) // 2 if stride == 1 else (side - stride + 1) // 2
        pads += [before, side - stride - before]
    padded = _padded(x, pads)
    expected_y = functional(padded, kernel, layer.bias, stride=stride, groups=groups)
    expected = torch.autograd.grad(expected_y, [x, layer.bias, *stacks], g)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours + torch.zeros_like(ours), theirs, atol=1e-10)


def _padded(x, pads):
    """Pad circularly, dimension by dimension."""
    for axis in range(len(pads) // 2):
        before, after = pads[2 * axis], pads[2 * axis + 1]
        side = x.shape[-1 - axis]
        indices = torch.arange(-before, side + after) % side
        x = x.index_select(x.dim() - 1 - axis, indices)
    return x


@pytest.mark.parametrize(("size", "start"), STARTS, ids=str)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("classes", [REAL, COMPLEX], ids=["real", "complex"])
def test_the_operator_is_an_isometry_or_the_adjoint_of_one(size, channels, classes, start):
    layer = classes[len(size)](*channels, image_size=size, bias=False, dtype=torch.float64, **start)
    values = torch.linalg.svdvals(operator(layer))
    assert (values - 1).abs().max() < 1e-12
    assert torch.allclose(layer.singular_values(), values, atol=1e-12)
    assert len(layer.singular_values()) == len(values)


@pytest.mark.parametrize("size", [(6,), (5, 4), (4, 4, 3)], ids=str)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("classes", [REAL, COMPLEX], ids=["real", "complex"])
@pytest.mark.parametrize("support", [1, 2, 3])
def test_support_confines_the_first_kernel(size, channels, classes, support):
    layer = classes[len(size)](*channels, image_size=size, dtype=torch.float64, support=support)
    assert layer.support_energy(support).item() == pytest.approx(1)
    if support > 1:
        assert layer.support_energy(support - 1) < 0.999
    spread = classes[len(size)](*channels, image_size=size, dtype=torch.float64)
    (1 - spread.support_energy(2)).backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in spread.parameters())


@pytest.mark.parametrize("classes", [REAL, COMPLEX], ids=["real", "complex"])
@pytest.mark.parametrize("stride", [1, 2])
def test_plain_convolutions_become_the_closest_orthogonal_ones(classes, stride):
    layer = classes[2](4, 8, image_size=(6, 4), stride=stride, groups=2, dtype=torch.float64)
    again = classes[2].from_kernel(layer.kernel(), stride=stride, groups=2)
    assert torch.allclose(again.kernel(), layer.kernel(), atol=1e-10)
    x = signals(layer)
    assert torch.allclose(classes[2].from_plain(layer.to_plain(), (6, 4))(x), layer(x), atol=1e-10)


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 5])
def test_a_small_kernel_is_placed_where_torch_has_it(kernel_size):
    conv = nn.Conv2d(3, 3, kernel_size, padding="same", padding_mode="circular", dtype=torch.float64)
    local = OrthogonalConv2d(3, 3, image_size=6, support=kernel_size, dtype=torch.float64)
    centre, before = local._centre[0], (kernel_size - 1) // 2
    window = slice(centre - before, centre - before + kernel_size)
    with torch.no_grad():
        conv.weight.copy_(local.kernel()[..., window, window])
        conv.bias.zero_()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert torch.allclose(conv(x), local(x), atol=1e-10)
    assert torch.allclose(OrthogonalConv2d.from_plain(conv, 6)(x), local(x), atol=1e-10)


OPTIMIZERS = {
    "RSGD": lambda p: geoopt.optim.RiemannianSGD(p, lr=0.1),
    "in-place RSGD": lambda p: optim.RiemannianSGD(p, lr=0.1, momentum=0.9),
    "RAdam": lambda p: geoopt.optim.RiemannianAdam(p, lr=0.05),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


def singular_values_after(steps, classes, size, variant, name):
    layer = classes[len(size)](3, 3, image_size=size, manifold=variant(1))
    optimizer = OPTIMIZERS[name](layer.parameters())
    if name == "RMSprop":
        optim.constrain(optimizer)
    goal = copy.deepcopy(layer)
    goal.reset_parameters()
    for _ in range(steps):
        x = torch.randn(4, 3, *size, dtype=layer._dtype)
        optimizer.zero_grad()
        (layer(x) - goal(x).detach()).abs().square().mean().backward()
        optimizer.step()
    layer.bias = None
    return torch.linalg.svdvals(operator(layer).to(torch.complex128))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("variant", [UnitaryLowRank, UnitaryLowRankExact])
@pytest.mark.parametrize("size", [(7,), (4, 5), (2, 4, 2)], ids=str)
def test_training_leaves_the_operator_orthogonal(name, variant, size):
    for classes in (REAL, COMPLEX):
        values = singular_values_after(40, classes, size, variant, name)
        assert (values - 1).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("variant", [UnitaryLowRank, UnitaryLowRankExact])
@pytest.mark.parametrize("size", [(16,), (17,), (8, 8), (9, 7), (4, 4, 4), (3, 5, 3)], ids=str)
def test_a_thousand_steps_leave_the_operator_orthogonal(name, variant, size):
    for classes in (REAL, COMPLEX):
        values = singular_values_after(1000, classes, size, variant, name)
        assert (values - 1).abs().max() < 1e-5


def test_norms_are_kept_on_large_images():
    layer = OrthogonalConv2d(64, 64, image_size=32, bias=False)
    x = torch.randn(2, 64, 32, 32)
    assert layer(x).norm().item() == pytest.approx(x.norm().item(), rel=1e-5)


@pytest.mark.parametrize("channels", [(64, 64), (64, 80), (80, 64)], ids=str)
def test_the_gradient_that_is_not_formed_is_the_dense_one(channels):
    layer = OrthogonalConv2d(*channels, image_size=(4, 3), dtype=torch.float64)
    x, goal = torch.randn(5, channels[0], 4, 3, dtype=torch.float64), 1.0
    (layer(x) - goal).square().sum().backward()
    factored = layer.weight.grad
    assert type(factored).__name__ == "FactoredTensor"
    blocks = layer.weight.detach().clone().requires_grad_()
    wide = channels[0] > channels[1]
    grid = layer.grid("cpu")
    waves = fourier.analyse(x, grid).permute(2, 1, 0)[grid.paired]
    y = (blocks[0].mH if wide else blocks[0]) @ waves
    rest = (layer.weight_real.mT if wide else layer.weight_real)[0].to(y.dtype)
    y = torch.cat((y, rest @ fourier.analyse(x, grid).permute(2, 1, 0)[grid.self_conjugate]))
    image = fourier.synthesise(fourier.everywhere(y, grid).permute(2, 1, 0), grid) + layer.bias.view(-1, 1, 1)
    (dense,) = torch.autograd.grad((image - goal).square().sum(), blocks)
    assert torch.allclose(factored.clone(), dense, atol=1e-10)


def test_second_derivatives():
    layer = OrthogonalConv1d(2, 2, image_size=5, dtype=torch.float64, bias=False)
    x = torch.randn(1, 2, 5, dtype=torch.float64, requires_grad=True)
    weights = [layer.weight.detach().clone().requires_grad_(), layer.weight_real.detach().clone().requires_grad_()]

    def run(x, w, r):
        return torch.func.functional_call(layer, {"weight": w, "weight_real": r}, (x,)).square()

    assert torch.autograd.gradgradcheck(run, (x, *weights))


def test_inputs_of_every_memory_order_and_precision():
    layer = OrthogonalConv2d(3, 4, image_size=(4, 6))
    x = torch.randn(2, 3, 4, 6)
    y = layer(x)
    assert torch.allclose(layer(x.to(memory_format=torch.channels_last)), y, atol=1e-6)
    assert torch.allclose(layer(x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)), y, atol=1e-6)
    assert torch.allclose(layer(x[0]), y[0], atol=1e-6)
    assert layer(x[:0]).shape == (0, 4, 4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), y)
        assert layer(x.bfloat16()).dtype == torch.float32
    for wide in (copy.deepcopy(layer).double(), copy.deepcopy(layer).to(torch.float64)):
        assert wide.weight.dtype == torch.complex128
        assert torch.allclose(wide(x.double()), y.double(), atol=1e-5)
    assert UnitaryConv2d(3, 4, image_size=(4, 6))(x).dtype == torch.complex64


def test_it_keeps_its_manifolds_and_its_names():
    layer = OrthogonalConv2d(2, 3, image_size=(4, 5), k=2)
    assert set(layer.state_dict()) == {"weight", "weight_real", "bias", "_extra_state", "manifold._extra_state"}
    assert set(manifolds_of(layer)) == {"weight", "weight_real"}
    x = torch.randn(2, 2, 4, 5)
    for other in (copy.deepcopy(layer), OrthogonalConv2d(2, 3, image_size=(4, 5), k=2)):
        other.load_state_dict(layer.state_dict(), assign=True)
        assert set(manifolds_of(other)) == {"weight", "weight_real"}
        assert torch.equal(other(x), layer(x))
    empty = OrthogonalConv2d(2, 3, image_size=(4, 5), device="meta").to_empty(device="cpu")
    empty.reset_parameters()
    assert set(manifolds_of(empty)) == {"weight", "weight_real"}
    assert (empty.singular_values() - 1).abs().max() < 1e-5


def test_square_real_blocks_start_as_rotations():
    for start in ({}, {"support": 2}, {"init": "identity"}):
        layer = OrthogonalConv2d(3, 3, image_size=(4, 6), groups=1, **start)
        assert (torch.linalg.det(layer.weight_real) > 0).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OrthogonalConv2d(3, 4, image_size=6, stride=4), "divide every side"),
        (lambda: OrthogonalConv2d(3, 4, image_size=6, groups=2), "groups=2 must divide"),
        (lambda: OrthogonalConv2d(3, 4, image_size=(6, 6, 6)), "2 of them"),
        (lambda: OrthogonalConv2d(0, 4, image_size=6), "in_channels"),
        (lambda: OrthogonalConv2d(3, 4, image_size=6, init="henaff"), "init"),
        (lambda: OrthogonalConv2d(3, 4, image_size=6, support=7), "support=7"),
        (
            lambda: OrthogonalConv2d(3, 4, image_size=6)(torch.zeros(1, 3, 6, 7)),
            r"made for images of size \(6, 6\), got \(6, 7\)",
        ),
        (lambda: OrthogonalConv2d(3, 4, image_size=6)(torch.zeros(1, 2, 6, 6)), r"3, \*size"),
        (lambda: OrthogonalConv2d.from_plain(nn.Conv2d(3, 4, 3, padding=1), 6), "circular"),
        (lambda: OrthogonalConv2d.from_plain(nn.Conv2d(3, 4, 3, padding_mode="circular"), 6), "keeps the size"),
        (lambda: OrthogonalConv2d.from_plain(nn.Conv2d(3, 4, 3, dilation=2), 6), "no dilation"),
        (lambda: OrthogonalConv2d(3, 4, image_size=6, support=2, init="identity"), "sets the initial kernel"),
        (lambda: OrthogonalConv2d(3, 4, image_size=6).support_energy(0), "kernel_size"),
        (lambda: OrthogonalConv2d(3, 4, image_size=6.0), "int or 2 of them"),
        (
            lambda: OrthogonalConv2d.from_plain(nn.Conv2d(3, 4, 7, padding=3, padding_mode="circular"), 6),
            "does not fit",
        ),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="real signals"):
        OrthogonalConv2d(3, 4, image_size=6, dtype=torch.complex64)
    with pytest.raises(TypeError, match="Conv2d, got Conv1d"):
        OrthogonalConv2d.from_plain(nn.Conv1d(3, 4, 3), 6)
    with pytest.raises(TypeError, match="input must be"):
        OrthogonalConv2d(3, 4, image_size=6)(torch.zeros(1, 3, 6, 6, dtype=torch.complex64))
    with pytest.raises(TypeError, match="float16"):
        OrthogonalConv2d(3, 4, image_size=6, dtype=torch.float16)


@pytest.mark.parametrize(("kernel_size", "padding", "stride"), [(3, 1, 2), (2, 0, 2), (3, 0, 3), (5, 2, 2)])
def test_a_convolution_that_goes_to_a_coarser_grid_is_taken_over(kernel_size, padding, stride):
    side = 2 * stride * 3
    mode = "circular" if padding else "zeros"  # where nothing is padded it does not matter
    conv = nn.Conv2d(2, 2 * stride**2, kernel_size, stride, padding, padding_mode=mode, dtype=torch.float64)
    whole = OrthogonalConv2d.from_plain(conv, side)
    local = OrthogonalConv2d.from_kernel(whole.kernel(), stride=stride)
    x = signals(local)
    assert torch.allclose(local(x), whole(x) - whole.bias.view(-1, 1, 1), atol=1e-10)
    assert (whole.singular_values() - 1).abs().max() < 1e-12
    placed = torch.zeros(*conv.weight.shape[:2], side, side, dtype=torch.float64)
    placed[..., :kernel_size, :kernel_size] = conv.weight.detach()
    placed = placed.roll([whole._centre[0] - padding] * 2, (-2, -1))  # the same operator with a kernel of full size
    full = whole.to_plain()
    with torch.no_grad():
        full.weight.copy_(placed)
        full.bias.copy_(conv.bias)
    assert torch.allclose(full(x), conv(x), atol=1e-10)


@pytest.mark.parametrize("build", [OrthogonalConv2d, UnitaryConv2d])
@pytest.mark.parametrize(
    "convert",
    [
        lambda layer: layer.double(),
        lambda layer: layer.to(torch.float64),
        lambda layer: layer.to("cpu", torch.float64),
        lambda layer: layer.to(torch.float64).to(memory_format=torch.channels_last),
        lambda layer: layer.to(torch.float64).to(memory_format=torch.channels_last_3d),
    ],
)
def test_conversions_keep_the_operator(build, convert):
    layer = build(3, 4, image_size=(4, 6))
    x = torch.randn(2, 3, 4, 6)
    y = layer(x)
    wide = convert(layer)
    assert wide.weight.dtype == torch.complex128
    assert wide.weight.is_contiguous()
    assert torch.allclose(wide(x.double()), y.to(wide._dtype), atol=1e-5)
    assert set(manifolds_of(wide)) >= {"weight"}
    back = wide.float()
    assert back.weight.dtype == torch.complex64
    meta = build(3, 4, image_size=(4, 6), device="meta").double().to_empty(device="cpu")
    meta.reset_parameters()
    assert torch.isfinite(torch.view_as_real(meta.weight)).all()
    assert meta(x.double()).shape == y.shape


@pytest.mark.filterwarnings("ignore:unitary weights become", "ignore:Complex modules")
@pytest.mark.parametrize("build", [OrthogonalConv2d, UnitaryConv2d])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_forward_in_single(build, dtype):
    layer = build(2, 4, image_size=(4, 6), stride=2, groups=2)
    x = torch.randn(3, 2, 4, 6)
    y = layer(x)
    found = layer.to(dtype)(x.to(dtype))
    assert found.dtype == (torch.complex64 if y.is_complex() else dtype)
    assert torch.allclose(found.to(y.dtype), y, atol=20 * torch.finfo(dtype).eps)
    assert torch.allclose(layer.singular_values(), torch.ones(()), atol=20 * torch.finfo(dtype).eps)
    assert torch.allclose(layer.to_plain()(x.to(layer._dtype)).to(y.dtype), y, atol=20 * torch.finfo(dtype).eps)


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_a_layer_for_real_signals_is_not_made_complex():
    layer = OrthogonalConv2d(2, 2, image_size=4)
    before = [p.dtype for p in layer.parameters()]
    with pytest.raises(TypeError, match="for real signals, got dtype"):
        layer.to(torch.complex128)
    assert [p.dtype for p in layer.parameters()] == before
    layer(torch.randn(1, 2, 4, 4))


def test_a_factored_gradient_follows_a_conversion():
    layer = OrthogonalConv2d(64, 64, image_size=(4, 3))
    layer(torch.randn(2, 64, 4, 3)).sum().backward()
    expected = layer.weight.grad.clone()
    layer.double()
    assert layer.weight.grad.dtype == torch.complex128
    assert torch.allclose(layer.weight.grad, expected.to(torch.complex128))


def test_the_callers_modes_leave_no_trace():
    fourier._kept_spectrum.cache_clear()
    layer = OrthogonalConv2d(2, 2, image_size=(8, 14))
    fourier._kept_spectrum.cache_clear()
    with torch.inference_mode():
        layer(torch.randn(1, 2, 8, 14))
    layer(torch.randn(1, 2, 8, 14)).sum().backward()
    fourier._kept_spectrum.cache_clear()
    with torch.device("meta"):
        empty = OrthogonalConv2d(2, 2, image_size=(10, 12))
    empty.to_empty(device="cpu").reset_parameters()
    assert (empty.singular_values() - 1).abs().max() < 1e-5
    kernel = layer.kernel().detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = OrthogonalConv2d.from_kernel(kernel)
    assert (again.singular_values() - 1).abs().max() < 1e-5


def test_transforms_of_functions():
    layer = OrthogonalConv1d(2, 2, image_size=5, dtype=torch.float64)
    x, v = torch.randn(2, 3, 2, 5, dtype=torch.float64)
    expected = torch.autograd.functional.jacobian(lambda x: layer(x).square().sum(), x)
    assert torch.allclose(torch.func.grad(lambda x: layer(x).square().sum())(x), expected)
    assert torch.allclose(torch.func.vmap(layer)(x), layer(x))
    _, tangent = torch.func.jvp(layer, (x,), (v,))
    assert torch.allclose(tangent, layer(v) - layer.bias.view(-1, 1))
    empty = x[:0].clone().requires_grad_()
    assert torch.autograd.grad(layer(empty).sum(), empty)[0].shape == empty.shape


def test_blocks_of_another_grid_are_refused():
    layer = OrthogonalConv2d(2, 2, image_size=(5, 3))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"'_extra_state' is that of another .*\[2, 2, 1, 1, 3, 5\]"):
        layer.load_state_dict(OrthogonalConv2d(2, 2, image_size=(3, 5)).state_dict())
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in before.items())


def test_two_channels_have_a_wide_start_too():
    kernel = OrthogonalConv1d(2, 2, image_size=8, support=3, dtype=torch.float64).kernel()
    assert (kernel.abs().amax((0, 1)) > 1e-3).sum() == 3
    thin = OrthogonalConv2d(4, 4, image_size=(16, 1), support=3)
    assert thin.support_energy(3).item() == pytest.approx(1)


def test_many_gradients_at_once_of_blocks_whose_gradient_is_kept_as_factors(draw):
    layer, x = OrthogonalConv2d(64, 64, image_size=3), draw.matrix(1, 64, 3, 3, dtype=torch.float32)
    outputs = layer(x).flatten()[:3]
    found = torch.autograd.grad(outputs, layer.weight, torch.eye(3), is_grads_batched=True, retain_graph=True)[0]
    for one, output in zip(found, outputs, strict=True):
        expected = torch.autograd.grad(output, layer.weight, retain_graph=True)[0].clone()
        assert (one - expected).abs().max() <= bound(torch.float32)
