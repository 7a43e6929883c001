"""FactoredTensor never loses a term: every operation gives what the dense tensor gives, written in either state.

The oracle is the same operation on plain dense tensors.  The wrapper's danger is silent (PyTorch hands back
the tensor an in-place operator was called on), so in-place operators, views, aliases, lists of tensors and
the optimisers that combine them are all run on it.
"""

import copy
import io
import os
import pickle

import geoopt
import numpy as np
import pytest
import torch
from helpers import DTYPES, bound, error
from torch.utils._python_dispatch import TorchDispatchMode

from projunn_manifold import UnitaryLowRank
from projunn_manifold.layers import UnitaryRNN
from projunn_manifold.optim import RiemannianAdam, RiemannianSGD
from projunn_manifold.sketching.factored_tensor import FactoredTensor
from projunn_manifold.sketching.lowrank import LowRank

SHAPES = [(6, 6), (3, 9, 6)]


def is_factored(t):
    return isinstance(t, FactoredTensor) and t.factors is not None


@pytest.fixture(params=["LowRank", "RankOneTangent", "FramedTangent"])
def pair(request, draw):
    """A factored tensor with the dense tensor it stands for."""

    def make(shape=(6, 6), dtype=torch.float64):
        a, b = draw.factors(shape, 1 if request.param == "RankOneTangent" else 2, dtype)
        if request.param == "LowRank":
            t = FactoredTensor(LowRank(a, b))
            return t, a @ b.mH
        x = draw.point(*shape, dtype=dtype)
        with torch.no_grad():
            t = UnitaryLowRank(a.shape[-1]).egrad2rgrad(x, a @ b.mH)
        return t, t.clone()

    return make


READING = {
    "norm": torch.linalg.matrix_norm,
    "sum": torch.sum,
    "product with a matrix": lambda t: t @ torch.ones(t.shape[-1], 2, dtype=t.dtype),
    "elementwise product": lambda t: t * t,
    "to another dtype": lambda t: t.to(torch.complex64),
    "stack": lambda t: torch.stack([t, t]),
    "cat": lambda t: torch.cat([t, t], -1),
    "zeros_like": torch.zeros_like,
    "complex scalar": lambda t: t * 1j,
    "matrix-shaped scale": lambda t: t * torch.full((1, 1), 2.0, dtype=torch.float64),
    "division by zero": lambda t: (t / 0.0).nan_to_num(7.0),
    "addcmul": lambda t: torch.ones_like(t).addcmul_(t, t, value=0.5),
    "lerp": lambda t: torch.ones_like(t).lerp_(t, 0.25),
    "copy_ into": lambda t: torch.ones_like(t).copy_(t),
    "add_ other dtype": lambda t: torch.zeros(t.shape, dtype=torch.complex128).add_(t),
    "add_ broadcast": lambda t: torch.zeros(2, *t.shape, dtype=t.dtype).add_(t),
    "foreach add": lambda t: torch._foreach_add([torch.ones_like(t)], [t], alpha=2.0)[0],
    "foreach norm": lambda t: torch._foreach_norm([t])[0],
    "get_total_norm": lambda t: torch.nn.utils.get_total_norm([t]),
    "isfinite": torch.isfinite,
    "max": lambda t: t.real.max() if t.is_complex() else t.max(),
}

KEEPING = {
    "negative": lambda t: -t,
    "python scale": lambda t: -0.5 * t,
    "integer scale": lambda t: t * 3,
    "tensor scale": lambda t: torch.tensor(0.3) * t,
    "quotient": lambda t: t / 4,
    "tensor quotient": lambda t: t / torch.tensor(4.0, dtype=torch.float64),
    "detach": lambda t: t.detach(),
    "data": lambda t: t.data,
    "mul_": lambda t: t.mul_(0.5),
    "mul_ tensor": lambda t: t.mul_(torch.tensor(0.25)),
    "div_": lambda t: t.div_(3.0),
    "add_ of nothing": lambda t: t.add_(torch.ones_like(t), alpha=0),
}

