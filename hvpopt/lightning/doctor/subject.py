"""What is examined: a module's closure on one batch, and runs of it without a trace."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvpopt import trees
from hvpopt.engines.base import fill
from hvpopt.engines.interception import Interception
from hvpopt.isolation import World
from hvpopt.trees import TensorList


@dataclass
class Subject:
    """A module, its closure on one batch, and its optimizers.

    Attributes:
        module: what is trained.
        trainer: how.
        params: what the optimizer trains; all that require gradients where none is known.
        loss: from nothing to the batch's loss, or None. Under manual optimization the training
            step, which calls ``backward`` itself.
        optimizers: as far as known, none of them stepped yet.
        num_backwards: how often the last run by `gradient` called ``backward``.
    """

    module: nn.Module
    trainer: L.Trainer
    params: TensorList
    loss: Callable[[], Tensor | None]
    optimizers: list[Optimizer]
    num_backwards: int = 0
    world: World = field(init=False)

    def __post_init__(self) -> None:
        self.world = World(self.closure, self.params)
        self.world.hold_random_numbers()

    @property
    def is_manual(self) -> bool:
        """Whether the module steps its optimizers itself."""
        return isinstance(self.module, L.LightningModule) and (
            not self.module.automatic_optimization
        )

    @property
    def loss_scale(self) -> int:
        """By how much Lightning divides the loss."""
        is_lightning = isinstance(self.module, L.LightningModule)
        return self.trainer.accumulate_grad_batches if is_lightning else 1

    @property
    def device(self) -> torch.device:
        """The first parameter's."""
        return self.params[0].device

    def closure(self) -> Tensor | None:
        """Computes the loss, clears the gradients, calls ``backward``, returns the loss.

        Under manual optimization it runs the training step, with optimizers that stand still.
        """
        if self.is_manual:
            with self._standing_still():
                return self.loss()
        loss = self.loss()
        if loss is None:
            return None
        loss = loss / self.loss_scale
        for p in self.params:
            p.grad = None
        if isinstance(self.module, L.LightningModule):
            self.trainer.strategy.backward(loss, None)
        else:
            loss.backward()
        return loss

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        strategy = self.trainer.strategy
        held = strategy._optimizers, strategy._lightning_optimizers
        strategy.optimizers = [_StandIn(o.param_groups) for o in self.optimizers]
        try:
            yield
        finally:
            strategy._optimizers, strategy._lightning_optimizers = held

    def gradient(self, *, before: Callable[[], None] | None = None) -> tuple[float, TensorList]:
        """Loss and gradient, in the loss's own scale, of a run without a trace.

        NaN where ``backward`` was not called; where it was several times, the losses' sum.

        Args:
            before: is called first, with the random numbers of the run.
        """
        losses: list[Tensor] = []

        def on_backward(loss: Tensor, plain: Callable[..., None], /, **options: Any) -> None:
            losses.append(loss.detach())
            plain(loss, **options)

        with self.world.further_run(), torch.enable_grad(), Interception(on_backward):
            if before is not None:
                before()
            self.closure()
            grads = fill([p.grad for p in self.params], self.params)
        self.num_backwards = len(losses)
        value = sum(float(loss) for loss in losses) * self.loss_scale if losses else math.nan
        return value, trees.scale(grads, self.loss_scale)

    @contextmanager
    def moved(self, v: TensorList, distance: float) -> Iterator[None]:
        """While active, the parameters are at θ + distance · v."""
        start = trees.clone(self.params)
        try:
            with torch.no_grad():
                trees.add_(self.params, v, distance)
            yield
        finally:
            trees.copy_(self.params, start)


class _StandIn(Optimizer):
    """Runs the closure that it is given, and moves nothing."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__([dict(group) for group in groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """What the closure returns."""
        return None if closure is None else closure()


@dataclass(frozen=True)
class Differences:
    """A Hessian product from central differences of gradients."""

    product: TensorList
    """H v, extrapolated from two step sizes."""
    error: float
    """Its relative error, estimated from the difference of the two and from rounding; large at
    kinks, and where there is hardly any curvature."""


def differences(subject: Subject, v: TensorList) -> Differences:
    """H v from gradients at four points, with an estimate of the error.

    With D(h) = (g(θ + h v) − g(θ − h v)) / 2h, whose error is of order h², (4 D(h) − D(2h)) / 3 is
    of order h⁴ (Richardson). h balances that against rounding, ε^⅕ max(1, ‖θ‖) / ‖v‖.
    """
    epsilon = max(torch.finfo(p.dtype).eps for p in subject.params)
    size = max(1.0, float(trees.norm(subject.params).detach()))
    h = epsilon ** (1 / 5) * size / float(trees.norm(v)) / 2
    central: list[TensorList] = []
    for step in (h, 2 * h):
        ends = []
        for distance in (step, -step):
            with subject.moved(v, distance):
                ends.append(subject.gradient()[1])
        central.append(trees.scale(trees.add(ends[0], ends[1], -1.0), 1 / (2 * step)))
    near, far = central
    product = trees.add(trees.scale(near, 4 / 3), far, -1 / 3)
    gap = float(trees.norm(trees.add(product, near, -1.0)))
    rounding = epsilon * max(float(trees.norm(g)) for g in ends) / h
    length = float(trees.norm(product))
    return Differences(product, (gap + rounding) / length if length else math.inf)


def distance(a: TensorList, b: TensorList) -> float:
    """‖a − b‖ / ‖b‖; 0 where both are zero."""
    gap, size = float(trees.norm(trees.add(a, b, -1.0))), float(trees.norm(b))
    if gap == 0:
        return 0.0
    return gap / size if size > 0 else math.inf
