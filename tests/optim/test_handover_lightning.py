"""A schedule of optimizers in Lightning runs: resumption, options, monitors."""

from functools import partial

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import LBFGS as TorchLBFGS
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset

from hvpopt.lightning.callbacks import OptimizerMonitor
from hvpopt.optim.handover import Handover
from hvpopt.optim.newton_cg import NewtonCG
from hvpopt.optim.sophia import SophiaG
from hvpopt.optim.stages import Stage

LBFGS = partial(TorchLBFGS, max_iter=4, line_search_fn="strong_wolfe")


class Module(L.LightningModule):
    """An ordinary module."""

    def __init__(self, scheduler=None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.scheduler = scheduler
        self.calls = []

    def training_step(self, batch):
        self.calls.append(self.trainer.global_step)
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = Handover(
            self.parameters(),
            [
                Stage(Adam, steps=3, lr=1e-2),
                Stage(LBFGS, steps=2),
                Stage(SophiaG, steps=3, update_every=2),
                Stage(NewtonCG, max_cg_steps=5),
            ],
        )
        return [optimizer], [] if self.scheduler is None else [self.scheduler(optimizer)]


def fit(tmp_path, name, num_epochs=4, *, resume=None, module=None, callbacks=(), **options):
    L.seed_everything(2, verbose=False)
    x = torch.randn(8, 6).repeat(3, 1)  # Lightning begins an interrupted epoch anew
    data = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=8)
    module = Module() if module is None else module
    checkpoints = ModelCheckpoint(
        tmp_path / name / "checkpoints", filename="{step}", save_top_k=-1, every_n_train_steps=1
    )
    trainer = L.Trainer(
        max_epochs=num_epochs, accelerator="cpu", logger=CSVLogger(tmp_path, name=name),
        log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[checkpoints, *callbacks], **options,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume, weights_only=None if resume is None else True)
    return module, trainer


lightning_fit = pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:Experiment logs directory",
    "ignore:The dirpath has changed",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
)


@lightning_fit
@pytest.mark.parametrize("step", [2, 3, 4, 7, 10])
def test_lightning_resumes_in_every_stage_bit_for_bit(tmp_path, step):
    whole, trainer = fit(tmp_path, "whole")
    assert trainer.global_step == 12
    again, resumed = fit(
        tmp_path, "again", resume=tmp_path / "whole" / "checkpoints" / f"step={step}.ckpt"
    )
    assert resumed.global_step == 12
    assert min(again.calls) == step
    for p, q in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    position = [t.optimizers[0]._position for t in (trainer, resumed)]
    assert position[0] == position[1]
    assert (position[0].stage, position[0].num_steps) == (3, 4)


@lightning_fit
def test_lightning_runs_the_training_step_as_often_as_each_stage_asks(tmp_path):
    module, trainer = fit(tmp_path, "run", callbacks=[OptimizerMonitor()])
    counts = [module.calls.count(step) for step in range(12)]
    assert counts[:3] == [1, 1, 1]
    assert all(2 <= count <= 5 for count in counts[3:5])
    assert type(trainer.optimizers[0]) is Handover
    assert trainer.progress_bar_metrics["cg_steps"] > 0


@lightning_fit
@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 3}, {"gradient_clip_val": 1.0}])
def test_smoke_the_loss_falls_under_lightnings_options(tmp_path, options):
    _, trainer = fit(tmp_path, "run", 20, **options)
    assert trainer.optimizers[0]._position.stage > 1
    assert trainer.callback_metrics["loss"] < 0.6


@lightning_fit
def test_lightnings_monitor_shows_the_learning_rate_of_the_current_stage(tmp_path):
    scheduler = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    monitor = LearningRateMonitor("step")
    fit(tmp_path, "run", module=Module(scheduler), callbacks=[monitor])
    assert monitor.lrs["lr-Handover"][:4] == [0.01, 0.01, 0.01, 0.005]
    assert set(monitor.lrs["lr-LBFGS"]) == {1}
    assert set(monitor.lrs["lr-NewtonCG"]) == {1.0}