WRITING = {
    "add_": lambda t: t.add_(torch.ones(t.shape, dtype=t.dtype)),
    "add_ itself": lambda t: t.add_(t, alpha=0.5),
    "sub_": lambda t: t.sub_(2),
    "mul_ elementwise": lambda t: t.mul_(torch.full(t.shape, 2.0, dtype=t.dtype)),
    "zero_": lambda t: t.zero_(),
    "copy_": lambda t: t.copy_(torch.ones(t.shape, dtype=t.dtype)),
    "copy_ reduced": lambda t: t.copy_(t.detach().clone() / 2),
    "addcmul_": lambda t: t.addcmul_(torch.ones(t.shape, dtype=t.dtype), torch.ones(t.shape, dtype=t.dtype)),
    "lerp_": lambda t: t.lerp_(torch.ones(t.shape, dtype=t.dtype), 0.5),
    "setitem": lambda t: t.__setitem__((..., 0), 5.0),
    "write through a view": lambda t: t.flatten().mul_(2.0),
    "write through a row": lambda t: t[..., 0, :].add_(1.0),
    "write through detach": lambda t: t.detach().add_(1.0),
    "write through data": lambda t: t.data.add_(1.0),
    "scale through detach": lambda t: t.detach().mul_(2.0),
    "assign data": lambda t: setattr(t, "data", torch.full(t.shape, 7.0, dtype=t.dtype)),
    "out=": lambda t: torch.add(t.clone(), 1.0, out=t),
    "foreach mul": lambda t: torch._foreach_mul_([t], torch.tensor(0.5, dtype=torch.float64)),
    "foreach add": lambda t: torch._foreach_add_([t], 1.0),
    "clip by norm": lambda t: torch.nn.utils.clip_grads_with_norm_([with_grad(t)], 1e-3, t.norm(), foreach=False),
    "clip by norm, foreach": lambda t: torch.nn.utils.clip_grads_with_norm_(
        [with_grad(t)], 1e-3, t.norm(), foreach=True
    ),
}


def with_grad(t):
    p = torch.nn.Parameter(torch.zeros(t.shape, dtype=t.dtype))
    p.grad = t
    return p


@pytest.mark.parametrize("operation", READING)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_reading_sees_the_matrix_and_keeps_the_factors(pair, operation, shape, dtype):
    t, dense = pair(shape, dtype)
    result, expected = READING[operation](t), READING[operation](dense)
    assert type(result) is torch.Tensor
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(t.clone(), dense)
    assert is_factored(t)


