"""Where the gradient vanishes: is it a minimum, and if not, which way is down?"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hvpopt import trees
from hvpopt.minimization.objective import Objective, Point
from hvpopt.solvers.lanczos import lanczos
from hvpopt.trees import TensorList


@dataclass(frozen=True)
class LeastCurvature:
    """The least eigenvalue of a Hessian that Lanczos found, with its unit vector."""

    value: float
    vector: TensorList
    scale: float
    """The largest eigenvalue found, in absolute value."""
    tolerance: float
    """Eigenvalues within this times ``scale`` of zero have no sign."""

    @property
    def is_negative(self) -> bool:
        """Whether it is, beyond rounding."""
        return self.value < -self.tolerance * self.scale

    def leaves_open(self, gtol: float, size: float) -> bool:
        """Whether it does not tell what kind of point this is.

        So where it is zero, or so small that a gradient of ``gtol`` may belong to a stationary
        point that is not close by, next to the size of x: an inflection, say.
        """
        is_zero = abs(self.value) <= self.tolerance * self.scale
        return is_zero or self.value * self.tolerance**0.75 * size < gtol


def least_curvature(
    point: Point, rounding: float, generator: torch.Generator, max_steps: int = 100
) -> LeastCurvature | None:
    """The least Ritz value of the Hessian after so many steps; None where products fail.

    It is the least eigenvalue itself where there are no more variables than steps, and never
    below it.
    """
    n = sum(x.numel() for x in point.x)
    found = lanczos(point.product, point.x, num_steps=min(n, max_steps), generator=generator)
    if found.num_steps == 0:
        return None
    values, vectors = torch.linalg.eigh(found.matrix())
    vector = trees.zeros_like(point.x)
    for weight, basis_vector in zip(vectors[:, 0].tolist(), found.basis, strict=True):
        trees.add_(vector, basis_vector, weight)
    return LeastCurvature(
        value=float(values[0]),
        vector=vector,
        scale=float(values.abs().max()),
        tolerance=math.sqrt(rounding),
    )


def way_down(
    objective: Objective, point: Point, least: LeastCurvature, gtol: float
) -> TensorList | None:
    """A point to which f falls from a stationary one, along the eigenvector; None if none is seen.

    With a negative eigenvalue λ, one with f(x ± t v) ≤ f(x) − 0.1 · ½ |λ| t². With an eigenvalue
    of zero, as on a monkey saddle, one where f has fallen by more than ten times what the
    tolerance on the gradient lets it, at one of three short distances.
    """
    size = max(1.0, float(trees.norm(point.x)))
    downhill = -math.copysign(1.0, float(trees.dot(point.grad, least.vector)))

    def fallen(t: float) -> float:
        return point.value - objective.value(trees.add(point.x, least.vector, t))

    noise = objective.noise(point.value)
    if not least.is_negative:
        if not least.leaves_open(gtol, size):
            return None
        for distance in (1e-3, 1e-2, 1e-1):
            for sign in (downhill, -downhill):
                t = sign * distance * size
                if fallen(t) > max(noise, 10 * gtol * abs(t)):
                    return trees.add(point.x, least.vector, t)
        return None
    t, enough = 0.1 * size, 0.05 * abs(least.value)
    while enough * t**2 > noise and t > objective.rounding * size:
        for sign in (downhill, -downhill):
            gained = fallen(sign * t)
            if gained >= enough * t**2:
                return trees.add(point.x, least.vector, _stretched(fallen, sign * t, gained))
        t *= 0.25
    return None


def _stretched(fallen: Callable[[float], float], t: float, gained: float) -> float:
    """The last of t, 2t, 4t, … up to which f goes on falling."""
    for _ in range(60):
        more = fallen(2 * t)
        if not more > gained:
            break
        t, gained = 2 * t, more
    return t
