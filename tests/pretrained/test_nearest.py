"""The closest unitary matrix: against scipy, against the conditions of optimality, and one method against another."""

import warnings

import pytest
import scipy.linalg
import torch
from torch import nn

from projunn_manifold import nearest_unitary
from projunn_manifold.layers import OrthogonalConv2d, UnitaryConv1d
from projunn_manifold.linalg import dense
from projunn_manifold.pretrained.convolutions import nearest_convolution, nearest_layer

SHAPES = [(7, 7), (9, 4), (4, 9), (3, 5, 5), (2, 2, 6, 3)]
DTYPES = [torch.float64, torch.complex128]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def of(shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def tall(x):
    return x if x.shape[-2] >= x.shape[-1] else x.mH


def assert_unitary(u, atol=1e-12):
    eye = torch.eye(tall(u).shape[-1], dtype=u.dtype).expand(*u.shape[:-2], -1, -1)
    torch.testing.assert_close(tall(u).mH @ tall(u), eye, atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_polar_is_the_closest(shape, dtype):
    w = of(shape, dtype)
    u, losses, theta = nearest_unitary(w)
    assert_unitary(u)
    assert theta is None
    assert losses == [pytest.approx((u - w).abs().square().sum().item())]
    h = tall(u).mH @ tall(w)  # Hermitian and positive: what characterises the closest
    torch.testing.assert_close(h, h.mH, atol=1e-12, rtol=0)
    assert (torch.linalg.eigvalsh(h) > 0).all()


def test_a_rotation_is_the_closest_of_all_rotations():
    for _ in range(10):
        w = of((2, 2))
        u = nearest_unitary(w, rotation=True).unitary
        angle = torch.linspace(0, 2 * torch.pi, 20001, dtype=torch.float64)  # all there are
        every = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), -1).view(-1, 2, 2)
        best = (every - w).square().sum((-2, -1)).min().item()
        assert torch.linalg.det(u).item() == pytest.approx(1)
        assert (u - w).square().sum().item() == pytest.approx(best, abs=1e-5)


def test_rotations_keep_what_is_one_already():
    w = of((20, 6, 6))
    u, v = nearest_unitary(w).unitary, nearest_unitary(w, rotation=True).unitary
    right = torch.linalg.det(u) > 0
    assert 0 < right.sum() < 20
    torch.testing.assert_close(u[right], v[right])
    torch.testing.assert_close(torch.linalg.det(v), torch.ones(20, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lie_finds_the_polar_factor_or_the_closest_rotation(shape, dtype):
    w = of(shape, dtype)
    expected = nearest_unitary(w, rotation=not dtype.is_complex)
    seen = []
    found = nearest_unitary(w, "lie", callback=lambda step, loss: seen.append((step, loss)))
    torch.testing.assert_close(found.unitary, expected.unitary, atol=1e-5, rtol=0)
    assert found.losses[-1] == pytest.approx(expected.losses[0], rel=1e-9)
    assert seen == list(enumerate(found.losses, 1))
    assert len(shape) > 2 or found.losses == sorted(found.losses, reverse=True)
    side = max(shape[-2:])
    assert found.parameters.shape == (*shape[:-2], side * side if dtype.is_complex else side * (side - 1) // 2)


def test_lie_parameters_are_those_of_the_matrix():
    for dtype in DTYPES:
        found = nearest_unitary(of((4, 4), dtype), "lie")
        a = torch.zeros(4, 4, dtype=dtype)
        numbers = iter(found.parameters.tolist())
        for unit in (1, 1j)[: 1 + dtype.is_complex]:
            for i in range(4):
                for j in range(i + 1, 4):
                    theta = next(numbers)
                    a[i, j] += unit * theta
                    a[j, i] -= (unit * theta).conjugate()
        if dtype.is_complex:
            for i in range(4):
                a[i, i] += 1j * next(numbers)
        torch.testing.assert_close(torch.from_numpy(scipy.linalg.expm(a.numpy())), found.unitary)


@pytest.mark.parametrize("diagonal", [[-1.0] * 6, [3.0, 1.0, -1.0, -2.0], [2.0, -1.0]])
def test_lie_is_not_held_by_the_saddle_at_the_identity(diagonal):
    w = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    expected = nearest_unitary(w, rotation=True).losses[0]
    assert nearest_unitary(w, "lie").losses[-1] == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 6), (8, 5)], ids=str)
def test_procrustes_is_scipys(shape, dtype):
    w, x = of(shape, dtype), of((30, shape[1]), dtype) * torch.linspace(0.5, 2, shape[1])
    u, losses, _ = nearest_unitary(w, "procrustes", inputs=x)
    expected = scipy.linalg.orthogonal_procrustes(x.numpy(), (x @ w.mT).numpy())[0].T if shape[0] == shape[1] else None
    if expected is not None:
        torch.testing.assert_close(u, torch.from_numpy(expected.copy()))
    assert_unitary(u)
    assert losses == [pytest.approx((x @ (u - w).mT).abs().square().sum().item())]
    assert losses[0] < (x @ (nearest_unitary(w).unitary - w).mT).abs().square().sum()
    lie = nearest_unitary(w, "lie", inputs=x)
    expected = nearest_unitary(w, "procrustes", inputs=x, rotation=True) if not dtype.is_complex else (u, losses)
    assert lie.losses[-1] == pytest.approx(expected[1][0], rel=1e-4)


