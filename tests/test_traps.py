"""What the page of traps says of geoopt and PyTorch: the fault is there, and what the page advises is free of it."""

import geoopt
import pytest
import torch
from helpers import bound, error

from projunn_manifold import UnitaryLowRank, optim
from projunn_manifold.layers import UnitaryRNN


def parameter(draw, dtype, n=6):
    manifold = UnitaryLowRank(k=1)
    p = geoopt.ManifoldParameter(manifold.random(n, n, dtype=dtype), manifold=manifold)
    p.grad = draw.matrix(n, n, dtype=dtype)
    return p


def test_amsgrad_takes_complex_weights_in_place_only(draw):
    p, q = (parameter(draw, torch.complex128) for _ in range(2))
    with pytest.raises(RuntimeError, match="complex"):
        geoopt.optim.RiemannianAdam([p], lr=0.1, amsgrad=True).step()
    start, optimizer = q.detach().clone(), optim.RiemannianAdam([q], lr=0.1, amsgrad=True)
    for _ in range(3):
        optimizer.step()
    assert error(q, start) > 0.01
    assert error(q.mH @ q, torch.eye(6, dtype=q.dtype)) <= bound(q.dtype)


def test_an_l2_penalty_in_the_loss_is_not_known_to_be_one(draw):
    """It moves no point by itself, but a sketch of its gradient holds less of the rest."""
    p = parameter(draw, torch.float64, 32)
    g, start = p.grad.clone(), p.detach().clone()
    for penalty, is_same in ((0.0, True), (100.0, False)):
        with torch.no_grad():
            p.copy_(start)
        p.manifold.set_extra_state(UnitaryLowRank().get_extra_state())
        p.grad = g + penalty * start
        optim.RiemannianSGD([p], lr=0.1).step()
        if is_same:
            alone = p.detach().clone()
        assert (error(p, alone) < 1e-12) is is_same


def test_gradients_are_clipped_by_norm_complex_or_factored(draw):
    with pytest.raises(NotImplementedError, match="complex"):
        torch.nn.utils.clip_grad_value_([parameter(draw, torch.complex128)], 1.0)
    whole = parameter(draw, torch.complex128)
    norm = torch.linalg.vector_norm(whole.grad).item()
    torch.nn.utils.clip_grad_norm_([whole], 1.0)
    assert norm > 1
    assert torch.linalg.vector_norm(whole.grad).item() == pytest.approx(1)
    network = UnitaryRNN(3, 64, dtype=torch.complex128)
    network(draw.matrix(5, 2, 3, dtype=torch.float64))[0].abs().square().sum().backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1e-3)
    assert torch.stack([p.grad.abs().square().sum() for p in network.parameters()]).sum().sqrt() <= 1.001e-3


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
def test_a_grad_scaler_skips_what_overflowed_and_has_no_complex_numbers(draw):
    p, scaler = parameter(draw, torch.float64), torch.amp.GradScaler("cpu")
    optimizer = optim.RiemannianSGD([p], lr=0.1)
    for factor, moves in ((float("inf"), False), (1.0, True)):
        optimizer.zero_grad()
        scaler.scale((p - 1).square().sum()).backward()
        p.grad.mul_(factor)
        before, scale = p.detach().clone(), scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        assert (error(p, before) > 0.01) is moves
        assert (scaler.get_scale() < scale) is not moves
    p = parameter(draw, torch.complex128)
    scaler.scale((p - 1).abs().square().sum()).backward()
    with pytest.raises(NotImplementedError, match="Complex"):
        scaler.step(optim.RiemannianSGD([p], lr=0.1))


def test_plain_modules_lose_precision_or_imaginary_parts_where_layers_do_not(draw):
    plain = torch.nn.Linear(3, 3, dtype=torch.complex64)
    assert plain.double().weight.dtype is torch.complex64
    with pytest.warns(UserWarning, match="discards the imaginary part"):
        assert plain.to(torch.float64).weight.dtype is torch.float64
    for convert in (lambda module: module.double(), lambda module: module.to(torch.float64)):
        network = UnitaryRNN(3, 6, dtype=torch.complex64)
        weight = network.weight_hh_l0.detach().clone()
        convert(network)
        assert network.weight_hh_l0.dtype is torch.complex128
        assert torch.equal(network.weight_hh_l0, weight.to(torch.complex128))
        assert isinstance(network.weight_hh_l0.manifold, UnitaryLowRank)
