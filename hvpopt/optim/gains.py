"""Multiplicative learning-rate gains: how SMD adapts them, and figures about them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hvpopt import trees
from hvpopt.trees import TensorList

_MAX_SAMPLED = 10_000


@dataclass(frozen=True, kw_only=True)
class GainRule:
    """How a gain answers to the correlation of v and the gradient.

    Attributes:
        normalization: "rms" divides the correlation by its running root mean square.
        rho: a gain shrinks at most by this factor.
        bounds: the least and the largest gain.
        beta: decay of the running mean square.
    """

    normalization: Literal["rms"] | None
    rho: float
    bounds: tuple[float, float]
    beta: float

    def __call__(
        self, gain: Tensor, square: Tensor, signal: Tensor, *, mu: float, age: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The new gain, the new mean square, and where the gain fell by the full factor ρ.

            s ← β s + (1 − β) signal²,   u = signal / √(s / (1 − β^age)),
            gain ← gain ⊙ max(ρ, 1 + μ u), within the bounds.

        Args:
            gain: of a parameter's shape, or a scalar.
            square: s, the running mean square, of the same shape.
            signal: v⊙g, or its sum over what shares the gain.
            mu: the gains' learning rate.
            age: how many signals s has seen before, the first of all (which is zero) not counted.
        """
        square = torch.lerp(signal**2, square, self.beta)
        if self.normalization == "rms":
            scale = (square / (1 - self.beta ** max(age, 1))).sqrt_()
            signal = (signal / scale).nan_to_num_(0.0, 0.0, 0.0)  # where all were zero
        change = (mu * signal).add_(1)
        is_floored = change <= self.rho
        return change.clamp_(min=self.rho).mul_(gain).clamp_(*self.bounds), square, is_floored


def figures(
    rule: GainRule,
    gains: Sequence[Tensor],
    floored: Sequence[Tensor],
    old: tuple[TensorList, TensorList],
    new: tuple[TensorList, TensorList],
) -> dict[str, float]:
    """Figures for a report, by one transfer from the device.

    Args:
        rule: whose bounds count.
        gains: the new gains.
        floored: where they fell by the full factor.
        old: v before the step and C v.
        new: v after the step and the gradient.
    """
    low, high = rule.bounds
    flat = torch.cat([gain.reshape(-1).float() for gain in gains])
    norm, (least, most) = trees.norm(new[0]), flat.aminmax()
    at_bounds = (flat <= low).logical_or_(flat >= high)
    # evenly spaced ones, where there are more than torch.quantile sorts quickly
    sampled = flat[:: 2 * (flat.numel() // _MAX_SAMPLED) + 1].log()
    levels = torch.tensor([0.05, 0.5, 0.95], device=flat.device)
    quantiles = torch.quantile(sampled, levels).unbind()
    numbers = {
        **dict(zip(("log_gain_low", "log_gain_median", "log_gain_high"), quantiles, strict=True)),
        "log_gain_min": least.log(),
        "log_gain_mean": sampled.mean(),
        "log_gain_max": most.log(),
        "fraction_floored": torch.stack([f.count_nonzero() for f in floored]).sum() / flat.numel(),
        "fraction_at_bounds": at_bounds.count_nonzero() / flat.numel(),
        "trace_norm": norm,
        "trace_alignment": trees.dot(*new) / (norm * trees.norm(new[1])),
        "trace_curvature": trees.dot(*old) / trees.dot(old[0], old[0]),
    }
    values = torch.stack([x.to(flat.device, torch.float64) for x in numbers.values()]).tolist()
    return dict(zip(numbers, values, strict=True))