@pytest.mark.parametrize("shape", [(6, 6), (8, 5)], ids=str)
def test_where_inputs_do_not_reach_the_weight_itself_decides(shape):
    w, x = of(shape), of((3, shape[1]))
    u = nearest_unitary(w, "procrustes", inputs=x).unitary
    assert_unitary(u)
    best = nearest_unitary(w, "lie", inputs=x).losses[-1]
    assert (x @ (u - w).mT).square().sum().item() == pytest.approx(best, rel=1e-6, abs=1e-9)
    # the limit of inputs that reach the rest with almost no weight
    faint = torch.cat((x, 1e-4 * torch.linalg.qr(x.mT, mode="complete")[0][:, 3:].mT))
    torch.testing.assert_close(u, nearest_unitary(w, "procrustes", inputs=faint).unitary, atol=1e-6, rtol=0)


def test_wide_weights_that_see_inputs_go_by_lie():
    w, x = of((3, 6)), of((20, 6)) * torch.linspace(0.1, 2, 6)
    u = nearest_unitary(w, "lie", inputs=x).unitary
    assert_unitary(u)
    loss = (x @ (u - w).mT).square().sum()
    assert loss < (x @ (nearest_unitary(w).unitary - w).mT).square().sum()
    for _ in range(20):
        near = nearest_unitary(u + 1e-3 * of((3, 6))).unitary
        assert (x @ (near - w).mT).square().sum() > loss - 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_the_dtype_is_kept_and_rounding_is_all_the_error(dtype):
    u = nearest_unitary(torch.randn(50, 50, dtype=dtype)).unitary
    assert u.dtype == dtype
    assert u.is_contiguous()
    assert_unitary(u, atol=1e-6)


@pytest.mark.parametrize("method", ["polar", "lie"])
@pytest.mark.parametrize("shape", [(3, 3, 3, 3), (4, 2, 2, 3), (2, 4, 3, 2)], ids=str)
def test_kernels_become_those_of_the_closest_orthogonal_convolution(shape, method):
    kernel = of(shape)
    size = (4, 5)
    found = nearest_convolution(kernel, size, method, rotation=True)
    everything = torch.eye(shape[1] * 20, dtype=kernel.dtype).view(-1, shape[1], *size)
    operator, dense = (_convolved(k, everything).flatten(1).T for k in (found.unitary, kernel))
    assert_unitary(operator, atol=1e-5)
    assert (operator - dense).square().sum().item() == pytest.approx(found.losses[-1], rel=1e-6)
    if method == "polar" and shape[0] != shape[1]:  # no determinants: the closest of all orthogonal operators
        torch.testing.assert_close(operator, nearest_unitary(dense).unitary)


def test_kernels_may_look_at_images():
    kernel, images = of((3, 3, 3, 3)), of((40, 3, 4, 4)) * torch.tensor([0.1, 1, 3]).view(3, 1, 1)
    blind, seeing = (
        nearest_convolution(kernel, 4),
        nearest_convolution(kernel, 4, "procrustes", inputs=images),
    )
    goal = _convolved(kernel, images)
    errors = [(_convolved(found.unitary, images) - goal).square().sum() for found in (blind, seeing)]
    assert errors[1] < errors[0]
    whole = nn.functional.pad(kernel, (0, 1, 0, 1))  # both have their centre at 1
    conv = nn.Conv2d(3, 3, 4, padding="same", padding_mode="circular", bias=False)
    conv.weight.data = whole
    layer = nearest_layer(OrthogonalConv2d, conv, 4, {"method": "procrustes", "inputs": images})
    torch.testing.assert_close(layer(images), _convolved(seeing.unitary, images))


def _convolved(kernel, images):
    sizes = kernel.shape
    conv = nn.Conv2d(sizes[1], sizes[0], sizes[2:], padding="same", padding_mode="circular", bias=False)
    conv.weight.data = kernel
    return conv(images).detach()


def test_complex_kernels():
    kernel = of((3, 3, 2), torch.complex128)
    u = nearest_convolution(kernel, 5).unitary
    layer = UnitaryConv1d.from_kernel(u)
    x = of((2, 3, 5), torch.complex128)
    assert layer(x).norm().item() == pytest.approx(x.norm().item())
    torch.testing.assert_close(layer.kernel(), u)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ([(4, 4), "svd"], {}, "method must be one of 'polar', 'procrustes', 'lie', got 'svd'"),
        ([(4, 4), "procrustes"], {}, "needs inputs"),
        ([(4, 4), "polar"], {"inputs": (3, 4)}, "does not use inputs"),
        ([(2, 4), "procrustes"], {"inputs": (3, 4)}, "wide"),
        ([(4, 4), "lie"], {"inputs": (3, 5)}, "4 features"),
        ([(4,)], {}, "(*batch, n, m)"),
        ([(0, 4)], {}, "not empty"),
    ],
)
def test_wrong_arguments_are_refused(arguments, options, message):
    options = {name: of(value) if name == "inputs" else value for name, value in options.items()}
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)").replace("*", r"\*")):
        nearest_unitary(of(arguments[0]), *arguments[1:], **options)


