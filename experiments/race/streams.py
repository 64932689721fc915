"""Online tasks: a stream whose labels change their meaning, and the four regions.

What counts is the mean online loss: of each batch, the loss before the step that it is used for.
A stream has an end, the same for all contestants; who learns slowly must not profit from a
budget that ends before the labels change.
"""

import itertools
import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpopt.lightning.nets import mlp

from .data import digits
from .problem import Evaluation, Problem, Task, seeded


class Stream(Problem):
    """Batches that come once, and the mean of their losses."""

    has_end = True

    def __init__(self, module: nn.Module, num_batches: int) -> None:
        self.module = module
        self._left = num_batches
        self._total = 0.0
        self._seen = 0

    def advance(self) -> bool:
        """Goes on to the next batch; False at the end of the stream."""
        if self._left == 0:
            self.is_over = True
            return False
        self._left -= 1
        self._batch = self.next_batch()
        return True

    @abstractmethod
    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels."""

    def loss(self) -> Tensor:
        """The mean cross-entropy of the batch."""
        inputs, labels = self._batch
        return F.cross_entropy(self.module(inputs), labels)

    def observe(self, loss: Tensor) -> None:
        """Adds the loss of a batch to the mean."""
        self._total += float(loss)
        self._seen += 1

    @property
    def online_loss(self) -> float:
        """The mean over the batches so far; of none, that of a uniform guess is not known."""
        return self._total / self._seen if self._seen else math.nan


@dataclass(frozen=True, kw_only=True)
class DriftingDigits(Task):
    """Scikit-learn's digits whose labels are permuted every few epochs.

    Args:
        num_epochs: of the whole stream.
        period: epochs between two permutations.
        batch_size: images a batch.
    """

    loss_name: ClassVar[str] = "mean online loss"
    metric_name: ClassVar[str] = "error on the present labels"

    num_epochs: int = 30
    period: int = 3
    batch_size: int = 64

    def build(self, seed: int, device: torch.device) -> "DriftingProblem":
        """Weights, order and permutations of the seed."""
        with seeded(seed):
            module = mlp(widths=(64, 64)).to(device)
        return DriftingProblem(module, self, seed, device)

    def describe(self) -> str:
        """The task in a sentence."""
        return (
            f"digits, tanh perceptron 64-64-64-10, batches of {self.batch_size}, "
            f"{self.num_epochs} epochs, labels permuted every {self.period}"
        )


class DriftingProblem(Stream):
    """Digits in a random order, with the labels of the present phase."""

    def __init__(
        self, module: nn.Module, task: DriftingDigits, seed: int, device: torch.device
    ) -> None:
        self._images, self._labels, _, _ = digits(device)
        self._size, self._period, self._seed = task.batch_size, task.period, seed
        self._an_epoch = len(self._images) // task.batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._count = 0
        super().__init__(module, task.num_epochs * self._an_epoch)

    def permutation(self, epoch: int) -> Tensor:
        """The new label of each class in an epoch; in the first phase they are the old ones."""
        phase = epoch // self._period
        if phase == 0:
            return torch.arange(10)
        return torch.randperm(
            10, generator=torch.Generator().manual_seed(1_000 * phase + self._seed)
        )

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels."""
        epoch, batch = divmod(self._count, self._an_epoch)
        if batch == 0:
            self._order = torch.randperm(len(self._images), generator=self._generator)
            self._present = self.permutation(epoch).to(self._labels.device)[self._labels]
        chosen = self._order[batch * self._size : (batch + 1) * self._size]
        chosen = chosen.to(self._images.device)
        self._count += 1
        return self._images[chosen], self._present[chosen]

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Mean online loss, and share of all images that the present weights get wrong."""
        labels = self._present if self._count else self._labels
        wrong = self.module(self._images).argmax(1) != labels
        return Evaluation(self.online_loss, float(wrong.double().mean()))


def regions(points: Tensor) -> Tensor:
    """The region, 0 to 3, of points ``[N, 2]`` of the square [−1, 1]².

    Inside the radius 0.4 is region 0; up to 0.8 the ring's upper half is region 1 and its lower
    half region 2; the corners beyond are region 3, which no line cuts from the others.
    """
    radius, upper = points.norm(dim=1), points[:, 1] >= 0
    ring = torch.where(upper, 1, 2)
    return torch.where(radius < 0.4, 0, torch.where(radius < 0.8, ring, 3))


@dataclass(frozen=True, kw_only=True)
class FourRegions(Task):
    """Four regions of a square are to be told apart, from a stream of uniform points.

    The task of Singhal and Wu (1989), with the network of Schraudolph (1999): 2-10-10-4 with tanh
    units and softmax, weights uniform in ±0.3. The papers draw their regions in a figure; here
    they are those of `regions`, of the same kind: nested, not convex.

    Args:
        num_steps: batches in the stream.
        batch_size: points a batch.
    """

    loss_name: ClassVar[str] = "mean online loss"
    metric_name: ClassVar[str] = "error on a grid"

    num_steps: int = 5_000
    batch_size: int = 10

    def build(self, seed: int, device: torch.device) -> "RegionsProblem":
        """Weights and points of the seed."""
        layers: list[nn.Module] = []
        with seeded(seed):
            for num_in, num_out in itertools.pairwise((2, 10, 10, 4)):
                linear = nn.Linear(num_in, num_out)
                nn.init.uniform_(linear.weight, -0.3, 0.3)
                nn.init.uniform_(linear.bias, -0.3, 0.3)
                layers += [linear, nn.Tanh()]
        module = nn.Sequential(*layers[:-1]).to(device)
        return RegionsProblem(module, self.num_steps, self.batch_size, seed, device)

    def describe(self) -> str:
        """The task in a sentence."""
        return (
            f"four regions, tanh perceptron 2-10-10-4, {self.num_steps:,} batches of "
            f"{self.batch_size} uniform points"
        )


class RegionsProblem(Stream):
    """Fresh points, the same for every contestant."""

    def __init__(
        self,
        module: nn.Module,
        num_steps: int,
        batch_size: int,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__(module, num_steps)
        self._size, self._device = batch_size, device
        self._generator = torch.Generator().manual_seed(seed)
        line = torch.linspace(-1, 1, 51)
        self._grid = torch.cartesian_prod(line, line).to(device)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Points and their regions."""
        points = 2 * torch.rand(self._size, 2, generator=self._generator) - 1
        return points.to(self._device), regions(points).to(self._device)

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Mean online loss, and share of a grid's points in the wrong region."""
        wrong = self.module(self._grid).argmax(1) != regions(self._grid)
        return Evaluation(self.online_loss, float(wrong.double().mean()))
