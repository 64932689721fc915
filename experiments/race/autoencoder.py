"""A deep autoencoder of Fashion-MNIST, with full batches or mini-batches."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpopt.lightning.nets import autoencoder

from .data import fashion_mnist
from .problem import Evaluation, Problem, Task, seeded


@dataclass(frozen=True, kw_only=True)
class Autoencoder(Task):
    """A tanh autoencoder with linear code and output; the loss is the mean over pixels and images
    of the squared error.

    Args:
        num_images: so many to train on, the first.
        batch_size: images a batch; None for all in one.
        paper_size: the layers 784-1000-500-250-30 of Hinton and Salakhutdinov (2006, Science 313)
            instead of 784-256-64-16.
        sparse: initial weights as in `sparse_`, else torch's own.
        root: a folder with the four IDX files.
    """

    metric_name: ClassVar[str] = "squared error of an image"
    is_metric_logarithmic: ClassVar[bool] = True

    num_images: int = 2_000
    batch_size: int | None = None
    paper_size: bool = False
    sparse: bool = False
    root: str | Path | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """Units of the encoder's layers."""
        return (1000, 500, 250, 30) if self.paper_size else (256, 64, 16)

    def build(self, seed: int, device: torch.device) -> "AutoencoderProblem":
        """Weights and order of batches of the seed."""
        images, _ = fashion_mnist(self.num_images, self.root, device)
        with seeded(seed):
            module = autoencoder(widths=self.widths)
        if self.sparse:
            sparse_(module, generator=torch.Generator().manual_seed(seed))
        return AutoencoderProblem(module.to(device), images, self.batch_size, seed)

    def describe(self) -> str:
        """The task in a sentence."""
        layers = "-".join(map(str, (784, *self.widths)))
        batches = "one batch" if self.batch_size is None else f"batches of {self.batch_size}"
        start = ", sparse initialisation" if self.sparse else ""
        return (
            f"deep autoencoder {layers} and back, tanh, squared error, {self.num_images:,} images "
            f"of Fashion-MNIST in {batches}{start}"
        )


class AutoencoderProblem(Problem):
    """An autoencoder and its images; evaluated on the first 2,000 of them."""

    def __init__(
        self, module: nn.Module, images: Tensor, batch_size: int | None, seed: int
    ) -> None:
        self.module = module
        self._images = self._batch = images
        self._size = batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.long)

    def advance(self) -> bool:
        """Goes on to the next batch; where fewer than a batch are left, a new order begins."""
        if self._size is not None:
            if len(self._order) < self._size:
                self._order = torch.randperm(len(self._images), generator=self._generator)
            chosen, self._order = self._order[: self._size], self._order[self._size :]
            self._batch = self._images[chosen.to(self._images.device)]
        return True

    def loss(self) -> Tensor:
        """The mean squared error of the batch."""
        return F.mse_loss(self.module(self._batch), self._batch)

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """The mean squared error of the training images, and its sum over an image's pixels."""
        images = self._images[:2_000]
        error = float(F.mse_loss(self.module(images), images))
        return Evaluation(error, error * images[0].numel())


@torch.no_grad()
def sparse_(module: nn.Module, num_nonzero: int = 15, *, generator: torch.Generator) -> nn.Module:
    """The module with sparse weights: in each linear layer each unit gets ``num_nonzero`` random
    incoming weights from the standard normal distribution, all others are zero (Martens 2010,
    section 5). For tanh units the weights are a quarter of these and the biases ½, so that the
    units imitate sigmoid ones (Sutskever et al. 2013, section 3.1).

    Raises:
        ValueError: if ``num_nonzero`` is below one.
    """
    if num_nonzero < 1:
        raise ValueError(f"num_nonzero={num_nonzero} is out of range: expected at least 1.")
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            num_in, num_out = layer.in_features, layer.out_features
            count = min(num_nonzero, num_in)
            ranks = torch.rand(num_out, num_in, generator=generator).argsort(1)
            values = torch.randn(num_out, count, generator=generator) / 4
            weight = torch.zeros(num_out, num_in).scatter_(1, ranks[:, :count], values)
            layer.weight.copy_(weight)
            if layer.bias is not None:
                layer.bias.fill_(0.5)
    return module