@pytest.mark.parametrize("operation", KEEPING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaling_keeps_the_factors(pair, operation, dtype):
    t, dense = pair((6, 6), dtype)
    result, expected = KEEPING[operation](t), KEEPING[operation](dense)
    assert is_factored(result)
    assert error(result.clone(), expected) <= bound(dtype)
    assert error(t.clone(), dense) <= bound(dtype)  # changed only where the dense one was


@pytest.mark.parametrize("operation", WRITING)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_writing_reaches_the_tensor_and_every_alias(pair, operation, shape, dtype):
    t, dense = pair(shape, dtype)
    alias = t.detach()
    WRITING[operation](t)
    WRITING[operation](dense)
    torch.testing.assert_close(t.clone(), dense)
    torch.testing.assert_close(alias.clone(), dense)
    t.add_(1.0)  # a second write, in whatever state the first one left
    torch.testing.assert_close(t.clone(), dense.add_(1.0))


@pytest.mark.parametrize("operation", ["add_", "sub_", "zero_", "copy_", "out="])
def test_writing_returns_the_tensor_itself(pair, operation):
    t, _ = pair()
    assert WRITING[operation](t) is t


class NoNewMatrix(TorchDispatchMode):
    """Fail if an operator returns a new matrix of the whole shape."""

    def __init__(self, buffer):
        super().__init__()
        self.buffer = buffer

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        assert result.shape != self.buffer.shape or result.data_ptr() == self.buffer.data_ptr(), func
        return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("alpha", [1, -0.25, 0.0])
def test_adding_to_a_buffer_uses_the_factors(pair, shape, alpha, dtype):
    t, dense = pair(shape, dtype)
    for buffer in (torch.ones(shape, dtype=dtype), torch.ones(shape, dtype=dtype).mT.contiguous().mT):
        expected = buffer + alpha * dense
        with NoNewMatrix(buffer):
            assert buffer.add_(t, alpha=alpha) is buffer
        assert error(buffer, expected) <= bound(dtype)
    assert is_factored(t)


def test_adding_to_a_buffer_of_any_batch(pair):
    t, dense = pair((2, 2, 7, 5), torch.float64)
    assert error(torch.ones_like(dense).add_(t, alpha=2.0), 1 + 2 * dense) <= bound(torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clones_and_copies_are_plain_and_contiguous(pair, dtype):
    t, dense = pair((3, 9, 6), dtype)
    buffer = io.BytesIO()
    torch.save(t, buffer)
    buffer.seek(0)
    copies = [t.clone(), copy.deepcopy(t), pickle.loads(pickle.dumps(t)), torch.load(buffer), torch.clone(t)]
    for other in copies:
        assert type(other) is torch.Tensor
        assert other.is_contiguous()
        assert error(other, dense) <= bound(dtype)
    assert is_factored(t)
    assert "factor" in repr(t).lower()


def test_it_passes_through_autograd_as_grad(draw):
    """Two backward calls accumulate exactly, whatever state .grad is in."""
    a, b = draw.factors((5, 5), 2, torch.float64)

    class Weight(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return w.sum()

        @staticmethod
        def backward(ctx, grad):
            return FactoredTensor(LowRank(a, b))

    for calls in (1, 2, 3):
        w = torch.nn.Parameter(torch.zeros(5, 5, dtype=torch.float64))
        for _ in range(calls):
            Weight.apply(w).backward()
        assert error(w.grad.clone(), calls * (a @ b.mH)) <= bound(torch.float64)
    w.grad.zero_()
    assert not w.grad.any()
    w.grad = None
    (Weight.apply(w) + w.square().sum() + w.sum()).backward()  # a factored and a dense gradient in one call
    assert error(w.grad.clone(), a @ b.mH + 1) <= bound(torch.float64)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p, f: torch.optim.SGD(p, lr=0.1, foreach=f),
        lambda p, f: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=f),
        lambda p, f: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=f),
        lambda p, f: torch.optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True, foreach=f),
        lambda p, f: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, foreach=f),
        lambda p, f: torch.optim.AdamW(p, lr=0.1, amsgrad=True, foreach=f),
    ],
    ids=["sgd", "momentum", "nesterov", "rmsprop", "adam", "adamw"],
)
def test_torch_optimizers_step_as_with_the_dense_gradient(draw, optimizer, foreach, dtype):
    start = draw.matrix(6, 6, dtype=dtype)
    gradients = [draw.factors((6, 6), 2, dtype) for _ in range(4)]
    weights = []
    for wrap in (True, False):
        w = torch.nn.Parameter(start.clone())
        opt = optimizer([w], foreach)
        for i, (a, b) in enumerate(gradients):
            w.grad = FactoredTensor(LowRank(a, b)) if wrap else a @ b.mH
            if i % 2:
                torch.nn.utils.clip_grad_norm_([w], 0.5, foreach=foreach)
            opt.step()
        for state in opt.state[w].values():
            assert not isinstance(state, FactoredTensor)
        weights.append(w.detach())
    assert error(*weights) <= bound(dtype, 10.0)


