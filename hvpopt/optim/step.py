"""One step of Newton's method under way, and the state that it will leave if it ends well."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from hvpopt import trees
from hvpopt.optim.damping import balanced_scale, damping_after
from hvpopt.optim.model import Precondition, tensors
from hvpopt.optim.objective import Objective
from hvpopt.optim.report import NewtonCGReport
from hvpopt.preconditioners.base import State
from hvpopt.solvers.stopping import ForcingTerm, ResidualNorm, StoppingRule
from hvpopt.trees import TensorList


class Step:
    """One step under way: the objective, and the state it will leave if it ends well.

    Args:
        objective: at the parameters.
        states: drafts of the parameters' states.
        precondition: for CG, or None.
        report: makes the report from an outcome and figures.
        halves: the objective with gradient and curvature of a part of the batch, and with those
            of the rest; None where the step is not to be debiased.

    Attributes:
        objective, precondition, report, halves: as given.
    """

    def __init__(
        self,
        objective: Objective,
        states: Sequence[State],
        precondition: Precondition | None,
        report: Callable[..., NewtonCGReport],
        halves: tuple[Objective, Objective] | None = None,
    ) -> None:
        self.objective, self._states = objective, states
        self.precondition, self.report, self.halves = precondition, report, halves
        self._forced: StoppingRule | None = None

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

    def stopping(self, rule: StoppingRule | ForcingTerm) -> StoppingRule:
        """When CG may stop: the rule, or the tolerance that a forcing term gives at this step."""
        if not isinstance(rule, ForcingTerm):
            return rule
        if self._forced is None:
            norm = float(trees.norm(self.objective.grad))
            rtol = rule.rtol(norm, self.number("forcing_norm"), self.number("forcing"))
            self.remember(forcing_norm=norm, forcing=rtol)
            self._forced = ResidualNorm(rtol=rtol)
        return self._forced

    def expect(self, value: float, slope: float) -> None:
        """Keeps F where the step ended, and gᵀp, p the step, where it began."""
        self._states[0].update(objective=value, slope=slope)

    def shrink(self, factors: Sequence[float]) -> None:
        """Multiplies each parameter by its factor where the step has ended, for good."""
        self.remember(objective=self.objective.shrink(factors))

    def dampings(
        self,
        dampings: Sequence[float],
        ratio: float,
        slope_ratio: float,
        factor: float,
        leasts: Sequence[float],
        share: float = math.inf,
    ) -> list[float]:
        """Each group's λ after a step, see `damping_after`."""
        num, pairs = self.num_batches, zip(dampings, leasts, strict=True)
        return [damping_after(d, ratio, slope_ratio, num, factor, x, share) for d, x in pairs]

    @property
    def num_batches(self) -> int:
        """How often the batch has changed; 0 on full batches."""
        return int(self.number("num_batches") or 0)

    def scale(self, slope_ratio: float, gain: float) -> float:
        """α by which this step is multiplied, see `balanced_scale`; kept for the next one."""
        scale, num_batches = self.number("scale") or 1.0, self.num_batches
        if not math.isnan(slope_ratio):
            scale = balanced_scale(scale, slope_ratio, num_batches, gain=gain)
            self.remember(scale=scale, num_batches=num_batches + 1)
        return scale

    def cut(self, size: float) -> float:
        """What a direction of this length is multiplied by: 1 up to twice the usual, then less.

        Usual is the geometric mean of the last ones, cut, with a weight of a tenth for each. A few
        rows that are hard, together in a small batch, give a direction many times as long as the
        others, on which neither the batch's own loss nor the next batch's can warn in time.
        """
        usual = self.number("usual") or size
        cut = min(1.0, 2 * usual / size) if self.num_batches and size > 0 else 1.0
        if 0 < cut * size < math.inf:
            self.remember(usual=usual**0.9 * (cut * size) ** 0.1)
        return cut

    def slope_ratio(self) -> float:
        """g′ᵀp / gᵀp of the last step p, with g′ the gradient here, where it ended.

        NaN where this step's batch is the last one's, and says nothing new. It is another one
        where F is not what the last step left it at, to two thirds of the digits.
        """
        expected, objective = self.number("objective"), self.objective
        if expected is None:
            return math.nan
        if abs(objective.value - expected) <= objective.eps ** (2 / 3) * abs(objective.value):
            return math.nan
        return self._slope_at_its_end()

    def mean_slope_ratio(self) -> float:
        """The same over the average gᵀp of the last steps, each weighing 0.95 of the one after it.

        Its average over batches is that of g′ᵀp over that of gᵀp. The average of their ratios is
        made by the steps on batches whose loss was nearly zero, which hardly move.
        """
        ratio, slope = self.slope_ratio(), self.number("slope")
        if math.isnan(ratio) or not slope:
            return math.nan
        total = 0.95 * (self.number("slopes") or 0.0) + 0.05 * slope
        self.remember(slopes=total)
        return ratio * slope * (1 - 0.95 ** (self.num_batches + 1)) / total

    def late_ratio(self) -> float:
        """ρ of the last step p, from the gradients at its ends: ½ (gᵀp + g′ᵀp) / m(p).

        The trapezoidal rule for the change, exact on a quadratic. Unlike ρ itself it sees all the
        data that the gradients are of.
        """
        slope, predicted = self.number("slope"), self.number("predicted")
        if not slope or not predicted:
            return math.nan
        return 0.5 * (1 + self._slope_at_its_end()) * slope / predicted

    def _slope_at_its_end(self) -> float:
        slope, update = self.number("slope"), tensors(self.kept("update"))
        if not slope or update is None:
            return math.nan
        return float(trees.dot(self.objective.grad, update)) / slope
