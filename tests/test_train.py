"""Networks, modules, the task `train`, and exact resumption."""

import functools
import itertools
import json
import logging
import math
import random

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import hvpopt
from hvpopt.lightning import nets
from hvpopt.lightning.batches import Batches
from hvpopt.lightning.data import Digits
from hvpopt.lightning.modules import Autoencoder, Classifier
from hvpopt.lightning.resume import RandomState, check_checkpoint
from hvpopt.lightning.train import train

# The optimizers whose runs must resume bit for bit.
RESUMABLE = {
    "newton_cg": hvpopt.NewtonCG,
    "smd": hvpopt.SMD,
    "adamw": functools.partial(torch.optim.AdamW, lr=3e-3),
    "sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
}
ADAMW = RESUMABLE["adamw"]


def make_trainer(folder, max_epochs, **arguments):
    return functools.partial(
        lightning.Trainer,
        max_epochs=max_epochs,
        accelerator="cpu",
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **arguments,
    )


def make_callbacks(folder):
    return {
        "checkpoint": ModelCheckpoint(
            folder / "checkpoints",
            filename="best",
            monitor="val/loss",
            save_last=True,
            save_on_train_epoch_end=True,
        ),
        "random_state": RandomState(),
        "absent": None,
    }


def run(folder, max_epochs, optimizer=ADAMW, ckpt_path=None, seed=0, **arguments):
    """Trains a network with dropout and BatchNorm on some digits; its parameters and results."""
    lightning.seed_everything(seed, workers=True, verbose=False)
    module = Classifier(nets.cnn(channels=(4, 8), dropout=0.3), optimizer)
    results = train(
        module,
        Digits(batch_size=64, num_train=192, seed=seed),
        make_trainer(folder, max_epochs, **arguments),
        make_callbacks(folder),
        ckpt_path=ckpt_path,
        output_dir=folder,
    )
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True), results


# --- networks


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


# --- modules


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


# --- the task


def test_train_reports_what_it_did(tmp_path, caplog):
    caplog.set_level(logging.INFO, "hvpopt")
    logger = TensorBoardLogger(tmp_path, name="curves", version="")
    lightning.seed_everything(0, verbose=False)
    results = train(
        Classifier(nets.mlp(), ADAMW),
        Digits(batch_size=64, num_train=192),
        make_trainer(tmp_path, 2),
        make_callbacks(tmp_path),
        logger,
        output_dir=tmp_path,
    )
    assert results["steps"] == 6
    assert results["products"] is None
    assert 0 < results["test/accuracy"] < 1
    assert json.loads((tmp_path / "summary.json").read_text()) == results
    table = caplog.text
    assert f"test accuracy  {results['test/accuracy']:.4f}" in table
    assert "products       –" in table
    assert f"tensorboard --logdir {tmp_path / 'curves'}\n" in table
    events = EventAccumulator(str(tmp_path / "curves")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(6))


def test_train_tests_the_best_checkpoint(tmp_path):
    class Worsening(Classifier):
        """Its validation loss rises from epoch to epoch, as does its bias."""

        def on_train_epoch_end(self):
            with torch.no_grad():
                self.net[-1].bias.fill_(self.current_epoch)

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", float(self.current_epoch))

        def test_step(self, batch, batch_idx):
            self.log("test/bias", self.net[-1].bias.mean())

    module = Worsening(nets.mlp(widths=(4,)), functools.partial(torch.optim.SGD, lr=0.0))
    results = train(
        module,
        Digits(num_train=64),
        make_trainer(tmp_path, 3, logger=False),
        make_callbacks(tmp_path),
        output_dir=tmp_path,
    )
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"][
        "net.4.bias"
    ]
    assert results["test/bias"] == pytest.approx(best.mean().item())
    assert results["test/bias"] < 1


class Counting(torch.optim.SGD):
    num_products = 17


def test_train_reads_the_products_from_the_optimizer(tmp_path):
    _, results = run(tmp_path, 1, functools.partial(Counting, lr=0.1), limit_train_batches=1)
    assert results["products"] == 17


class Unloadable(Digits):
    def setup(self, stage=None):
        raise AssertionError("data were loaded before the arguments were checked")


