"""Step lengths by backtracking, for each example its own."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpopt.options import check_count, check_range

Trial = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]
"""(factors, places) ↦ the decrease F − F⁺, the predicted −⟨∇F, Δu⟩ and the rounding of F, of the
examples in ``places`` (None: all), whose step lengths are multiplied by ``factors``."""


@dataclass(frozen=True)
class Backtracking:
    """Shortens a step until the objective falls by a part of what its gradient predicts.

    Accepts the first α = shrinkᵏ α₀ with F(u⁺) ≤ F(u) + c ⟨∇F, u⁺ − u⟩ (Armijo's condition, along
    the projection arc where the domain is bounded), up to F's rounding. An F that is not finite
    shortens, too.

    Args:
        shrink: Between 0 and 1.
        sufficient_decrease: c, between 0 and 1.
        max_trials: The most lengths that are tried at one step.

    Raises:
        ValueError: For options out of range.

    Source: Bertsekas, Nonlinear Programming (1999), section 2.3.
    """

    shrink: float = 0.5
    sufficient_decrease: float = 1e-4
    max_trials: int = 20

    def __post_init__(self) -> None:
        for name in ("shrink", "sufficient_decrease"):
            value = check_range(name, getattr(self, name), 0.0, 1.0)
            if value in (0.0, 1.0):
                raise ValueError(f"{name}={value} must lie strictly between 0 and 1.")
        check_count("max_trials", self.max_trials)

    def factors(self, trial: Trial, like: Tensor) -> tuple[Tensor, Tensor]:
        """By what to multiply the step lengths of the examples, and for which one was found.

        Args:
            trial: Tries lengths; called with the examples that are still to be shortened.
            like: (k,), for the number of examples, dtype and device.
        """
        factors = torch.ones_like(like)
        found = torch.zeros_like(like, dtype=torch.bool)
        places: Tensor | None = None
        for _ in range(self.max_trials):
            decrease, predicted, slack = trial(
                factors if places is None else factors[places], places
            )
            enough = decrease >= self.sufficient_decrease * predicted.clamp(min=0.0) - slack
            enough &= torch.isfinite(decrease)
            passed = enough.nonzero()[:, 0] if places is None else places[enough]
            found[passed] = True
            places = (~found).nonzero()[:, 0]
            if not len(places):
                break
            factors[places] *= self.shrink
        return factors, found
