"""One step of Newton's method under way, and the state that it will leave if it ends well."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from hvpopt import trees
from hvpopt.optim.model import Precondition, tensors
from hvpopt.optim.objective import Objective
from hvpopt.optim.report import NewtonCGReport
from hvpopt.preconditioners.base import State
from hvpopt.trees import TensorList


class Step:
    """One step under way: the objective, and the state it will leave if it ends well.

    Args:
        objective: at the parameters.
        states: drafts of the parameters' states.
        precondition: for CG, or None.
        report: makes the report from an outcome and figures.

    Attributes:
        objective, precondition, report: as given.
    """

    def __init__(
        self,
        objective: Objective,
        states: Sequence[State],
        precondition: Precondition | None,
        report: Callable[..., NewtonCGReport],
    ) -> None:
        self.objective, self._states = objective, states
        self.precondition, self.report = precondition, report

    def kept(self, key: str) -> list[Any]:
        """What earlier steps kept of each parameter; None where they did not."""
        return [state.get(key) for state in self._states]

    def keep(self, **values: TensorList) -> None:
        """Keeps lists of tensors, one a parameter, for later steps."""
        for key, of_each in values.items():
            for state, value in zip(self._states, of_each, strict=True):
                state[key] = value

    def number(self, key: str) -> float | None:
        """What an earlier step kept of all parameters together."""
        return self._states[0].get(key)

    def remember(self, **values: float) -> None:
        """Keeps numbers for later steps."""
        self._states[0].update(values)

    def expect(self, value: float, slope: float) -> None:
        """Keeps F where the step ended, and gᵀp, p the step, where it began."""
        self._states[0].update(objective=value, slope=slope)

    def slope_ratio(self) -> float:
        """g′ᵀp / gᵀp of the last step p, with g′ the gradient here, where it ended.

        NaN where this step's batch is the last one's, and says nothing new. It is another one
        where F is not what the last step left it at, to two thirds of the digits.
        """
        expected, slope = self._states[0].get("objective"), self._states[0].get("slope")
        update = tensors(self.kept("update"))
        if expected is None or not slope or update is None:
            return math.nan
        objective = self.objective
        if abs(objective.value - expected) <= objective.eps ** (2 / 3) * abs(objective.value):
            return math.nan
        return float(trees.dot(objective.grad, update)) / slope
