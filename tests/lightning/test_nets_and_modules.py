"""Networks, and what the modules around them log."""

import functools
import itertools
import math

import pytest
import torch
from digit_runs import ADAMW, make_trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from hvpopt.lightning import nets
from hvpopt.lightning.batches import Batches
from hvpopt.lightning.data import Digits
from hvpopt.lightning.modules import Autoencoder, Classifier


@pytest.mark.parametrize("make_net", [nets.mlp, nets.cnn])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 5)])
@pytest.mark.parametrize("activation", nets.ACTIVATIONS)
def test_classifying_nets_give_a_logit_a_class(make_net, shape, activation):
    net = make_net(shape, 7, activation=activation)
    assert net(torch.zeros(2, *shape)).shape == (2, 7)


def test_the_autoencoder_is_784_256_64_16_and_back():
    net = nets.autoencoder()
    sizes = [layer.weight.shape for layer in net if isinstance(layer, nn.Linear)]
    widths = [784, 256, 64, 16, 64, 256, 784]
    assert sizes == [(n, m) for m, n in itertools.pairwise(widths)]
    assert sum(isinstance(layer, nn.Tanh) for layer in net) == 4
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 1, 28, 28)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: nets.mlp(activation="gely"), "one of elu, .* got 'gely'. Did you mean 'gelu'"),
        (lambda: nets.mlp(dropout=1.0), "dropout must be at least 0 and below 1, got 1.0"),
        (lambda: nets.mlp(widths=(8, 0)), r"widths must hold sizes of at least 1, got \[8, 0\]"),
        (lambda: nets.cnn(channels=()), r"channels must hold sizes of at least 1, got \[\]"),
        (lambda: nets.autoencoder(image_shape=(1, -1, 2)), "image_shape must hold sizes"),
        (lambda: Autoencoder(nets.autoencoder(), ADAMW, loss="l1"), "'bce' or 'mse', got 'l1'"),
        (lambda: Autoencoder(nets.autoencoder(), ADAMW, num_pictures=-1), "num_pictures must be"),
    ],
)
def test_bad_arguments_of_nets_and_modules_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_the_schedule_is_stepped_every_epoch(tmp_path):
    schedule = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    module = Classifier(nets.mlp(widths=(4,)), functools.partial(torch.optim.SGD, lr=1.0), schedule)
    trainer = make_trainer(tmp_path, 2, limit_train_batches=2)()
    trainer.fit(module, datamodule=Digits(num_train=64, batch_size=32))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.25


class ConstantNet(nn.Module):
    """Logits that are everywhere the same number."""

    def __init__(self, logit):
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(logit))

    def forward(self, images):
        return self.logit.expand_as(images)


@pytest.mark.parametrize(
    ("loss", "logit", "pixel", "expected"),
    [
        ("bce", 0.0, 0.25, {"loss": math.log(2), "mse": 0.0625, "squared_error": 0.0625 * 12}),
        ("mse", 0.5, 0.25, {"loss": 0.0625, "mse": 0.0625, "squared_error": 0.0625 * 12}),
    ],
)
def test_the_autoencoder_logs_the_errors_of_a_constant_reconstruction(
    tmp_path, loss, logit, pixel, expected
):
    images = torch.full((6, 1, 3, 4), pixel)
    loader = Batches(images, torch.zeros(6), batch_size=4)
    module = Autoencoder(ConstantNet(logit), ADAMW, loss=loss)
    trainer = make_trainer(tmp_path, 1, logger=False)()
    (metrics,) = trainer.test(module, loader, verbose=False)
    assert metrics == pytest.approx({f"test/{name}": value for name, value in expected.items()})


def test_the_autoencoder_writes_images_above_reconstructions(tmp_path):
    images = torch.full((3, 1, 5, 4), 0.25)
    loader = Batches(images, torch.zeros(3), batch_size=3)
    module = Autoencoder(
        ConstantNet(0.0), functools.partial(torch.optim.SGD, lr=0.0), num_pictures=2
    )
    logger = TensorBoardLogger(tmp_path, name="", version="")
    make_trainer(tmp_path, 1, logger=logger, enable_checkpointing=False)().fit(
        module, loader, loader
    )
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    (picture,) = events.Images("val/reconstructions")
    assert (picture.height, picture.width) == (2 * 5, 2 * 4)
