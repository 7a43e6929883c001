"""Weights of other modules: anything may stand in for them in a forward pass; which may be unitary; what is lost.

The oracle of a forward pass is ``torch.nn.functional.linear`` with the values that stand in, to equality or rounding;
that of a point is SciPy's polar decomposition in double precision.
"""

import copy
import gc
import pickle
import weakref

import geoopt
import pytest
import scipy.linalg
import torch
from helpers import bound, error
from torch import nn
from torch.nn.utils import parametrize, prune

from projunn_manifold import UnitaryLowRank, check_manifolds, fold, manifolds_of, optim, reattach_manifolds, unitarize
from projunn_manifold.layers import UnitaryLinear, UnitaryRNN, plain_, unitary_

linear = torch.nn.functional.linear


def converted(*shape):
    torch.manual_seed(0)
    return unitary_(nn.Linear(*(shape or (8, 8)), dtype=torch.float64))


def polar(w):
    return torch.from_numpy(scipy.linalg.polar(w.detach().double().numpy())[0])


# -- forward passes ------------------------------------------------------------------------------------------


class Twice(nn.Module):
    def forward(self, w):
        return 2 * w


def by_functional_call(m, x):
    other = torch.randn(8, 8, dtype=x.dtype)
    return torch.func.functional_call(m, {"weight": other}, (x,)), linear(x, other, m.bias)


def by_replica(m, x):
    replica = m._replicate_for_data_parallel()  # as torch.nn.DataParallel does
    for name, p in m._parameters.items():
        setattr(replica, name, p.detach().as_subclass(torch.Tensor).clone())
    return replica(x), linear(x, m.weight, m.bias)


def by_parametrization(m, x):
    w = m.weight.detach().clone()
    parametrize.register_parametrization(m, "weight", Twice())
    return m(x), linear(x, 2 * w, m.bias)


def by_pruning(m, x):
    prune.l1_unstructured(m, "weight", 0.5)
    mask = m.weight_orig.abs() >= m.weight_orig.abs().flatten().sort().values[32]
    return m(x), linear(x, m.weight_orig * mask, m.bias)


def by_spectral_norm(m, x):
    w = m.weight.detach().clone()
    nn.utils.parametrizations.spectral_norm(m)
    return m.eval()(x), linear(x, w, m.bias)  # the norm of a unitary matrix is one


def by_old_spectral_norm(m, x):
    w = m.weight.detach().clone()
    nn.utils.spectral_norm(m)
    return m(x), linear(x, w, m.bias)


def by_swap(m, x):
    other = nn.Parameter(torch.randn(8, 8, dtype=x.dtype))
    values = other.detach().clone()
    torch.utils.swap_tensors(m.weight, other)
    return m(x), linear(x, values, m.bias)


def by_export(m, x):
    return torch.export.export(m, (x,)).module()(x), linear(x, m.weight, m.bias)


def by_deepcopy(m, x):
    return copy.deepcopy(m)(x), linear(x, m.weight, m.bias)


def by_pickle(m, x):
    return pickle.loads(pickle.dumps(m))(x), linear(x, m.weight, m.bias)


def by_to_empty(m, x):
    w = m.weight.detach().clone()
    m.to("meta").to_empty(device="cpu").load_state_dict({"weight": w, "bias": torch.zeros(8)}, strict=False)
    return m(x), linear(x, w)


STAND_INS = [
    by_functional_call,
    by_replica,
    by_parametrization,
    by_pruning,
    by_spectral_norm,
    by_old_spectral_norm,
    by_swap,
    by_export,
    by_deepcopy,
    by_pickle,
    by_to_empty,
]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch's own older ways
@pytest.mark.parametrize("stand_in", STAND_INS, ids=lambda f: f.__name__[3:])
def test_anything_may_stand_in_for_a_weight_in_a_forward_pass(stand_in):
    m = converted()
    x = torch.randn(3, 8, dtype=torch.float64)
    found, expected = stand_in(m, x)
    torch.testing.assert_close(found, expected)


def test_an_ensemble_runs_under_vmap():
    models = [unitary_(nn.Linear(8, 8)) for _ in range(3)]
    params, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    x = torch.randn(2, 8)
    found = torch.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (x,)))(params, buffers)
    torch.testing.assert_close(found, torch.stack([m(x) for m in models]))


@pytest.mark.filterwarnings("ignore:unitary weights become torch.float16:RuntimeWarning")
def test_half_precision_runs_forward_and_is_refused_by_a_step():
    m = converted().half()
    x = torch.randn(3, 8).half()
    torch.testing.assert_close(m(x), linear(x, m.weight, m.bias))
    m(x).sum().backward()
    with pytest.raises(TypeError, match=r"float16.*autocast"):
        optim.RiemannianSGD(m.parameters(), lr=0.1).step()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("stand_in", [by_parametrization, by_pruning, by_spectral_norm])
