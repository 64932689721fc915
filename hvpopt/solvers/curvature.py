"""Whether an operator has negative curvature, and along which direction."""

from dataclasses import dataclass

import torch

from hvpopt import trees
from hvpopt.solvers.checks import Operator
from hvpopt.solvers.lanczos import lanczos
from hvpopt.trees import TensorList


@dataclass(frozen=True)
class LeastCurvature:
    """The least eigenvalue of an operator that Lanczos found, with its unit vector."""

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


def least_curvature(
    matvec: Operator,
    like: TensorList,
    *,
    tolerance: float,
    generator: torch.Generator,
    max_steps: int = 100,
) -> LeastCurvature | None:
    """The least Ritz value of a symmetric operator after so many steps; None where products fail.

    It is the least eigenvalue itself where there are no more variables than steps, and never
    below it: one below zero proves negative curvature.

    Args:
        matvec: v ↦ A v on lists shaped like ``like``.
        like: gives shapes, dtypes and devices.
        tolerance: the share of the largest eigenvalue that counts as zero.
        generator: for the random start, on the CPU.
        max_steps: the most products.
    """
    n = sum(x.numel() for x in like)
    found = lanczos(matvec, like, num_steps=min(n, max_steps), generator=generator)
    if found.num_steps == 0:
        return None
    values, vectors = torch.linalg.eigh(found.matrix())
    vector = trees.zeros_like(like)
    for weight, basis_vector in zip(vectors[:, 0].tolist(), found.basis, strict=True):
        trees.add_(vector, basis_vector, weight)
    return LeastCurvature(
        value=float(values[0]),
        vector=vector,
        scale=float(values.abs().max()),
        tolerance=tolerance,
    )
