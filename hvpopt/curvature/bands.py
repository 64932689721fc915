"""Estimates with a standard error, and bands of confidence around them."""

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

_NEARLY_NORMAL = 4096  # degrees of freedom above which a band is wider by less than 1e-3


@dataclass(frozen=True)
class ScalarEstimate:
    """A number from random probes."""

    value: float
    """The estimate."""
    standard_error: float
    """Of the estimate; ∞ for a single probe, which says nothing about it."""
    num_products: int
    """Products with the operator."""
    degrees_of_freedom: int = 0
    """Of the standard error: independent terms less one."""

    def band(self, level: float = 0.95) -> tuple[float, float]:
        """The interval that holds the true value with probability ``level``, by Student's t.

        It supposes that the terms that were averaged are nearly normal, as sums over many
        entries are.

        Raises:
            ValueError: For a level outside (0, 1).
        """
        half = band_factor(level, self.degrees_of_freedom) * self.standard_error
        return self.value - half, self.value + half


Estimate = TypeVar("Estimate", bound=ScalarEstimate)


def mean_estimate(terms: Tensor, num_products: int, kind: type[Estimate]) -> Estimate:
    """The mean of independent terms with its standard error."""
    terms = terms.cpu().double()
    count = len(terms)
    error = float(terms.std()) / math.sqrt(count) if count > 1 else math.inf
    return kind(float(terms.mean()), error, num_products, count - 1)


def band_factor(level: float, degrees_of_freedom: int) -> float:
    """The standard errors on either side of an estimate that hold ``level`` of Student's t.

    1 where no degree of freedom is left, as the standard error is infinite then.

    Raises:
        ValueError: For a level outside (0, 1).

    Examples:
        >>> round(band_factor(0.95, 9), 3)
        2.262
    """
    if not 0 < level < 1:
        raise ValueError(f"A band needs a level in (0, 1), got {level}.")
    if degrees_of_freedom < 1:
        return 1.0
    nu = min(degrees_of_freedom, _NEARLY_NORMAL)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if _t_within(middle, nu) < level:
            low = middle
        else:
            high = middle
    return math.sqrt(nu) * math.tan((low + high) / 2)


def _t_within(angle: float, nu: int) -> float:
    """P(|t| < √ν tan(angle)) for Student's t with ν degrees of freedom.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    cosine, sine = math.cos(angle), math.sin(angle)
    term, total = (cosine, 0.0) if nu % 2 else (1.0, 0.0)
    for i in range(3 if nu % 2 else 2, nu + 1, 2):
        total += term
        term *= cosine**2 * (i - 1) / i
    return 2 / math.pi * (angle + sine * total) if nu % 2 else sine * total


def standard_error(rows: Tensor) -> Tensor:
    """The standard error of the mean of k rows, (n,); ∞ for one row."""
    if len(rows) == 1:
        return torch.full_like(rows[0], math.inf)
    return rows.std(0) / math.sqrt(len(rows))
