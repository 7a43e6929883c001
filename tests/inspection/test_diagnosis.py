"""A diagnosis is right where the answer is known, and leaves no trace."""

import copy
import random
import subprocess
import sys

import geoopt
import numpy as np
import pytest
import torch

from projunn_manifold import UnitaryLowRank, diagnose, layers, optim
from projunn_manifold.optim import constrain

N = 40


def network(**options):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        layers.UnitaryLinear(N, N, **options),
        torch.nn.BatchNorm1d(N),
        torch.nn.Dropout(0.1),
        layers.unitary_(torch.nn.Linear(N, 50)),
        torch.nn.Linear(50, 2),
    )


def closure_of(model, batch=8):
    def closure():
        loss = model(torch.randn(batch, N)).square().sum() + random.random() + np.random.rand()  # noqa: NPY002
        loss.backward()
        return loss

    return closure


def test_shares_are_those_of_the_singular_values():
    model = torch.nn.Module()
    manifold = UnitaryLowRank(3)
    draw = torch.Generator().manual_seed(0)
    model.w = geoopt.ManifoldParameter(manifold.random(64, 64, generator=draw), manifold=manifold)
    left, right = manifold.random(2, 64, 64, generator=draw)
    gradient = left @ torch.diag(0.8 ** torch.arange(64.0)) @ right.mT

    def closure():
        (model.w * gradient).sum().backward()

    [need] = diagnose(model, closure, steps=2, verbose=False)
    squares = torch.linalg.svdvals(gradient).square()
    exact = (squares.cumsum(0) / squares.sum()).sqrt()
    assert list(need.shares) == [1, 2, 3, 4, 8, 16, None]
    for k in (1, 2, 3, 4, 8, 16):
        assert need.shares[k] == pytest.approx(exact[k - 1].item(), rel=5e-3)
    assert need.shares[None] == 1
    assert set(need.parts) == set(need.step_ms) == set(need.shares)
    assert all(0 < part < 1 for part in need.parts.values())
    assert (need.k, need.name, need.shape) == (3, "w", (64, 64))


def snapshot(model, optimizer, manifolds):
    state = copy.deepcopy(optimizer.state_dict()) if optimizer is not None else {}
    return {
        "parameters": {k: v.clone() for k, v in model.state_dict().items()},
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "optimiser": state,
        "counts": [manifold.get_extra_state() for manifold in manifolds],
        "new": [manifold.memory.is_new(p) for manifold, p in manifolds.items()],
        "numbers": (torch.get_rng_state(), random.getstate(), np.random.get_state()),  # noqa: NPY002
    }


def assert_same(before, after):
    assert type(before) is type(after)
    if isinstance(before, torch.Tensor):
        assert torch.equal(before, after)
    elif isinstance(before, np.ndarray):
        assert np.array_equal(before, after)
    elif isinstance(before, dict):
        assert before.keys() == after.keys()
        for key in before:
            assert_same(before[key], after[key])
    elif isinstance(before, list | tuple):
        assert len(before) == len(after)
        for pair in zip(before, after, strict=True):
            assert_same(*pair)
    else:
        assert before == after


def sgd(params):
    return optim.RiemannianSGD(params, lr=1e-4, momentum=0.9)


def constrained(params):
    optimizer = torch.optim.RMSprop(params, lr=1e-3)
    constrain(optimizer, feedback=True)
    return optimizer


OPTIMISERS = {
    "none": None,
    "momentum": sgd,
    "Adam, feedback": lambda params: optim.RiemannianAdam(params, lr=0.1, feedback=True),
    "constrained RMSprop": constrained,
    "geoopt's Adam": geoopt.optim.RiemannianAdam,
}


class StopHereError(Exception):
    pass


@pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("raises", [False, True])
def test_everything_is_as_it_was(make, steps_before, raises):
    model = network()
    optimizer = make(model.parameters()) if make else None
    manifolds = {p.manifold: p for p in model.parameters() if hasattr(p, "manifold")}
    assert len(manifolds) == 2
    closure = closure_of(model)
    for _ in range(steps_before if optimizer else 0):
        optimizer.zero_grad()
        closure()
        optimizer.step()
    model[2].eval()
    before = snapshot(model, optimizer, manifolds)
    gradients = [p.grad for p in model.parameters()]

    def failing():
        model.train()
        closure()
        failing.calls += 1
        if raises and failing.calls == 2:
            raise StopHereError

    failing.calls = 0
    if raises:
        with pytest.raises(StopHereError):
            diagnose(model, failing, optimizer, steps=3)
    else:
        diagnose(model, failing, optimizer, steps=3, verbose=False)
    assert failing.calls >= 2
    assert_same(before, snapshot(model, optimizer, manifolds))
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))