def test_a_weight_that_was_renamed_is_trained_on_its_manifold_and_loaded_back_to_it(stand_in):
    m = converted()
    stand_in(m, torch.randn(3, 8, dtype=torch.float64))
    (name,) = manifolds_of(m)
    m.load_state_dict({key: value.clone() for key, value in m.state_dict().items()}, assign=True)
    assert isinstance(m.get_parameter(name), geoopt.ManifoldParameter)
    before = m.get_parameter(name).detach().clone()
    m.train()(torch.randn(3, 8, dtype=torch.float64)).square().sum().backward()
    optim.RiemannianSGD(m.parameters(), lr=0.1).step()
    after = m.get_parameter(name).detach()
    assert not torch.equal(after, before)
    assert error(after.mT @ after, torch.eye(8)) <= bound(torch.float64)


# -- manifolds that are lost ---------------------------------------------------------------------------------


def lost_by_to_empty(m):
    values = {key: value.clone() for key, value in m.state_dict().items() if "manifold" not in key}
    m.to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for name, value in values.items():
            m.get_parameter(name).copy_(value)


def lost_by_swap(m):
    torch.utils.swap_tensors(m.weight, nn.Parameter(m.weight.detach().as_subclass(torch.Tensor).clone()))


def lost_by_assignment(m):
    m.weight = nn.Parameter(m.weight.detach().as_subclass(torch.Tensor).clone())


@pytest.mark.parametrize("lose", [lost_by_to_empty, lost_by_swap, lost_by_assignment])
@pytest.mark.parametrize(
    "make", [lambda: unitary_(nn.Linear(8, 8)), lambda: UnitaryLinear(8, 8)], ids=["foreign", "own"]
)
def test_a_lost_manifold_is_in_the_plan_named_and_put_back(make, lose):
    model = nn.Sequential(nn.Linear(8, 8), make())
    lose(model[1])
    if lose is lost_by_to_empty and isinstance(model[1], UnitaryLinear):
        check_manifolds(model, manifolds_of(model))  # our layers do not lose it by this
        return
    assert manifolds_of(model).keys() == {"1.weight"}
    with pytest.raises(ValueError, match=r"manifolds lost: '1.weight' is a plain Parameter, not on UnitaryLowRank"):
        check_manifolds(model, manifolds_of(model))
    values = model[1].weight.detach().clone()
    reattach_manifolds(model, manifolds_of(model))
    check_manifolds(model, manifolds_of(model))
    assert torch.equal(model[1].weight, values)
    assert model[1].weight.manifold is next(m for m in model[1].children() if isinstance(m, UnitaryLowRank))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_guarded_by_itself(copied):
    model = converted()
    other = copied(model)
    lost_by_assignment(other)
    with pytest.raises(ValueError, match="manifolds lost"):
        check_manifolds(other, manifolds_of(other))
    check_manifolds(model, manifolds_of(model))
    other.load_state_dict(other.state_dict(), assign=True)
    assert other.weight.manifold is other.weight_manifold
    assert other.weight_manifold is not model.weight_manifold


def test_a_guard_does_not_keep_its_module_alive():
    gc.disable()
    try:
        module = weakref.ref(converted())
        assert module() is None
    finally:
        gc.enable()


def test_a_weight_that_lost_its_manifold_can_be_set_free():
    m = converted()
    lost_by_assignment(m)
    plain_(m)
    assert not manifolds_of(m)
    m(torch.randn(2, 8, dtype=torch.float64)).sum().backward()
    optim.RiemannianSGD(m.parameters(), lr=0.1).step()
    m.load_state_dict(m.state_dict(), assign=True)
    assert type(m.weight) is nn.Parameter
    w = m.weight.detach().clone()
    m.reset_parameters()
    assert not torch.equal(m.weight, w)
    assert torch.linalg.svdvals(m.weight)[-1] < 0.9  # torch's own values
    with pytest.raises(TypeError, match="must be on a manifold"):
        plain_(m)


# -- which weights -------------------------------------------------------------------------------------------


class Heads(nn.Module):
    def __init__(self, *shape, dtype=torch.float32):
        super().__init__()
        self.rotation = nn.Parameter(torch.randn(shape, dtype=dtype))


