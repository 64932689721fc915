"""What a race trains: a task builds a problem for each seed and each contestant."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

Figure = Literal["loss", "metric"]


@dataclass(frozen=True)
class Evaluation:
    """How good a problem's weights are: its loss, and its task's metric."""

    loss: float
    metric: float

    def of(self, figure: Figure) -> float:
        """The loss or the metric."""
        return self.loss if figure == "loss" else self.metric


@dataclass(frozen=True)
class Target:
    """The figure that ends a contestant's run once it is at or below the value."""

    figure: Figure
    value: float

    def is_reached(self, evaluation: Evaluation) -> bool:
        """Whether the evaluation is good enough."""
        return evaluation.of(self.figure) <= self.value


class Problem(ABC):
    """One contestant's network and its loss. No module itself: optimizers that look for modules
    find the network, and leave the data alone."""

    module: nn.Module
    has_end: bool = False
    """Whether there are only so many batches."""
    is_over: bool = False
    """Whether all of them have been seen."""

    @abstractmethod
    def loss(self) -> Tensor:
        """The loss of the current batch, a scalar with a graph."""

    @abstractmethod
    def evaluate(self) -> Evaluation:
        """Loss and metric at the current weights, on what the task evaluates on."""

    def advance(self) -> bool:
        """Goes on to the next batch; False where there is none. A full batch stays."""
        return True

    def observe(self, loss: Tensor) -> None:  # noqa: B027 (most tasks need none)
        """Takes note of the loss of the current batch before the step."""


class Task(ABC):
    """Builds equal problems for equal seeds. Subclasses are frozen dataclasses, so that a
    configuration sets their fields and a file of results names them."""

    loss_name: ClassVar[str] = "training loss"
    metric_name: ClassVar[str]
    is_metric_logarithmic: ClassVar[bool] = False
    target: ClassVar[Target | None] = None
    """Where a contestant's run ends before its time; then the time to it decides."""

    @abstractmethod
    def build(self, seed: int, device: torch.device) -> Problem:
        """The problem of a seed: its initial weights and its order of batches."""

    @abstractmethod
    def describe(self) -> str:
        """The task in a sentence, with its sizes."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within, the CPU's global generator starts from the seed; afterwards it is as before."""
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)