def test_a_training_goes_on_as_if_there_had_been_no_diagnosis():
    def losses(looks):
        model = network()
        optimizer = optim.RiemannianAdam(model.parameters(), lr=0.05)
        closure, found = closure_of(model), []
        for step in range(6):
            if looks and step in (0, 3):
                diagnose(model, closure, optimizer, steps=2, verbose=False)
            optimizer.zero_grad()
            found.append(closure().item())
            optimizer.step()
        return found

    random.seed(0), np.random.seed(0)  # noqa: NPY002
    plain = losses(False)
    random.seed(0), np.random.seed(0)  # noqa: NPY002
    assert losses(True) == plain


def test_updates_are_those_of_the_optimiser_or_per_unit_rate():
    model = network(k=1)
    closure = closure_of(model)
    per_unit = diagnose(model, closure, steps=3, verbose=False)
    moved = diagnose(model, closure, optim.RiemannianSGD(model.parameters(), lr=1e-5), steps=3, verbose=False)
    for unit, of_step in zip(per_unit, moved, strict=True):
        assert of_step.update == pytest.approx(1e-5 * unit.update, rel=0.5)


def test_it_prints_a_table_and_draws_on_request(capsys, tmp_path):
    model = network(k=2)
    report = diagnose(model, closure_of(model), steps=2)
    printed = capsys.readouterr().out
    assert printed.strip() == str(report)
    for words in ("0.weight", "3.weight", "50x40", "recommended k=", "share of the gradient"):
        assert words in printed
    pytest.importorskip("matplotlib")
    report.draw(tmp_path / "need.png")
    assert (tmp_path / "need.png").read_bytes().startswith(b"\x89PNG")


def test_matplotlib_is_not_imported_before_it_is_needed():
    program = "import projunn_manifold, sys; assert 'matplotlib' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("model", "closure", "options", "error", "words"),
    [
        (None, lambda: None, {}, TypeError, "torch.nn.Module"),
        (torch.nn.Linear(2, 2), lambda: None, {}, ValueError, "no unitary weights"),
        (network(), None, {}, TypeError, "closure"),
        (network(), lambda: None, {}, ValueError, "backward"),
        (network(), lambda: None, {"steps": 0}, ValueError, "steps"),
        (network(), lambda: None, {"optimizer": 3}, TypeError, r"\.optim, \.base_optimizer or \.original_optimizer"),
        (network().to("meta"), lambda: None, {}, ValueError, "meta"),
    ],
)
def test_wrong_arguments_are_refused(model, closure, options, error, words):
    with pytest.raises(error, match=words):
        diagnose(model, closure, **options)


def test_layers_too_small_for_a_choice_have_full_rank():
    model = torch.nn.Sequential(layers.UnitaryLinear(2, 2), torch.nn.Linear(2, 1))

    def closure():
        model(torch.randn(3, 2)).sum().backward()

    [need] = diagnose(model, closure, steps=2, verbose=False)
    assert list(need.shares) == [None]
    assert need.recommended is None


def test_an_optimiser_that_calls_the_closure_itself_is_refused():
    model = network()
    with pytest.raises(TypeError, match="LBFGS"):
        diagnose(model, closure_of(model), torch.optim.LBFGS(torch.nn.Linear(2, 2).parameters()), steps=1)


def test_gradients_outside_the_model_do_not_add_up():
    model, outside = network(), torch.nn.Parameter(torch.ones(3))
    seen = []

    def closure():
        model(torch.randn(8, N)).sum().backward()
        outside.sum().backward()
        seen.append(outside.grad.clone())

    diagnose(model, closure, optim.RiemannianSGD([*model.parameters(), outside], lr=1e-3), steps=3, verbose=False)
    assert all(torch.equal(grad, torch.ones(3)) for grad in seen)
    assert outside.grad is None
    assert torch.equal(outside, torch.ones(3))


def test_everything_else_is_put_back_where_something_cannot_be():
    model = network()
    with torch.inference_mode():
        model.register_buffer("made_in_inference", torch.ones(2))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("resized", torch.ones(2))
    model[0].weight.grad = torch.ones(N, N)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = closure_of(model)

    def closure():
        plain()
        model.resized.resize_(5)
        model[4].weight.requires_grad_(False)

    diagnose(model, closure, optim.RiemannianSGD(model.parameters(), lr=1e-3), steps=2, verbose=False)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(model[0].weight.grad, torch.ones(N, N))
    assert torch.equal(model.resized, torch.ones(2))
    assert model[4].weight.requires_grad