def test_adding_a_view_of_the_buffer_to_it(draw):
    x = draw.matrix(5, 5, dtype=torch.float64)
    a = draw.matrix(5, 1, dtype=torch.float64)
    expected = x + a @ x[:, :1].mT.clone()
    assert error(x.add_(FactoredTensor(LowRank(a, x[:, :1]))), expected) <= bound(torch.float64)


@pytest.mark.parametrize("change", [lambda t: t.unsqueeze_(0), lambda t: t.t_(), lambda t: t.share_memory_()])
def test_what_it_cannot_do_it_refuses(pair, change):
    t, dense = pair()
    with pytest.raises(TypeError, match="clone"):
        change(t)
    with pytest.raises(TypeError, match="clone"):
        torch.from_dlpack(t)
    assert error(t.clone(), dense) <= bound(torch.float64)


def reduce_gradients(rank, address, queue):
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    ones = torch.ones(4, 1, dtype=torch.float64)
    results = []
    for reduce in (
        torch.distributed.all_reduce,
        lambda t: torch.distributed.all_reduce(t.data),
        lambda t: torch.distributed.broadcast(t, 1),
    ):
        t = FactoredTensor(LowRank((rank + 1) * ones, ones))
        reduce(t)
        results.append(t.clone()[0, 0].item())
    model = torch.nn.Linear(4, 4, bias=False).double()
    torch.nn.init.zeros_(model.weight)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    FactoredGradient.apply(parallel(torch.ones(1, 4, dtype=torch.float64)), model.weight, rank + 1.0).backward()
    results.append(model.weight.grad[0, 0].item())
    queue.put((rank, results))
    del parallel
    queue.close()
    queue.join_thread()
    torch.distributed.barrier()  # gloo's threads must not be torn down while the other process still talks to them
    torch.distributed.destroy_process_group()
    os._exit(0)  # some of them outlive their group, and would abort the process at its end


class FactoredGradient(torch.autograd.Function):
    """Give the weight a factored gradient of the given size, beside the dense one of the output."""

    @staticmethod
    def forward(ctx, output, weight, size):
        ctx.size = size
        return output.sum() + weight.sum()

    @staticmethod
    def backward(ctx, grad):
        ones = torch.ones(4, 1, dtype=torch.float64)
        return torch.zeros(1, 4, dtype=torch.float64), FactoredTensor(LowRank(ctx.size * ones, ones)), None


