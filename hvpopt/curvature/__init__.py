"""Estimates of what a curvature matrix looks like, from its products with vectors alone.

Each takes a `hvpopt.operators.LinearOperator`, such as the Hessian, GGN or Fisher matrix over a
batch or a data loader, or a function v ↦ A v on lists of tensors with ``like=``. Random numbers
come from a CPU generator: the same seed gives the same estimate on every device and rank. Costs
are counted in products; what a product costs is in the operator's hands.

| function | products |
|---|---|
| `top_eigenpairs` and its kin, `condition_number`, `sharpness` | 5 to 20 for eigenvalues apart |
| `trace`, `diagonal`, `frobenius_norm`, `layerwise_trace` | one a probe, or up to two |
| `spectral_density`, `effective_dimension` | probes × steps |
| `directional_curvature` | 1 |
| `alignment`, `loss_slice`, `filter_normalized` | none |
| `layerwise` | what the estimate takes, of each block |
"""

from hvpopt.curvature.bands import ScalarEstimate
from hvpopt.curvature.conditioning import ConditionNumber, condition_number
from hvpopt.curvature.density import SpectralDensity, effective_dimension, spectral_density
from hvpopt.curvature.diagonal import DiagonalEstimate, diagonal
from hvpopt.curvature.directions import (
    Alignment,
    DirectionalCurvature,
    alignment,
    directional_curvature,
)
from hvpopt.curvature.layers import layerwise, layerwise_trace, named_blocks
from hvpopt.curvature.limits import StabilityLimit, gradient_descent_limit, optimizer_limit
from hvpopt.curvature.norms import frobenius_norm
from hvpopt.curvature.sharpness import Sharpness, sharpness
from hvpopt.curvature.slices import LossSlice, filter_normalized, loss_slice
from hvpopt.curvature.trace import TraceEstimate, trace
from hvpopt.solvers.eigenpairs import (
    Eigenpairs,
    bottom_eigenpairs,
    extreme_eigenpairs,
    top_eigenpairs,
)

__all__ = [
    "Alignment",
    "ConditionNumber",
    "DiagonalEstimate",
    "DirectionalCurvature",
    "Eigenpairs",
    "LossSlice",
    "ScalarEstimate",
    "Sharpness",
    "SpectralDensity",
    "StabilityLimit",
    "TraceEstimate",
    "alignment",
    "bottom_eigenpairs",
    "condition_number",
    "diagonal",
    "directional_curvature",
    "effective_dimension",
    "extreme_eigenpairs",
    "filter_normalized",
    "frobenius_norm",
    "gradient_descent_limit",
    "layerwise",
    "layerwise_trace",
    "loss_slice",
    "named_blocks",
    "optimizer_limit",
    "sharpness",
    "spectral_density",
    "top_eigenpairs",
    "trace",
]
