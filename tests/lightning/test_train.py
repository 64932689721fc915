"""The task `train`: what it reports, tests and refuses."""

import functools
import json
import logging

import lightning
import pytest
import torch
from digit_runs import ADAMW, make_callbacks, make_trainer, run
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hvpopt.lightning import nets
from hvpopt.lightning.data import Digits
from hvpopt.lightning.modules import Classifier
from hvpopt.lightning.train import train


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
