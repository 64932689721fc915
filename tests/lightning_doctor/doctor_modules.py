"""Modules that a doctor sees: what people write, and what stands in the way."""

import random

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn
from torch.autograd.function import once_differentiable

BATCH = (
    torch.randn(6, 10, generator=torch.Generator().manual_seed(1)),
    torch.arange(6) % 4,
)


class Ordinary(L.LightningModule):
    """Batch norm, dropout, noise, metrics, logs, counters, lists, and questions to the trainer."""

    def __init__(self, make_optimizer=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(10, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Dropout(0.3), nn.Linear(16, 4)
        )
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=4)
        self.outputs = []
        self.num_calls = 0
        self.make_optimizer = make_optimizer

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x + 0.1 * torch.randn_like(x) + 0.01 * random.random() + 0.01 * np.random.rand()
        z = self.net(x)
        loss = F.cross_entropy(z, y) * (1 + self.trainer.current_epoch)
        self.outputs.append(loss.detach())
        self.num_calls += 1
        self.accuracy(z, y)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict({"accuracy": self.accuracy}, on_epoch=True, on_step=False)
        assert self.trainer.training
        return {"loss": loss, "z": z.detach()}

    def configure_optimizers(self):
        return None if self.make_optimizer is None else self.make_optimizer(self.parameters())


class Net(L.LightningModule):
    """A network in float64 with a part of its own, and cross-entropy."""

    def __init__(self, part=None, make_optimizer=None, loss=F.cross_entropy):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(10, 8), part or nn.Tanh(), nn.Linear(8, 4)).double()
        self.make_optimizer, self.loss = make_optimizer, loss

    def training_step(self, batch):
        return self.loss(self.net(batch[0].double()), batch[1])

    def configure_optimizers(self):
        return None if self.make_optimizer is None else self.make_optimizer(self.parameters())


class _NoJvp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1 - torch.tanh(x) ** 2)


class _OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x**2

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * grad * x

    @staticmethod
    def jvp(ctx, dx):
        (x,) = ctx.saved_tensors
        return 2 * x * dx


class Part(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def without_jvp():
    return Part(_NoJvp.apply)


def once_differentiable_part():
    return Part(_OnceOnly.apply)
