"""The adding problem: an LSTM that is to remember two numbers of a long sequence."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .problem import Evaluation, Problem, Task, seeded


@dataclass(frozen=True, kw_only=True)
class Adding(Task):
    """Hochreiter and Schmidhuber's adding problem (1997, Neural Computation 9) for an LSTM.

    Of the two inputs at each time one is uniform in [0, 1], the other marks two times, one in
    each half of the sequence; the target is the sum of the two marked numbers. Whoever ignores
    the inputs and says 1 has the squared error 1/6.

    Args:
        length: of the sequences; 200 with ``paper_size``, as in Martens and Sutskever (2011).
        hidden_size: of the LSTM; 100 with ``paper_size``.
        batch_size: fresh sequences a step.
        paper_size: the longer sequences and the larger network.
    """

    loss_name: ClassVar[str] = "test loss"
    metric_name: ClassVar[str] = "share wrong by over 0.04"

    length: int = 50
    hidden_size: int = 32
    batch_size: int = 128
    paper_size: bool = False

    @property
    def sizes(self) -> tuple[int, int]:
        """Length of the sequences and size of the network."""
        return (200, 100) if self.paper_size else (self.length, self.hidden_size)

    def build(self, seed: int, device: torch.device) -> "AddingProblem":
        """Weights and sequences of the seed."""
        length, hidden_size = self.sizes
        with seeded(seed):
            module = Sum(hidden_size).to(device)
        return AddingProblem(module, length, self.batch_size, seed, device)

    def describe(self) -> str:
        """The task in a sentence."""
        length, hidden_size = self.sizes
        return (
            f"adding problem, sequences of {length}, LSTM of {hidden_size} units, fresh batches of "
            f"{self.batch_size}, evaluated on 1,000 sequences"
        )


class Sum(nn.Module):
    """An LSTM with a linear layer on its last output."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, hidden_size, batch_first=True)
        self.head = nn.Linear(hidden_size, 1)

    def forward(self, sequences: Tensor) -> Tensor:
        """``[B, length, 2]`` to ``[B]``."""
        outputs, _ = self.lstm(sequences)
        return self.head(outputs[:, -1]).squeeze(1)


def sequences(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs ``[count, length, 2]`` and targets ``[count]`` of the adding problem."""
    numbers = torch.rand(count, length, generator=generator)
    half = length // 2
    first = torch.randint(0, half, (count, 1), generator=generator)
    second = torch.randint(half, length, (count, 1), generator=generator)
    marks = torch.zeros(count, length).scatter_(1, torch.cat((first, second), 1), 1.0)
    return torch.stack((numbers, marks), 2), (numbers * marks).sum(1)


class AddingProblem(Problem):
    """Fresh sequences at every step, the same for every contestant."""

    def __init__(
        self, module: nn.Module, length: int, batch_size: int, seed: int, device: torch.device
    ) -> None:
        self.module = module
        self._sizes = batch_size, length
        self._device = device
        self._generator = torch.Generator().manual_seed(seed)
        test = torch.Generator().manual_seed(2**31 + seed)
        self._test = self._to_device(sequences(1_000, length, test))
        self.advance()

    def _to_device(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return pair[0].to(self._device), pair[1].to(self._device)

    def advance(self) -> bool:
        """Draws the next batch."""
        self._batch = self._to_device(sequences(*self._sizes, self._generator))
        return True

    def loss(self) -> Tensor:
        """The mean squared error of the batch."""
        inputs, targets = self._batch
        return F.mse_loss(self.module(inputs), targets)

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """The mean squared error of the test sequences, and the share that is not solved."""
        inputs, targets = self._test
        outputs = self.module(inputs)
        wrong = (outputs - targets).abs() > 0.04
        return Evaluation(float(F.mse_loss(outputs, targets)), float(wrong.double().mean()))