@pytest.mark.parametrize("shape", [(4, 8, 8), (2, 3, 6, 4), (5, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128], ids=str)
def test_a_stack_of_matrices_is_taken(shape, dtype):
    heads = Heads(*shape, dtype=dtype)
    before = heads.rotation.detach().clone()
    unitary_(heads, "rotation", k=2)
    for found, w in zip(
        heads.rotation.flatten(0, -3) if len(shape) > 2 else [heads.rotation],
        before.flatten(0, -3) if len(shape) > 2 else [before],
        strict=True,
    ):
        expected = torch.from_numpy(scipy.linalg.polar(w.to(torch.complex128).numpy())[0])
        assert error(found.detach().to(torch.complex128), expected) <= bound(dtype)
    with pytest.raises(ValueError, match=r"Heads.rotation is on a manifold already"):
        unitary_(heads, "rotation")


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        (nn.Linear(8, 8).bfloat16(), "weight", "bfloat16; keep the parameter in float32 or complex64 .*autocast"),
        (nn.Linear(8, 8).half(), "weight", "float16; keep the parameter in float32 or complex64 .*autocast"),
        (nn.LazyLinear(4), "weight", "no shape yet"),
        (nn.Linear(8, 8), "bias", "at least 2 dimensions"),
        (Heads(3, 2, 4), "rotation", "square or tall"),
        (nn.ConvTranspose1d(4, 4, 3), "weight", "kernel"),
    ],
)
def test_what_cannot_be_unitary_is_refused_before_anything_is_changed(module, name, message):
    before, parts = getattr(module, name), list(module.modules())
    with pytest.raises(ValueError, match=message):
        unitary_(module, name)
    assert getattr(module, name) is before
    assert list(module.modules()) == parts
    assert not module._load_state_dict_post_hooks


def test_a_weight_that_is_computed_from_another_is_refused():
    pruned = prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    for module in (pruned, normed):
        with pytest.raises(TypeError, match="must be a parameter, got Tensor: remove the pruning or parametrisation"):
            unitary_(module)


# -- rank ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n", [300, 700, pytest.param(2048, marks=pytest.mark.slow)])
def test_torchs_first_values_have_full_rank(n, seed):
    torch.manual_seed(seed)
    module = nn.Linear(n, n)
    s = torch.linalg.svdvals(module.weight.detach().double())
    expected = polar(module.weight)
    unitary_(module)
    assert error(module.weight, expected) <= bound(torch.float32)
    assert s[-1] < 1e-2  # and yet the smallest singular value is small


def singular(n, dtype):
    """A matrix whose smallest singular value is what rounding to the dtype leaves of zero."""
    u, v = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for _ in range(2))
    s = torch.linspace(1, 0.5, n, dtype=torch.float64)
    s[-1] = 0
    return (u * s @ v).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [2, 5, 40, 300])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_weight_that_is_singular_in_its_own_precision_is_refused_in_the_same_words(n, dtype, scale):
    torch.manual_seed(n)
    w = singular(n, dtype) * scale
    told = []
    for make_unitary in (unitary_, unitarize):
        model = nn.Sequential(nn.Linear(n, n, dtype=dtype))
        model[0].weight.data = w.clone()
        with pytest.raises(ValueError, match=f"rank deficient in {dtype}") as caught:
            make_unitary(model[0] if make_unitary is unitary_ else model)
        assert torch.equal(model[0].weight, w)
        told.append(str(caught.value))
    assert told[1] == f"0.weight: {told[0]}"
    well = torch.linalg.svd(w.double() / scale)
    smallest = well.S[-2].item() * 1e-5  # small, but no rounding
    mended = (well.U * torch.cat((well.S[:-1], torch.tensor([smallest]))) @ well.Vh * scale).to(dtype)
    model[0].weight.data = mended.clone()
    unitary_(model[0])
    tolerance = bound(dtype, smallest=smallest if dtype == torch.float64 else 1.0)  # it is computed in double precision
    assert error(model[0].weight, polar(mended.double() / scale)) <= tolerance


# -- first values, and the meta device -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nn.Linear(6, 9), "weight"),
        (lambda: nn.RNN(3, 7, 2), "weight_hh_l1"),
        (lambda: nn.RNNCell(3, 7), "weight_hh"),
    ],
    ids=["Linear", "RNN", "RNNCell"],
)
@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_new_values_are_the_modules_own_at_their_closest_point(make, name, where):
    with torch.device(where):
        module = unitary_(make(), name)
    manifold = getattr(module, name).manifold
    assert getattr(module, name).device.type == where
    module.to_empty(device="cpu")
    torch.manual_seed(5)
    module.reset_parameters()
    plain = make()
    torch.manual_seed(5)
    plain.reset_parameters()
    for own, p in plain.named_parameters():
        found = getattr(module, own)
        assert error(found[None], (polar(p) if own == name else p)[None]) <= bound(torch.float32)
    assert getattr(module, name).manifold is manifold
    check_manifolds(module, manifolds_of(module))
    plain_(module, name)
    module.reset_parameters()
    assert torch.linalg.svdvals(getattr(module, name))[-1] < 0.9


