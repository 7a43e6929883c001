"""Tutorials run as they stand, and the number at the end of each page is what the page says."""

import runpy

import matplotlib
import pytest
import torch
from helpers import ROOT, bound, error

pytestmark = pytest.mark.site
TUTORIALS = ROOT / "examples" / "tutorials"


@pytest.fixture
def run(monkeypatch):
    """Return a function that runs a tutorial and returns its names, and the figures that it drew."""
    monkeypatch.setitem(matplotlib.rcParams, "backend", "agg")
    from matplotlib import pyplot

    state = torch.get_rng_state()
    yield lambda name: (runpy.run_path(str(TUTORIALS / name)), pyplot.get_fignums())
    pyplot.close("all")
    torch.set_rng_state(state)


def test_a_deep_orthogonal_network_learns_where_a_plain_one_does_not(run):
    names, figures = run("plot_1_start.py")
    assert names["accuracy"] > 0.85
    assert names["accuracy_plain"] < 0.5
    signals, gradients = names["curves"]["UnitaryLinear, after training"][0]
    assert min(signals) > 0.2 * max(signals)
    assert min(gradients) > 0.2 * max(gradients)
    lost, faint = names["at_start"]["nn.Linear"]
    assert lost[-1] < 1e-4 * lost[0]
    assert faint[0] < 1e-4 * faint[-1]
    assert len(figures) == 1


def test_a_rotation_in_front_adapts_better_than_all_weights_and_leaves_them(run):
    names, figures = run("plot_5_finetuning.py")
    assert names["gain"] > 0.01
    torch.manual_seed(0)
    network, optimizer = names["rotation"](names["base"])
    before = [p.clone() for p in names["base"].parameters()]
    names["fit"](network, optimizer, names["turned"], names["labels"], 3)
    assert all(map(torch.equal, before, names["base"].parameters()))
    r = network[0].weight.detach().double()
    assert torch.dist(r, torch.eye(64, dtype=torch.float64)) > 0.1
    w = before[0].double()
    torch.testing.assert_close(w @ r @ r.mT @ w.mT, w @ w.mT, rtol=1e-5, atol=1e-5)  # angles between neurons
    assert len(figures) == 1


def test_no_change_below_a_certified_size_makes_an_answer_wrong(run):
    names, figures = run("plot_3_convolution.py")
    assert names["certified"]["orthogonal"][3] > 0.65
    assert names["certified"]["plain"][3] < 0.2
    network, images, labels = names["orthogonal"], names["images"][names["test"]], names["labels"][names["test"]]
    sizes = names["radii"](network, 1.0)
    x, y = images[sizes > 0], labels[sizes > 0]
    x.requires_grad_(True)
    (climb,) = torch.autograd.grad(torch.nn.functional.cross_entropy(network(x), y), x)
    for direction in (climb, torch.randn(x.shape)):
        change = direction / direction.flatten(1).norm(dim=1)[:, None, None, None]
        assert torch.equal(network(x + 0.999 * sizes[sizes > 0][:, None, None, None] * change).argmax(-1), y)
    assert len(figures) == 1


def test_a_trained_network_made_unitary_learns_on_and_folds_back(run):
    names, figures = run("plot_4_pretrained.py")
    assert names["after"][1] > 0.8
    assert names["after"][1] > names["from_scratch"][1] + 0.3
    hidden = names["folded"][:-1:2]
    assert all(type(layer) is torch.nn.Linear and type(layer.weight) is torch.nn.Parameter for layer in hidden)
    for layer in hidden:
        w = layer.weight.detach().double()
        assert error(w.mT @ w, torch.eye(64)) < bound(torch.float32)
    assert torch.equal(names["folded"](names["images"][names["test"]]), names["outputs"])
    assert len(figures) == 1


def test_a_unitary_network_remembers_and_its_matrix_learns(run):
    names, figures = run("plot_2_recurrent.py")
    assert names["shares"]["UnitaryRNN"] < 0.5
    assert names["shares"]["UnitaryRNN, frozen"] < 0.5  # as the page says
    assert names["shares"]["nn.RNN"] > 1
    assert names["accuracy"]["UnitaryRNN"] > names["accuracy"]["UnitaryRNN, frozen"] + 0.05
    assert len(figures) == 1
