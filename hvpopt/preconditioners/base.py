"""What a preconditioner is: a cheap stand-in for the damped curvature matrix, with an inverse."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvpopt.closure import ClosureOracle
from hvpopt.trees import TensorList


@dataclass(frozen=True)
class CurvaturePoint:
    """What a preconditioner may look at, at the parameters of one step.

    Attributes:
        params: the parameters.
        grad: the gradient of the objective, weight decay included; the same on all ranks.
        product: v ↦ B v, the loss's curvature without damping and without weight decay, averaged
            over ranks.
        oracle: the step's closure, its counting run done, for a run of the preconditioner's own.
        seed: of this step's random numbers, the same on all ranks.
    """

    params: TensorList
    grad: TensorList
    product: Callable[[TensorList], TensorList]
    oracle: ClosureOracle
    seed: int


State = dict[str, Any]


class Preconditioner(ABC):
    """M ≈ B + D, with D = diag(shift) the damping and weight decay of each parameter.

    A preconditioner holds options only. What it knows of the curvature lies in the states, one
    dictionary a parameter, which are the optimizer's own: they are saved, loaded and moved with
    it. Solving is linear, symmetric and positive definite, and constant between refreshes but for
    the shift.

    Attributes:
        every: steps from one refresh to the next.
    """

    every: int

    def prepare(self, point: CurvaturePoint, states: Sequence[State], num_steps: int) -> None:
        """Refreshes what is known where ``num_steps`` earlier steps make it due, or none is."""
        if num_steps % self.every == 0 or not self.is_ready(states):
            self.refresh(point, states)

    @abstractmethod
    def is_ready(self, states: Sequence[State]) -> bool:
        """Whether the states hold what `solve` needs."""

    @abstractmethod
    def refresh(self, point: CurvaturePoint, states: Sequence[State]) -> None:
        """Looks at the curvature at a point and writes what it learns into the states.

        Where it meets numbers that are not finite the states stay as they were; the caller asks
        `is_ready` and goes without where it is not.
        """

    @abstractmethod
    def solve(self, r: TensorList, states: Sequence[State], shift: Sequence[float]) -> TensorList:
        """M⁻¹ r.

        Args:
            r: one tensor a parameter.
            states: of the same parameters.
            shift: D, one number a parameter, in the units of the curvature.
        """

    def inverse(
        self, states: Sequence[State], shift: Sequence[float]
    ) -> Callable[[TensorList], TensorList]:
        """r ↦ M⁻¹ r at one shift, for many r."""
        return lambda r: self.solve(r, states, shift)


def restored(held: Any, parameter: Tensor) -> Any:
    """Nested dictionaries, their tensors on a parameter's device in its dtype, or in float32."""
    if isinstance(held, dict):
        return {key: restored(value, parameter) for key, value in held.items()}
    if not isinstance(held, Tensor):
        return held
    return held.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32), copy=True)