def test_a_kernel_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        nearest_convolution(of((3, 3, 5)), 4)


def test_what_has_no_closest_unitary_is_refused():
    with pytest.raises(ValueError, match="rank deficient"):
        nearest_unitary(of((5, 2)) @ of((2, 5)))
    with pytest.raises(ValueError, match="non-finite"):
        nearest_unitary(torch.full((3, 3), torch.nan))
    with pytest.raises(ValueError, match="real matrices"):
        nearest_unitary(of((3, 3), torch.complex128), rotation=True)
    for call in (nearest_unitary, lambda w: nearest_convolution(w[None], 4)):
        with pytest.raises(ValueError, match="float16; keep the parameter in float32"):
            call(of((3, 3)).half())


def test_too_few_steps_are_told():
    with pytest.warns(UserWarning, match="after 1 steps"):
        nearest_unitary(of((9, 9)), "lie", steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nearest_unitary(of((4, 4)), "lie")


def test_what_is_small_is_not_lost_beside_what_is_large():
    for scale in (1e-7, 1.0, 1e6):
        w = torch.stack((of((5, 5), torch.complex128), scale * of((5, 5), torch.complex128)))
        u = nearest_unitary(w, "lie").unitary
        torch.testing.assert_close(u, nearest_unitary(w).unitary, atol=1e-5, rtol=0)


def test_the_smallest_matrices():
    for w in (of((1, 1)), of((4, 1, 1)), of((1, 1), torch.complex128), of((3, 1)), of((1, 3))):
        lie, polar = nearest_unitary(w, "lie"), nearest_unitary(w, rotation=not w.is_complex())
        torch.testing.assert_close(lie.unitary, polar.unitary, atol=1e-6, rtol=0)
    one = of((1, 1, 3, 3))  # real blocks of one number each, and complex ones
    turned = nearest_convolution(one, 4, rotation=True).unitary
    torch.testing.assert_close(nearest_convolution(one, 4, "lie").unitary, turned, atol=1e-6, rtol=0)


def test_nothing_of_the_callers_is_touched():
    w = nn.Parameter(of((4, 4)))
    x = of((9, 4)).requires_grad_()
    found = nearest_unitary(w, "lie", inputs=x)
    assert w.grad is None
    assert x.grad is None
    assert not found.unitary.requires_grad
    with torch.inference_mode():
        again = nearest_unitary(of((4, 4)), "lie")
    assert again.losses


def test_losses_of_kernels_are_those_of_the_convolutions():
    kernel, images = of((3, 3, 3, 3)), of((10, 3, 4, 4))
    goal = _convolved(kernel, images)
    for method in ("procrustes", "lie"):
        seen = []
        found = nearest_convolution(
            kernel,
            4,
            method,
            inputs=images,
            rotation=method == "procrustes",
            **({"callback": lambda step, loss: seen.append((step, loss))} if method == "lie" else {}),  # noqa: B023
        )
        error = (_convolved(found.unitary, images) - goal).square().sum().item()
        assert found.losses[-1] == pytest.approx(error, rel=1e-6)
        assert seen == (list(enumerate(found.losses, 1)) if method == "lie" else [])


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 4), {"steps": 5}, "has no use for steps"),
        ((4, 4), {"method": "procrustes", "inputs": (0, 4)}, "are empty"),
        ((4, 4), {"method": "lie", "inputs": (3, 9, 4)}, "no batch or the weight's"),
    ],
)
def test_options_and_inputs_that_do_not_fit_are_refused(shape, options, message):
    options = {name: of(value) if name == "inputs" else value for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        nearest_unitary(of(shape), **options)


def test_deficient_weights_and_complex_rotations_are_refused_by_every_method():
    for method in ("polar", "lie"):
        with pytest.raises(ValueError, match="rank deficient"):
            nearest_unitary(of((5, 2)) @ of((2, 5)), method)
    with pytest.raises(ValueError, match="real kernels"):
        nearest_convolution(of((3, 3, 3), torch.complex128), 4, rotation=True)
    with pytest.raises(ValueError, match="inputs must be images"):
        nearest_convolution(of((3, 3, 3, 3)), 4, "procrustes", inputs=of((10, 3, 6, 6)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_the_closest_is_a_point_to_the_last_digit(draw, dtype):
    found = nearest_unitary(draw.matrix(256, 256, dtype=dtype)).unitary
    assert dense.unitarity_error(found) < dense.tolerance(dtype, 256) / 2


def test_no_steps_are_refused(draw):
    with pytest.raises(ValueError, match="steps must be an int >= 1"):
        nearest_unitary(draw.matrix(4, 4, dtype=torch.float64), "lie", steps=0)
