"""Tutorials run as they stand, and the number at the end of each page is what the page says."""

import runpy

import matplotlib
import pytest
import torch
from helpers import ROOT

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
    signals, gradients = names["after"]
    assert min(signals) > 0.2 * max(signals)
    assert min(gradients) > 0.2 * max(gradients)
    lost, faint = names["at_start"]["nn.Linear"]
    assert lost[-1] < 1e-4 * lost[0]
    assert faint[0] < 1e-4 * faint[-1]
    assert len(figures) == 1


def test_a_rotation_in_front_adapts_better_than_all_weights_and_leaves_them(run):
    names, figures = run("plot_5_finetuning.py")
    assert names["gain"] > 0.02
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