def test_collectives_and_ddp_reach_it(tmp_path):
    """Two gloo processes: a sum of 1 and 2, a broadcast of the second, and DDP's mean."""
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    address = f"file://{tmp_path / 'rendezvous'}"
    workers = [context.Process(target=reduce_gradients, args=(rank, address, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    results = dict(queue.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    assert results[0] == results[1] == [3.0, 3.0, 2.0, 1.5]


def test_two_optimizers_share_one_gradient(draw):
    start, (a, b) = draw.matrix(6, 6, dtype=torch.float64), draw.factors((6, 6), 1, torch.float64)
    weights = []
    for grad in (FactoredTensor(LowRank(a, b)), a @ b.mH):
        w = torch.nn.Parameter(start.clone())
        w.grad = grad
        for opt in (torch.optim.SGD([w], lr=0.1, weight_decay=0.3), torch.optim.Adam([w], lr=0.1)):
            opt.step()
        weights.append(w.detach())
    assert error(*weights) <= bound(torch.float64)


def printed(t):
    return f"{t} {t:}", str(t)


def saved(t):
    file = io.BytesIO()
    torch.save(t, file)
    file.seek(0)
    return torch.load(file)


#: What loggers, checkpoints and debuggers read a gradient by; each gives what it gives for the dense tensor.
HANDING_OUT = {
    "numpy, as a histogram is logged": lambda t: t.detach().cpu().numpy(),
    "numpy, forced": lambda t: t.numpy(force=True),
    "asarray": np.asarray,
    "asarray of another dtype": lambda t: np.asarray(t, dtype=np.complex64),
    "array": lambda t: np.array(t.numpy()),
    "numpy of a row": lambda t: t[..., 0, :].numpy(),
    "numpy of the adjoint": lambda t: t.mH.resolve_conj().numpy(),
    "save": saved,
    "pickle": lambda t: pickle.loads(pickle.dumps(t)),
    "deepcopy": copy.deepcopy,
    "tolist": lambda t: t.tolist(),
    "tolist of a view": lambda t: t.flatten().tolist(),
    "item": lambda t: t[..., 1, 2].flatten()[0].item(),
    "print": printed,
    "isnan": lambda t: torch.isnan(t).any(),
    "isfinite": lambda t: torch.isfinite(t).all(),
    "norm": lambda t: t.norm(),
    "norm of data": lambda t: t.data.norm(1),
    "to cpu": lambda t: t.to("cpu") + 0,
    "double": lambda t: t.to(torch.complex128),
    "half": lambda t: t.real.half(),
    "histc": lambda t: torch.histc(t.real, 5),
    "histc of a flat view": lambda t: torch.histc(t.flatten().real, 5),
    "flat, reshaped, without nan": lambda t: t.reshape(-1)[~t.reshape(-1).isnan()],
    "view of a view": lambda t: t.mT.unsqueeze(0)[..., 1:, :2].abs(),
    "transposed and reshaped": lambda t: t.mT.reshape(-1) + 0,
    "diagonal": lambda t: t.diagonal(dim1=-2, dim2=-1) * 2,
    "rows one by one": lambda t: torch.stack([row.sum() for row in t]),
    "chunks": lambda t: torch.stack([part.sum() for part in t.chunk(2, -1)]),
    "strided": lambda t: t.as_strided((2, 2), (1, 2), 3) * 1,
    "parameters_to_vector": lambda t: torch.nn.utils.parameters_to_vector([t]),
    "quantile": lambda t: torch.quantile(t.real, 0.5),
    "einsum": lambda t: torch.einsum("...ij,...ij->...", t, t),
    "a copy by dlpack": lambda t: torch.from_dlpack(t.__dlpack__(copy=True)),
}


def as_tensors(result):
    if isinstance(result, np.ndarray):
        return torch.from_numpy(result.copy())
    return result.clone() if isinstance(result, torch.Tensor) else result


@pytest.mark.parametrize("operation", HANDING_OUT)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_whatever_reads_gets_the_entries_and_the_factors_stay(pair, operation, shape, dtype):
    t, dense = pair(shape, dtype)
    kept = t.factors
    result, expected = (as_tensors(HANDING_OUT[operation](each)) for each in (t, dense))
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(result, expected)
    else:
        assert result == expected
    assert t.factors is kept


@pytest.mark.parametrize("n", [8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_a_gradient_that_was_read_makes_the_same_step_bit_for_bit(draw, n, dtype):
    """geoopt's optimiser and ours in place; a gradient that was read in every way, and one that was not."""
    a, b = draw.factors((n, n), 3, dtype)
    start = draw.point(n, n, dtype=dtype)
    for make in (geoopt.optim.RiemannianSGD, geoopt.optim.RiemannianAdam, RiemannianSGD, RiemannianAdam):
        points = []
        for reads in (False, True):
            w = geoopt.ManifoldParameter(start.clone(), manifold=UnitaryLowRank(1))
            optimizer = make([w], lr=0.1)
            for _ in range(2):
                w.grad = FactoredTensor(LowRank(a, b))
                for read in HANDING_OUT.values() if reads else ():
                    read(w.grad)
                optimizer.step()
            points.append(w.detach())
        assert torch.equal(*points)
        assert error(points[0], start) > 1e-3


def test_an_array_is_read_only_as_long_as_there_are_factors(draw):
    a, b = draw.factors((5, 4), 2, torch.float64)
    t = FactoredTensor(LowRank(a, b))
    for array in (t.numpy(), t.detach().numpy(force=True), np.asarray(t), t[0].numpy(), t.mT.numpy()):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0.0
    assert np.array(t.numpy()).flags.writeable
    t.mul_(2.0)
    assert error(torch.tensor(t.numpy()), 2 * a @ b.mH) <= bound(torch.float64)
    t.add_(1.0)
    t.numpy()[0] = 7.0  # there is memory to share now
    assert (t.clone()[0] == 7.0).all()
    assert t.data_ptr() == t.numpy().ctypes.data


def test_a_pointer_is_refused_with_advice(pair):
    t, dense = pair()
    for refused in (t, t.detach(), t.data, t[0], t.mT):
        with pytest.raises(TypeError, match=r"clone\(\).data_ptr\(\).*p.grad = p.grad.clone\(\)"):
            refused.data_ptr()
    assert is_factored(t)
    torch.testing.assert_close(t.clone(), dense)


def test_a_view_follows_what_happens_to_its_base(pair):
    t, dense = pair((6, 6), torch.float64)
    row, expected = t[1], dense[1]
    list(t)
    for change in (lambda t: t.mul_(3.0), lambda t: t.add_(1.0), lambda t: t[1].mul_(-2.0), lambda t: t.div_(4.0)):
        change(t)
        change(dense)
        torch.testing.assert_close(row.clone(), expected)
        torch.testing.assert_close(t.clone(), dense)
    row.zero_()
    assert not t.clone()[1].any()


def test_views_are_read_from_one_copy(draw):
    """The rows of a gradient are cut out of one matrix, not out of one each."""

    class Counted:
        formed = 0
        like, shape = torch.zeros(40, 2, dtype=torch.float64), torch.Size((40, 40))

        def outer(self):
            self.formed += 1
            return factors

    factors, counted = draw.factors((40, 40), 2, torch.float64), Counted()
    t = FactoredTensor(counted)
    total = sum(row.sum().item() for row in t)
    assert counted.formed == 1
    assert abs(total - t.clone().sum().item()) <= 40 * bound(torch.float64)


def test_an_unwritten_gradient_is_printed_in_short_by_repr(draw):
    t = FactoredTensor(LowRank(*draw.factors((5, 4), 2, torch.float64)))
    assert repr(t) == "FactoredTensor(LowRank, shape=(5, 4), dtype=torch.float64)"
    assert repr(t.mT) == "FactoredTensor(view, shape=(4, 5), dtype=torch.float64)"
    assert str(t) == str(t.clone())
    assert repr(t.add_(1.0)).startswith("FactoredTensor(dense")


def test_the_gradient_of_a_wide_recurrent_network_is_logged():
    """What a histogram of a gradient does, below and above the width from which it is kept as factors."""
    for n in (16, 64):
        torch.manual_seed(0)
        net = UnitaryRNN(3, n)
        net(torch.randn(5, 2, 3))[0].sum().backward()
        factored = [p.grad for p in net.parameters() if is_factored(p.grad)]
        assert bool(factored) is (n == 64)
        for p in net.parameters():
            array = p.grad.detach().cpu().numpy()
            assert np.array_equal(array, p.grad.clone().numpy())
        assert all(map(is_factored, factored))


@pytest.mark.parametrize("shape", [(6, 6), (3, 6, 6)], ids=str)
def test_factors_of_no_columns_are_a_zero_gradient(draw, path, shape):
    x, manifold = draw.point(*shape, dtype=torch.float64), UnitaryLowRank(1)
    factors = torch.zeros(2, *shape[:-1], 0, dtype=x.dtype)
    with torch.no_grad():
        nothing = manifold.egrad2rgrad(x, FactoredTensor(LowRank(*factors)))
        assert torch.equal(manifold.retr(x, nothing), x)
    assert not nothing.clone().any()