@pytest.mark.parametrize(
    ("optimizer", "arguments", "net", "match"),
    [
        (functools.partial(torch.optim.AdamW, lr=-1), {}, None, r"optimizer \(AdamW\): Invalid"),
        (ADAMW, {"limit_train_batches": -1}, None, "trainer: .*limit_train_batches"),
        (ADAMW, {"devices": 0}, None, "trainer: .*devices"),
        (ADAMW, {}, nets.mlp((1, 9, 9)), r"Set model.net.image_shape=\[1, 8, 8\]"),
    ],
)
def test_bad_arguments_are_refused_before_data_are_loaded(
    tmp_path, optimizer, arguments, net, match
):
    module = Classifier(net or nets.mlp(), optimizer)
    with pytest.raises(ValueError, match=match):
        train(module, Unloadable(), make_trainer(tmp_path, 1, **arguments), output_dir=tmp_path)


# --- resumption


@pytest.mark.parametrize("name", RESUMABLE)
def test_a_resumed_run_ends_with_the_parameters_of_the_uninterrupted_one(tmp_path, name):
    whole, _ = run(tmp_path / "whole", 3, RESUMABLE[name])
    run(tmp_path / "part", 1, RESUMABLE[name])
    # Another seed: what the resumed run draws must come from the checkpoint.
    torch.manual_seed(99)
    resumed, results = run(
        tmp_path / "rest",
        3,
        RESUMABLE[name],
        ckpt_path=tmp_path / "part" / "checkpoints" / "last.ckpt",
    )
    assert results["steps"] == 9
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][key]), key
    assert (
        whole["callbacks"]["RandomState"]["ranks"][0]["python"]
        == (resumed["callbacks"]["RandomState"]["ranks"][0]["python"])
    )


def test_without_the_random_state_the_resumed_run_differs(tmp_path, monkeypatch):
    """The test above would notice: dropout depends on the random state."""
    whole, _ = run(tmp_path / "whole", 2)
    run(tmp_path / "part", 1)
    monkeypatch.setattr(RandomState, "on_train_start", lambda *args: None)
    resumed, _ = run(
        tmp_path / "rest", 2, ckpt_path=tmp_path / "part" / "checkpoints" / "last.ckpt"
    )
    key = "net.0.weight"
    assert not torch.equal(whole["state_dict"][key], resumed["state_dict"][key])


def test_random_state_restores_torch_numpy_and_python(tmp_path):
    def draws():
        return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()

    callback = RandomState()
    torch.save(callback.state_dict(), tmp_path / "state")
    expected = draws()
    draws()
    callback.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    trainer = make_trainer(tmp_path, 1)()
    callback.on_train_start(trainer, Classifier(nets.mlp(), ADAMW))
    assert draws() == expected
    callback.on_train_start(trainer, Classifier(nets.mlp(), ADAMW))  # once only
    assert draws() != expected


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    run(folder, 1, limit_train_batches=1)
    return folder / "checkpoints" / "last.ckpt"


def digits_cnn(**arguments):
    return Classifier(nets.cnn(channels=(4, 8), **arguments), ADAMW)


def test_a_usable_checkpoint_passes(checkpoint):
    check_checkpoint(checkpoint, digits_cnn(), 2)
    check_checkpoint(checkpoint, digits_cnn(), -1)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nope.ckpt: there is no such file"):
        check_checkpoint(tmp_path / "nope.ckpt", digits_cnn(), 2)


@pytest.mark.parametrize("content", [b"", b"some text", b"PK\x03\x04 broken"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "file.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        check_checkpoint(path, digits_cnn(), 2)


def test_a_file_of_weights_alone_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="it lacks loops, optimizer_states"):
        check_checkpoint(tmp_path / "weights.pt", digits_cnn(), 2)


def test_a_run_with_no_epoch_left_is_refused(checkpoint):
    with pytest.raises(ValueError, match=r"has 1 epochs behind it and trainer.max_epochs=1"):
        check_checkpoint(checkpoint, digits_cnn(), 1)


def test_a_checkpoint_of_another_network_is_refused(checkpoint):
    module = Classifier(nets.cnn(channels=(4, 9)), ADAMW)
    with pytest.raises(ValueError, match=r"another network: net.3.weight is \(8, .* \(9, "):
        check_checkpoint(checkpoint, module, 2)


def test_a_checkpoint_of_another_optimizer_is_refused(checkpoint):
    module = Classifier(nets.cnn(channels=(4, 8)), functools.partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(ValueError, match="with the optimizer AdamW, this run has SGD"):
        check_checkpoint(checkpoint, module, 2)