def test_a_model_from_the_meta_device_takes_a_checkpoint():
    with torch.device("meta"):
        model = nn.Sequential(unitary_(nn.Linear(8, 8)), nn.Linear(8, 2))
    state = nn.Sequential(unitary_(nn.Linear(8, 8)), nn.Linear(8, 2)).state_dict()
    model.load_state_dict(state, assign=True)
    assert torch.equal(model[0].weight, state["0.weight"])
    assert model[0].weight.manifold is model[0].weight_manifold
    model(torch.randn(2, 8)).sum().backward()
    optim.RiemannianSGD(model.parameters(), lr=0.1).step()
    assert error(model[0].weight.mT @ model[0].weight, torch.eye(8)) <= bound(torch.float32)


@pytest.fixture
def swapping():
    """Conversions swap tensors, as torch can be told to."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.parametrize("convert", [lambda m: m.load_state_dict(m.state_dict()), lambda m: m.double()])
@pytest.mark.parametrize("make", [lambda: UnitaryLinear(6, 6), lambda: UnitaryRNN(6, 6)], ids=["linear", "rnn"])
def test_an_optimiser_keeps_a_weight_that_a_conversion_swaps(swapping, make, convert):
    m = make()
    optimizer = optim.RiemannianSGD(m.parameters(), lr=0.1)
    [(name, manifold)] = manifolds_of(m).items()
    for _ in range(3):  # also after steps, when manifolds know the weight
        convert(m)
        weight = m.get_parameter(name)
        before = weight.detach().clone()
        optimizer.zero_grad()
        output = m(torch.ones(2, 3, 6, dtype=weight.dtype))
        (output if isinstance(output, torch.Tensor) else output[0]).sum().backward()
        optimizer.step()
        assert weight is m.get_parameter(name)
        assert weight.manifold is manifold
        assert torch.linalg.matrix_norm(weight.detach() - before) > 1e-3


def pruned(m):
    prune.l1_unstructured(m, "weight", 0.3)


def normed(m):
    nn.utils.parametrizations.spectral_norm(m)


@pytest.mark.parametrize("change", [pruned, normed])
@pytest.mark.parametrize("undo", [plain_, lambda m: fold(nn.Sequential(m))[0]], ids=["plain_", "fold"])
def test_a_pruned_or_parametrised_weight_becomes_free(change, undo):
    m = unitary_(nn.Linear(6, 6))
    change(m)
    values = m(torch.eye(6)).detach()
    m = undo(m)
    assert not any(isinstance(p, geoopt.ManifoldTensor) for p in m.parameters())
    assert not [key for key in m.state_dict() if "manifold" in key]
    assert error(m(torch.eye(6)).detach(), values) <= bound(torch.float32)
    optimizer = torch.optim.SGD(m.parameters(), 0.1)
    m(torch.ones(2, 6)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("change", [pruned, normed])
@pytest.mark.parametrize(
    "make", [lambda: UnitaryLinear(6, 6), lambda: unitary_(nn.Linear(6, 6))], ids=["ours", "torch's"]
)
def test_a_pruned_or_parametrised_weight_is_loaded_as_torch_does(change, make):
    m, states = make(), make().state_dict()
    change(m)
    missing, unexpected = m.load_state_dict(states, strict=False)
    assert "weight" in unexpected
    assert any("weight" in key for key in missing)
    own = m.state_dict()
    [key] = [key for key in own if key.endswith(("weight_orig", "weight.original"))]
    m.load_state_dict(own)
    plain = {name: value for name, value in own.items() if not name.endswith("_extra_state")} | {key: 2 * own[key]}
    with pytest.raises(ValueError, match="is off the manifold"):
        m.load_state_dict(plain, strict=False)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("make", [lambda: UnitaryLinear(6, 6), lambda: unitary_(nn.Linear(6, 6))])
def test_a_weight_that_is_normalised_has_lost_its_manifold(make):
    m = make()
    nn.utils.weight_norm(m)
    optimizer = optim.RiemannianSGD(m.parameters(), lr=0.1)
    m(torch.ones(2, 6)).sum().backward()
    before = {name: p.detach().clone() for name, p in m.named_parameters()}
    with pytest.raises(ValueError, match=r"lost its manifold.*weight_v"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in m.named_parameters())


@pytest.mark.parametrize("call", [unitary_, plain_])
def test_a_misspelt_name_gets_the_names_that_there_are(call):
    with pytest.raises(AttributeError, match=r"Linear has no parameter 'weihgt'; .* 'weight', 'bias'"):
        call(unitary_(nn.Linear(6, 6)) if call is plain_ else nn.Linear(6, 6), "weihgt")
    with pytest.raises(AttributeError, match=r"ReLU has no parameter 'weight'; .* none"):
        call(nn.ReLU())
