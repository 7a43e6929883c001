"""Lightning trains, averages and resumes a model with unitary weights as it does any other."""

import lightning
import pytest
import torch
from helpers import bound, double, error
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from network import Network, assert_same, assert_unitary, batches, seeded, unitarity_errors
from torch import nn
from torch.utils.data import DistributedSampler

from projunn_manifold import averaging, check_manifolds, manifolds_of, monitor, optim

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*to use 'litlogger' or 'litmodels'"),
]


class Regression(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = Network()

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.mse_loss(self.network(x), y)

    def configure_optimizers(self):
        return optim.RiemannianAdam(self.parameters(), lr=0.05)


class Watched(Regression):
    def on_train_batch_end(self, outputs, batch, index):
        if index % self.trainer.log_every_n_steps == 0:
            self.log_dict(monitor(self, self.optimizers()))


class ByHand(Regression):
    """Constrains an optimiser of torch that Lightning has wrapped, and calls its steps."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return torch.optim.RMSprop(self.parameters(), lr=0.01)

    def on_train_start(self):
        optim.constrain(self.optimizers())
        check_manifolds(self, manifolds_of(self), self.optimizers())

    def training_step(self, batch, index):
        self.optimizers().zero_grad()
        self.manual_backward(super().training_step(batch, index))
        self.optimizers().step()


class UnitaryEMA(EMAWeightAveraging):
    """Averages that are projected to the manifold."""

    def setup(self, trainer, pl_module, stage):
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            options = {"use_buffers": True, **self._kwargs}
            self._average_model = averaging.AveragedModel(pl_module, **options)


class Recorder(lightning.Callback):
    """Keeps the weights after each step."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.weights.append(double(pl_module.network.linear.weight.detach()).clone())


class SaveAtTheEndOfAnEpoch(lightning.Callback):
    def __init__(self, path, epoch):
        self.path, self.epoch = path, epoch

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def put_back(model):
    """Put every unitary weight at the closest point of its manifold."""
    with torch.no_grad():
        for name in manifolds_of(model):
            model.get_parameter(name).proj_()


def polar(a):
    u, _, vh = torch.linalg.svd(a)
    return u @ vh


def regression(seed=0):
    torch.manual_seed(seed)
    return Regression()


def trainer(epochs, *callbacks, **options):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), log_every_n_steps=1, **quiet, **options
    )


