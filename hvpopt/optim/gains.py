"""Multiplicative learning-rate gains: how SMD adapts them, and figures about them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hvpopt import trees
from hvpopt.trees import TensorList

_MAX_SAMPLED = 100_000


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
            scale = (square / (1 - self.beta ** max(age, 1))).sqrt()
            signal = torch.where(scale > 0, signal / scale, torch.zeros_like(signal))
        change = 1 + mu * signal
        gain = (gain * change.clamp(min=self.rho)).clamp(*self.bounds)
        return gain, square, change <= self.rho


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
    log, norm = flat.log(), trees.norm(new[0])
    # evenly spaced ones, where there are more than torch.quantile sorts quickly
    sampled = log[:: 2 * (log.numel() // _MAX_SAMPLED) + 1]
    levels = torch.tensor([0.05, 0.5, 0.95], device=log.device)
    quantiles = torch.quantile(sampled, levels).unbind()
    numbers = {
        **dict(zip(("log_gain_low", "log_gain_median", "log_gain_high"), quantiles, strict=True)),
        "log_gain_min": log.min(),
        "log_gain_mean": log.mean(),
        "log_gain_max": log.max(),
        "fraction_floored": torch.cat([f.reshape(-1) for f in floored]).float().mean(),
        "fraction_at_bounds": ((flat <= low) | (flat >= high)).float().mean(),
        "trace_norm": norm,
        "trace_alignment": trees.dot(*new) / (norm * trees.norm(new[1])),
        "trace_curvature": trees.dot(*old) / trees.dot(old[0], old[0]),
    }
    values = torch.stack([x.to(flat.device, torch.float64) for x in numbers.values()]).tolist()
    return dict(zip(numbers, values, strict=True))
