"""Ordinary LightningModules, runs of them, and what one can see after a run."""

import csv
import random

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Ordinary(L.LightningModule):
    """Batch norm, dropout, metrics, logs, counters, lists: what people write."""

    def __init__(self, make_optimizer) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(10, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Dropout(0.3), nn.Linear(16, 4)
        )
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=4)
        self.seen = torchmetrics.MeanMetric()
        self.outputs: list[Tensor] = []
        self.num_calls = 0
        self.num_hooks = 0
        self.make_optimizer = make_optimizer

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x + 0.1 * torch.randn_like(x) + 0.01 * random.random() + 0.01 * np.random.rand()
        z = self.net(x)
        loss = F.cross_entropy(z, y)
        self.outputs.append(loss.detach())
        self.num_calls += 1
        self.accuracy(z, y)
        self.seen.update(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict({"accuracy": self.accuracy, "mean": self.seen}, on_epoch=True, on_step=False)
        self.logger.log_metrics({"by_hand": float(self.num_calls)}, step=self.num_calls)
        return {"loss": loss, "z": z.detach()}

    def on_before_backward(self, loss):
        self.num_hooks += 1

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


class Small(L.LightningModule):
    """A smooth classifier without randomness, small enough for a dense Hessian."""

    def __init__(self, make_optimizer):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 3), nn.Tanh(), nn.Linear(3, 4))
        self.make_optimizer = make_optimizer

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


class Square(L.LightningModule):
    """½ Σ aᵢ wᵢ², whose Hessian is diag(a)."""

    def __init__(self, make_optimizer) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.make_optimizer = make_optimizer

    def training_step(self, batch):
        self.log("here", 1.0)
        return 0.5 * (torch.tensor([1.0, 2.0, 7.0]) * self.w**2).sum()

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


class CountHooks(L.Callback):
    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def _count(self, name):
        self.counts[name] = self.counts.get(name, 0) + 1

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self._count("zero_grad")

    def on_before_backward(self, trainer, pl_module, loss):
        self._count("before_backward")

    def on_after_backward(self, trainer, pl_module):
        self._count("after_backward")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self._count("before_step")


def quiet_trainer(max_epochs, **options):
    """A trainer on the CPU that shows nothing."""
    return L.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def fit(
    make_optimizer,
    tmp_path,
    *,
    callbacks=(),
    module=Ordinary,
    epochs=2,
    logger=None,
    ckpt_path=None,
    val=None,
    **options,
):
    """A module after a fit on 64 examples in batches of 16, its trainer, and the hooks called."""
    L.seed_everything(1, verbose=False)
    x = torch.randn(64, 10)
    data = TensorDataset(x, (x @ torch.randn(10, 4)).argmax(1))
    net = module(make_optimizer)
    hooks = CountHooks()
    logger = logger or CSVLogger(tmp_path, name=None, version="run")
    trainer = quiet_trainer(
        epochs,
        logger=logger,
        callbacks=[hooks, *callbacks],
        **{"enable_checkpointing": False, **options},
    )
    trainer.fit(net, DataLoader(data, batch_size=16), val, ckpt_path=ckpt_path, weights_only=True)
    for each in trainer.loggers:
        each.save()
    return net, trainer, hooks


def world(net, trainer, hooks):
    """What one can see after a run, the parameters aside."""
    return {
        "buffers": {name: b.clone() for name, b in net.named_buffers()},
        "outputs": list(net.outputs),
        "calls": net.num_calls,
        "hooks": (net.num_hooks, hooks.counts),
        "metrics": dict(trainer.callback_metrics),
        "accuracy": {name: getattr(net.accuracy, name) for name in net.accuracy._defaults},
        "updates": (net.accuracy._update_count, net.seen._update_count),
        "step": trainer.global_step,
        "grads": [p.grad if p.grad is None else p.grad.clone() for p in net.parameters()],
        "random": (torch.rand(2), random.random(), np.random.rand()),
        "by_hand": [row["by_hand"] for row in logged(trainer, "by_hand")],
    }


def logged(trainer, name):
    """The rows of the logger's file that have the metric, as numbers."""
    trainer.logger.save()
    with open(trainer.logger.experiment.metrics_file_path) as file:
        rows = list(csv.DictReader(file))
    return [{k: float(v) for k, v in row.items() if v} for row in rows if row.get(name)]