def test_a_run_that_is_resumed_from_a_checkpoint_goes_on_bit_for_bit(tmp_path):
    whole, first, resumed = regression(), regression(), regression(seed=1)
    unbroken, before, after = trainer(4), trainer(2), trainer(4)
    unbroken.fit(whole, batches())
    before.fit(first, batches())
    before.save_checkpoint(tmp_path / "half.ckpt")
    after.fit(resumed, batches(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert_unitary(whole)
    assert_same(resumed.state_dict(), whole.state_dict())
    assert_same(after.optimizers[0].state_dict(), unbroken.optimizers[0].state_dict())
    assert not torch.equal(whole.network.linear.weight, first.network.linear.weight)


def test_a_fit_makes_the_steps_of_a_plain_loop_with_accumulated_and_clipped_gradients():
    model, plain = regression(), seeded()
    trainer(2, accumulate_grad_batches=2, gradient_clip_val=0.1).fit(model, batches())
    optimizer = optim.RiemannianAdam(plain.parameters(), lr=0.05)
    for _ in range(2):
        for index, (x, y) in enumerate(batches()):
            (nn.functional.mse_loss(plain(x), y) / 2).backward()
            if index % 2:
                nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
    assert_unitary(plain)
    assert_same(model.network.state_dict(), plain.state_dict())


def test_numbers_of_all_weights_are_logged():
    torch.manual_seed(0)
    model = Watched()
    fit = trainer(1)
    fit.fit(model, batches())
    numbers = monitor(model, model.optimizers())
    assert set(numbers) == set(fit.logged_metrics)
    for name in ("gradient_norm", "share_kept", "step_length"):
        key = f"network.linear.weight/{name}"
        assert fit.logged_metrics[key].item() == pytest.approx(numbers[key])


def test_weights_stay_in_their_precision_and_unitary_under_mixed_precision():
    model = regression()
    trainer(2, precision="bf16-mixed").fit(model, batches())
    assert model.network.linear.weight.dtype == torch.float32
    assert_unitary(model)


@pytest.mark.filterwarnings("ignore:unitary weights become torch.bfloat16:RuntimeWarning")
def test_weights_in_half_precision_are_refused():
    with pytest.raises(TypeError, match=r"torch\.bfloat16; keep the parameter in float32"):
        trainer(1, precision="bf16-true").fit(regression(), batches())


def test_a_wrapped_optimiser_of_torch_is_constrained():
    torch.manual_seed(0)
    model, plain = ByHand(), seeded()
    trainer(1).fit(model, batches())
    optimizer = torch.optim.RMSprop(plain.parameters(), lr=0.01)
    optim.constrain(optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        nn.functional.mse_loss(plain(x), y).backward()
        optimizer.step()
    assert_unitary(model)
    assert_same(model.network.state_dict(), plain.state_dict())


def test_spawned_processes_hand_the_trained_model_back():
    model, plain = regression(), seeded()
    trainer(2, devices=2, strategy="ddp_spawn").fit(model, batches())
    optimizer = optim.RiemannianAdam(plain.parameters(), lr=0.05)
    samplers = [DistributedSampler(batches().dataset, num_replicas=2, rank=rank) for rank in range(2)]
    for epoch in range(2):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        first, second = map(list, samplers)
        for start in (0, 8):  # a step sees a batch of each process
            x, y = batches().dataset[first[start : start + 8] + second[start : start + 8]]
            optimizer.zero_grad()
            nn.functional.mse_loss(plain(x), y).backward()
            optimizer.step()
    assert_unitary(model)
    torch.testing.assert_close(model.network.state_dict(), plain.state_dict(), rtol=0, atol=bound(torch.float32))


def test_averages_by_our_class_are_polar_factors_of_averages():
    decay, recorder, model = 0.8, Recorder(), regression()
    trainer(3, UnitaryEMA(decay=decay), recorder).fit(model, batches())
    expected = recorder.weights[0]
    for weight in recorder.weights[1:]:
        expected = polar(decay * expected + (1 - decay) * weight)
    assert len(recorder.weights) == 12
    assert_unitary(model)
    assert error(model.network.linear.weight.detach(), expected) <= bound(torch.float32)


@pytest.mark.parametrize(
    "average",
    [
        lambda: EMAWeightAveraging(decay=0.8),
        lambda: WeightAveraging(),
        lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1),
    ],
    ids=["ema", "mean", "swa"],
)
def test_averages_by_lightnings_classes_leave_the_manifold_and_are_put_back_at_the_closest_points(average):
    model = regression()
    trainer(3, average()).fit(model, batches())
    assert min(unitarity_errors(model)) > 10 * bound(torch.float32)
    expected = {name: polar(double(model.get_parameter(name).detach())) for name in manifolds_of(model)}
    put_back(model)
    assert_unitary(model)
    for name, point in expected.items():
        assert error(model.get_parameter(name).detach(), point) <= bound(torch.float32)


def test_a_checkpoint_with_averages_goes_on_bit_for_bit(tmp_path):
    whole, first, resumed = regression(), regression(), regression(seed=1)
    trainer(4, UnitaryEMA(decay=0.8)).fit(whole, batches())
    saves = SaveAtTheEndOfAnEpoch(tmp_path / "half.ckpt", epoch=1)
    trainer(2, UnitaryEMA(decay=0.8), saves).fit(first, batches())
    trainer(4, UnitaryEMA(decay=0.8)).fit(resumed, batches(), ckpt_path=saves.path, weights_only=True)
    assert_same(resumed.state_dict(), whole.state_dict())
