"""A look at the curvature at one step: what it is of, and what it finds."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hvpopt.curvature import Eigenpairs, LossSlice, Sharpness, SpectralDensity, top_eigenpairs
from hvpopt.operators import CurvatureOperator


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much work a measurement is.

    Attributes:
        max_lanczos_steps: at most so many products for the top eigenvalue.
        rtol: its relative tolerance.
        num_probes: random vectors for the trace.
        num_density_probes, density_steps: random vectors of the spectral density, and products
            for each.
        seed: of the random vectors, the same at every measurement.
    """

    max_lanczos_steps: int
    rtol: float
    num_probes: int
    num_density_probes: int
    density_steps: int
    seed: int


@dataclass
class Look:
    """A look at the curvature at the current parameters.

    Attributes:
        operator: the curvature.
        module: whose parameters they are.
        optimizer: that trains them.
        names: of the metrics to take.
        effort: how much work to do.
        memory: what the looks before this one have found, for warm starts.
        scalars: what has been measured, by name.
        num_products, seconds: what it took, the seconds by metric.
        sharpness, spectrum, layers, slices: what else has been found: the sharpness that the
            alert looks at, the density, the trace of each layer, and slices along eigenvectors.
    """

    operator: CurvatureOperator
    module: nn.Module
    optimizer: torch.optim.Optimizer
    names: Collection[str]
    effort: Effort
    memory: dict[str, Any]
    scalars: dict[str, float] = field(default_factory=dict)
    num_products: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    sharpness: Sharpness | None = None
    spectrum: SpectralDensity | None = None
    layers: dict[str, float] | None = None
    slices: "Slices | None" = None

    def generator(self) -> torch.Generator:
        """Random numbers that do not depend on what else is measured."""
        return torch.Generator().manual_seed(self.effort.seed)

    def remember(self, key: str, pairs: Eigenpairs) -> None:
        """Keeps eigenpairs for the next look, unless the loss has left the finite numbers."""
        if all(map(math.isfinite, pairs.values)):
            self.memory[key] = pairs

    def top(self, k: int) -> Eigenpairs:
        """The k top eigenpairs, from those of the last look."""
        found = top_eigenpairs(
            self.operator,
            k=k,
            converge="values",
            generator=self.generator(),
            max_steps=self.effort.max_lanczos_steps,
            rtol=self.effort.rtol,
            start=self.memory.get(f"top {k}"),
        )
        self.remember(f"top {k}", found)
        self.num_products += found.num_products
        return found


@dataclass(frozen=True)
class Slices:
    """The loss along the one or two top eigenvectors."""

    values: LossSlice
    """Over the line of one, or the plane of two; in the middle are the parameters."""
    eigenvalues: tuple[float, ...]
    slopes: tuple[float, ...]
    """gᵀv of each eigenvector v."""

    def line(self, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(s,) distances along an eigenvector, and (s,) the loss there."""
        values = self.values.values
        if values.dim() == 2:
            values = values.select(1 - axis, values.shape[1 - axis] // 2)
        return self.values.distances[axis], values
