"""The alert of a sharpness that stays over what the learning rate allows."""

import math
from collections.abc import Mapping

from hvpopt.curvature import Sharpness


class StabilityAlert:
    """Says in one line that the sharpness stays over the limit of the learning rate.

    It speaks after ``patience`` measurements in a row above the limit, and again only after twice
    as many steps: of a run of a million steps that is unstable all the way through one hears
    some fifteen times.

    Args:
        patience: how many measurements in a row.

    Attributes:
        num_alerts: how often it has spoken.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._num_above = 0
        self._quiet_until = 0
        self.num_alerts = 0

    def __call__(self, step: int, found: Sharpness) -> str | None:
        """The line, if it is time for one.

        Args:
            step: of the training.
            found: the sharpness at that step, with or without a limit.
        """
        limit = found.limit
        if limit is None or not found.ratio > 1:
            self._num_above = 0
            return None
        self._num_above += 1
        if self._num_above < self._patience or step < self._quiet_until:
            return None
        self._quiet_until = 2 * step
        self.num_alerts += 1
        times = "1 measurement" if self._num_above == 1 else f"{self._num_above} measurements"
        of = "Hessian" if limit.preconditioner is None else "preconditioned Hessian"
        return (
            f"Step {step}: the largest eigenvalue of the {of}, {found.value:.4g}, has stayed over "
            f"{limit.name} = {limit.threshold:.4g} for {times}: steps along "
            f"its eigenvector overshoot. lr={rounded_down(found.largest_stable_lr):g} would be "
            f"stable (now {limit.lr:g})."
        )

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs: plain numbers."""
        return {
            "num_above": self._num_above,
            "quiet_until": self._quiet_until,
            "num_alerts": self.num_alerts,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restores what `state_dict` returned."""
        self._num_above, self._quiet_until = state["num_above"], state["quiet_until"]
        self.num_alerts = state["num_alerts"]


def rounded_down(x: float) -> float:
    """The first two digits of a positive number.

    Examples:
        >>> rounded_down(0.08999), rounded_down(123.0)
        (0.089, 120.0)
    """
    unit = 10.0 ** (math.floor(math.log10(x)) - 1)
    return float(f"{math.floor(x / unit * (1 + 1e-9)) * unit:.1e}")
