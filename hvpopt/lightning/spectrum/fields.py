"""The fields of a report that are measured, at one point."""

import math
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch

from hvpopt import trees
from hvpopt.curvature import (
    Eigenpairs,
    ScalarEstimate,
    SpectralDensity,
    alignment,
    extreme_eigenpairs,
    layerwise_trace,
    loss_slice,
    named_blocks,
    spectral_density,
)
from hvpopt.lightning.spectrum.meter import Meter
from hvpopt.lightning.spectrum.report import (
    Density,
    Eigenvalue,
    Estimate,
    LayerTrace,
    Plane,
    Slice,
)
from hvpopt.lightning.spectrum.settings import Settings
from hvpopt.operators import CurvatureOperator
from hvpopt.trees import TensorList

_NUM_BINS = 200
_NUM_GRID = 400


@dataclass(frozen=True)
class _Point:
    """A checkpoint's loss and gradient, and how it is measured."""

    module: L.LightningModule
    params: TensorList
    meter: Meter
    settings: Settings
    generator: torch.Generator
    loss: float
    gradient: TensorList


def fields(
    module: L.LightningModule, operator: CurvatureOperator, meter: Meter, settings: Settings
) -> dict[str, Any]:
    """The fields of the report that are measured."""
    generator = torch.Generator().manual_seed(settings.seed)
    loss, gradient = float(operator.loss()), operator.gradient()
    point = _Point(module, operator.params, meter, settings, generator, loss, gradient)
    top, bottom = (_uphill(pairs, gradient) for pairs in _eigenpairs(point))
    traces = _traces(point)
    density = _density(point)
    return {
        "loss": loss,
        "gradient_norm": float(trees.norm(gradient)),
        "top": _eigenvalues(top, gradient),
        "bottom": _eigenvalues(bottom, gradient),
        **traces,
        "density": _as_numbers(density),
        "negative_share": _estimate(density.share_below(-density.default_sigma)),
        **_slices(point, top, bottom),
    }


def _eigenpairs(point: _Point) -> tuple[Eigenpairs, Eigenpairs]:
    s, matrix = point.settings, point.meter.matrix()
    point.meter.begin("eigenvalues")
    n = matrix.shape[0]
    return extreme_eigenpairs(
        matrix,
        num_top=min(s.num_top, n),
        num_bottom=min(s.num_bottom, n) if s.curvature == "hessian" else 0,
        max_steps=s.max_steps,
        rtol=s.rtol,
        converge="values",
        block_size=1,  # a third of the products where eigenvalues are distinct
        generator=point.generator,
    )


def _uphill(pairs: Eigenpairs, gradient: TensorList) -> Eigenpairs:
    """The pairs with vectors along which the loss rises, of the two signs that each may have."""
    if not pairs.values:
        return pairs
    cosines = alignment(gradient, pairs).cosines
    vectors = [
        trees.scale(v, -1.0) if cosine < 0 else v
        for v, cosine in zip(pairs.vectors, cosines, strict=True)
    ]
    return replace(pairs, vectors=tuple(vectors))


def _eigenvalues(pairs: Eigenpairs, gradient: TensorList) -> tuple[Eigenvalue, ...]:
    if not pairs.values:
        return ()
    cosines = alignment(gradient, pairs).cosines
    each = zip(pairs.values, pairs.residual_bounds, cosines, strict=True)
    return tuple(Eigenvalue(float(v), float(b), float(c)) for v, b, c in each)


def _traces(point: _Point) -> dict[str, Any]:
    point.meter.begin("traces")
    blocks = named_blocks(point.module, point.params)
    whole = ""  # which names no block
    found = layerwise_trace(
        point.meter.matrix(),
        blocks={whole: point.params, **blocks},
        num_probes=point.settings.num_probes,
        generator=point.generator,
    )
    layers = tuple(
        LayerTrace(name, sum(p.numel() for p in params), _estimate(found[name]))
        for name, params in blocks.items()
    )
    return {"trace": _estimate(found[whole]), "layers": layers}


def _density(point: _Point) -> SpectralDensity:
    point.meter.begin("density")
    return spectral_density(
        point.meter.matrix(),
        num_probes=point.settings.density_probes,
        num_steps=point.settings.density_steps,
        generator=point.generator,
    )


def _as_numbers(density: SpectralDensity) -> Density:
    low, high = density.range
    sigma = density.default_sigma
    grid = torch.linspace(low - 4 * sigma, high + 4 * sigma, _NUM_GRID, dtype=torch.float64)
    mass, edges = density.histogram(_NUM_BINS)
    parts = (grid, density.evaluate(grid), density.spread(grid), edges, mass)
    points, values, spread, ends, shares = (tuple(x.tolist()) for x in parts)
    return Density(points, values, spread, sigma, ends, shares)


def _slices(point: _Point, top: Eigenpairs, bottom: Eigenpairs) -> dict[str, Any]:
    """Slices along the two top and the bottom eigenvectors, and the plane of the former."""
    s = point.settings
    chosen = [(f"top eigenvector {i + 1}", top, i) for i in range(min(2, len(top.values)))]
    chosen += [("bottom eigenvector", bottom, 0)] if bottom.values else []
    point.meter.begin("slices")
    slices = []
    for label, pairs, i in chosen if s.slice_points else []:
        direction, value = pairs.vectors[i], pairs.values[i]
        along = loss_slice(
            point.meter.loss,
            point.params,
            direction,
            radius=_radius(point, value),
            num_points=s.slice_points,
            in_place=True,
        )
        slope = float(trees.dot(point.gradient, direction))
        (distances,) = along.distances
        slices.append(
            Slice(label, value, slope, tuple(distances.tolist()), tuple(along.values.tolist()))
        )
    return {"slices": tuple(slices), "plane": _plane(point, top)}


def _plane(point: _Point, top: Eigenpairs) -> Plane | None:
    s = point.settings
    if not s.plane_points or len(top.values) < 2:
        return None
    point.meter.begin("plane")
    across, up = (
        torch.linspace(-radius, radius, s.plane_points, dtype=torch.float64)
        for radius in (_radius(point, value) for value in top.values[:2])
    )
    on_plane = loss_slice(
        point.meter.loss,
        point.params,
        top.vectors[:2],
        distances=(across, up),
        in_place=True,
    )
    rows = tuple(tuple(row) for row in on_plane.values.tolist())
    return Plane(tuple(across.tolist()), tuple(up.tolist()), rows)


def _radius(point: _Point, eigenvalue: float) -> float:
    """The distance at which the eigenvalue alone changes the loss by twice its size.

    At least a thousandth and at most the whole of the parameters' norm.
    """
    size = float(trees.norm(point.params).detach()) or 1.0
    reach = math.sqrt(4 * abs(point.loss) / abs(eigenvalue)) if eigenvalue else size
    return min(max(reach, 1e-3 * size), size) if math.isfinite(reach) else size


def _estimate(found: ScalarEstimate) -> Estimate:
    return Estimate(float(found.value), float(found.standard_error))
