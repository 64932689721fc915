"""Hutchinson's estimate of a trace."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpopt import trees
from hvpopt.solvers.checks import Operator, checked_map, checked_vector


@dataclass(frozen=True)
class TraceEstimate:
    """A trace from random probes."""

    value: float
    """The mean of zᵀAz over the probes, in the operator's units."""
    standard_error: float
    """The standard error of that mean; ∞ for a single probe, which says nothing about it."""
    num_products: int
    """Products with A, one a probe."""


def trace(
    matvec: Operator,
    like: Sequence[Tensor],
    *,
    num_probes: int = 10,
    generator: torch.Generator | None = None,
) -> TraceEstimate:
    """The trace of a symmetric A, as the mean of zᵀAz over Rademacher probes z.

    E[zzᵀ] = I gives E[zᵀAz] = tr A. Signs have the least variance of all probes with
    independent entries, 2 (‖A‖²_F − Σᵢ Aᵢᵢ²): a diagonal A is exact with one probe.

    Args:
        matvec: v ↦ A v on lists shaped like ``like``.
        like: Gives shapes, dtypes and devices.
        num_probes: How many probes; one product each. The standard error falls with its root.
        generator: For the probes (a CPU generator).

    Returns:
        The estimate with its standard error; NaN or ∞ if a product is not finite.

    Raises:
        ValueError: For ``num_probes`` < 1, an empty ``like``, or products of other shapes.
        TypeError: If ``like`` holds tensors that are not real floating point.

    Source: Hutchinson, Commun. Stat. Simul. Comput. 19 (1990).

    Examples:
        >>> diagonal = torch.tensor([1.0, 2.0, -4.0])
        >>> trace(lambda v: [diagonal * v[0]], [diagonal], num_probes=2)
        TraceEstimate(value=-1.0, standard_error=0.0, num_products=2)
    """
    if num_probes < 1:
        raise ValueError(f"trace needs num_probes ≥ 1, got {num_probes}.")
    like = checked_vector(like, "like")
    apply = checked_map(matvec, like, "matvec")
    terms = []
    for _ in range(num_probes):
        probe = trees.rademacher_like(like, generator)
        terms.append(trees.dot(probe, apply(probe)))
    samples = torch.stack(terms).double().cpu()
    error = float(samples.std()) / math.sqrt(num_probes) if num_probes > 1 else math.inf
    return TraceEstimate(float(samples.mean()), error, num_probes)
