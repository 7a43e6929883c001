"""A run that was saved, copied or moved to another process goes on as if nothing had happened, bit for bit."""

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import geoopt
import pytest
import resume
import torch
import torch.distributed.checkpoint as dcp
from helpers import bound, error
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from projunn_manifold import UnitaryLowRank, optim
from projunn_manifold.manifold.state import Faults

SETTINGS = list(resume.SETTINGS)


def same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def straight():
    """Return each setting's state after 50 and after 100 steps without a break."""
    results = {}
    for setting in SETTINGS:
        network, optimizer = resume.start(setting)
        resume.train(network, optimizer, 0, 50)
        half = copy.deepcopy({"network": network.state_dict(), "optimizer": optimizer.state_dict()})
        resume.train(network, optimizer, 50, 100)
        results[setting] = half, network.state_dict()
    return results


@pytest.mark.parametrize("setting", SETTINGS)
def test_resumed_in_another_process(straight, setting, tmp_path):
    half, whole = straight[setting]
    torch.save(half, tmp_path / "checkpoint.pt")
    script = Path(resume.__file__)
    subprocess.run([sys.executable, script, setting, tmp_path, "50", "100"], check=True, timeout=120)
    same(torch.load(tmp_path / "result.pt", weights_only=True), whole)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("setting", SETTINGS)
def test_resumed_from_a_distributed_checkpoint(straight, setting, tmp_path):
    """By names, as PyTorch's documentation has it: under numbers it drops what is no tensor, such as Adam's count."""
    network, optimizer = resume.start(setting)
    resume.train(network, optimizer, 0, 50)
    dcp.save(dict(zip("mo", get_state_dict(network, optimizer), strict=True)), checkpoint_id=tmp_path)
    network, optimizer = resume.start(setting)
    model, state = get_state_dict(network, optimizer)
    dcp.load({"m": model, "o": state}, checkpoint_id=tmp_path)
    set_state_dict(network, optimizer, model_state_dict=model, optim_state_dict=state)
    resume.train(network, optimizer, 50, 100)
    same(network.state_dict(), straight[setting][1])


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), [((17, 5), torch.float64), ((3, 7, 6), torch.float32)], ids=str)
def test_geoopts_moments_are_taken_over_although_they_are_equal_to_rounding_only(shape, dtype, amsgrad):
    for seed in range(5):
        torch.manual_seed(seed)
        manifold = UnitaryLowRank(1)
        p = geoopt.ManifoldParameter(manifold.random(*shape, dtype=dtype), manifold=manifold)
        before = geoopt.optim.RiemannianAdam([p], lr=0.01, amsgrad=amsgrad)
        for _ in range(12):
            p.grad = torch.randn(*shape, dtype=dtype)
            before.step()
        after = optim.RiemannianAdam([p], lr=0.01, amsgrad=amsgrad)
        after.load_state_dict(before.state_dict())
        moments = after.state[p]["exp_avg_sq"]
        assert moments.shape == (*shape[:-2], 1, 1)
        assert torch.allclose(moments, before.state[p]["exp_avg_sq"][..., :1, :1], rtol=1e-5)


def test_a_euclidean_adams_second_moment_becomes_that_of_the_whole_matrix(draw):
    manifold = UnitaryLowRank(1)
    p = geoopt.ManifoldParameter(manifold.random(8, 8), manifold=manifold)
    plain = torch.nn.Parameter(p.detach().as_subclass(torch.Tensor).clone())
    plain.grad = draw.matrix(8, 8, dtype=torch.float32)
    before = torch.optim.Adam([plain])
    before.step()
    after = optim.RiemannianAdam([p])
    after.load_state_dict(before.state_dict())
    moment = after.state[p]["exp_avg_sq"]
    assert moment.shape == (1, 1)
    assert moment.item() == pytest.approx(before.state[plain]["exp_avg_sq"].sum().item())


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t)), "torch.save"], ids=["copy", "pickle", "file"]
)
def test_resumed_from_a_copy(straight, setting, how):
    network, optimizer = resume.start(setting)
    resume.train(network, optimizer, 0, 50)
    if how == "torch.save":
        buffer = io.BytesIO()
        torch.save((network, optimizer), buffer)
        buffer.seek(0)
        network, optimizer = torch.load(buffer, weights_only=False)
    else:
        network, optimizer = how((network, optimizer))
    resume.train(network, optimizer, 50, 100)
    same(network.state_dict(), straight[setting][1])


def test_geoopts_adam_resumes_to_rounding(draw):
    """Not bit for bit: loaded, it counts its steps in float32 (torch.optim.Adam converts them)."""
    points = []
    for breaks in (False, True):
        manifold = UnitaryLowRank(1)
        p = geoopt.ManifoldParameter(torch.eye(16), manifold=manifold)
        optimizer = geoopt.optim.RiemannianAdam([p], lr=0.01)
        for step in range(40):
            if breaks and step == 20:
                state = optimizer.state_dict()
                optimizer = geoopt.optim.RiemannianAdam([p], lr=0.01)
                optimizer.load_state_dict(state)
            p.grad = torch.randn(16, 16, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        points.append(p.detach())
    assert error(*points) <= bound(torch.float32)


def test_what_is_saved_and_what_is_refused():
    manifold = UnitaryLowRank(non_finite="skip", sweep=None)
    x = torch.eye(8)
    manifold.step_(x, torch.ones(8, 8), 0.1)
    manifold.step_(x, torch.full((8, 8), torch.nan), 0.1)
    state = manifold.state_dict()["_extra_state"]
    assert (state.dtype, state.shape) == (torch.int64, (5, 8))
    other = UnitaryLowRank()
    other.load_state_dict(manifold.state_dict())
    assert other._state.gradients == 2
    assert other.pop_faults() == Faults(1, 0)
    for wrong, message in (
        (None, r"a real tensor of shape \(5, 8\), from a state_dict, got None"),
        (state[:2], r"got torch.int64 \(2, 8\) on cpu"),
        (state.double() * 1e20, "counts of gradients"),
    ):
        with pytest.raises(ValueError, match=f"'model.manifold._extra_state' must .*{message}"):
            nn.ModuleDict({"model": nn.ModuleDict({"manifold": other})}).load_state_dict(
                {"model.manifold._extra_state": wrong}
            )
    assert other._state.gradients == 2
