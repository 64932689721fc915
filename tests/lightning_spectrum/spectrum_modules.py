"""Modules whose curvature is known, their data, and reports made by hand."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hvpopt.lightning.spectrum.report import (
    Density,
    Eigenvalue,
    Estimate,
    LayerTrace,
    Plane,
    Slice,
    SpectrumReport,
)


class Regression(L.LightningModule):
    """Least squares of two linear layers' sum, whose Hessian is 2 XᵀX / N."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 1, bias=False).double()
        self.second = nn.Linear(2, 1, bias=False).double()

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.mse_loss((self.first(x[:, :3]) + self.second(x[:, 3:])).squeeze(1), y)
        self.log("loss", loss, on_epoch=True)
        assert self.trainer.training
        return loss


class Noisy(L.LightningModule):
    """Batch norm and dropout before cross-entropy."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)
        ).double()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), (batch[1] > 0).long())


class Points(L.LightningDataModule):
    """23 points in batches of 5, in another order every epoch."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        x = torch.randn(23, 5, generator=generator, dtype=torch.float64)
        self.points = x, torch.randn(23, generator=generator, dtype=torch.float64)

    def train_dataloader(self):
        return DataLoader(TensorDataset(*self.points), batch_size=5, shuffle=True)

    def val_dataloader(self):
        return [self.train_dataloader(), self.train_dataloader()]


def report(name="one", scale=1.0, **fields):
    """A report made by hand; the density is that of the eigenvalues −1, 0, 0, 2 (times a scale)."""
    grid = tuple(scale * (-2 + 0.05 * i) for i in range(101))
    values = tuple(0.1 / (1 + (x / scale) ** 2) for x in grid)
    line = tuple(scale * x for x in (-1.0, 0.0, 1.0))
    given = {
        "name": name,
        "checkpoint": f"runs/{name}.ckpt",
        "module": "Net",
        "optimizer": "SGD",
        "epoch": 2,
        "step": 30,
        "curvature": "hessian",
        "data": "train data, 5 batches",
        "mode": "eval",
        "num_params": 4,
        "loss": 0.5 * scale,
        "gradient_norm": 0.25,
        "top": (Eigenvalue(2.0 * scale, 0.01, 0.5), Eigenvalue(0.0, 0.02, 0.1)),
        "bottom": (Eigenvalue(-1.0 * scale, 0.03, 0.2),),
        "trace": Estimate(1.0 * scale, 0.1),
        "layers": (
            LayerTrace("first", 3, Estimate(0.75 * scale, 0.1)),
            LayerTrace("second", 1, Estimate(0.25 * scale, 0.05)),
        ),
        "density": Density(
            grid=grid,
            values=values,
            spread=tuple(0.1 * v for v in values),
            sigma=0.05 * scale,
            edges=tuple(scale * x for x in (-1.0, 0.0, 1.0, 2.0)),
            mass=(0.25, 0.5, 0.25),
        ),
        "negative_share": Estimate(0.25, 0.01),
        "slices": (Slice("top eigenvector 1", 2.0 * scale, 0.1, line, (1.4, 0.5, 1.6)),),
        "plane": Plane(line, line, ((3.0, 2.0, 3.0), (2.0, 0.5, 2.0), (3.0, 2.0, 3.5))),
        "num_products": 60,
        "num_evaluations": 12,
        "seconds": 1.5,
    }
    return SpectrumReport(**{**given, **fields})
