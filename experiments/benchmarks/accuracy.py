"""The accuracy of products in one precision, against the same products in float64."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from hvpopt import ClosureOracle, trees
from hvpopt.engines.choice import EngineName

from .models import Problem
from .tasks import Curvature

ENGINES: dict[Curvature, tuple[EngineName, ...]] = {
    "hessian": ("graph", "dual", "finite_difference"),
    "ggn": ("graph", "dual"),
}
FIRST_EXPONENT = 16
"""Of the loss scale 2ᵏ: ``torch.amp.GradScaler`` starts there."""


@dataclass(frozen=True)
class Precision:
    """How a network is computed."""

    name: str
    """How tables call it."""
    dtype: torch.dtype
    """Of parameters and data."""
    autocast: torch.dtype | None = None
    """What ``torch.autocast`` computes in."""
    scaled: bool = False
    """Whether the loss is scaled against underflow."""


REFERENCE = Precision("float64", torch.float64)
PRECISIONS = (
    REFERENCE,
    Precision("float32", torch.float32),
    Precision("bfloat16 autocast", torch.float32, torch.bfloat16),
    Precision("float16 autocast, scaled loss", torch.float32, torch.float16, scaled=True),
)


@dataclass(frozen=True)
class Values:
    """What one engine computes in one precision, in float64 and in the loss's own scale."""

    loss: Tensor
    """Without dimensions."""
    gradient: Tensor
    """Flat, of n parameters."""
    products: Tensor
    """(directions, n)."""
    exponent: int | None = None
    """k of the loss scale 2ᵏ."""

    @property
    def is_finite(self) -> bool:
        """Whether all are."""
        return all(bool(x.isfinite().all()) for x in (self.loss, self.gradient, self.products))


@dataclass(frozen=True)
class Row:
    """Relative errors of one engine in one precision; None where it failed."""

    precision: str
    curvature: str
    engine: str
    loss: float | None = None
    gradient: float | None = None
    product: float | None = None
    """Root of the mean square over directions."""
    exponent: int | None = None
    """Of the loss scale, the largest up to 16 for which all is finite."""
    failure: str | None = None
    """The first line of the error."""


def compute(
    problem: Problem,
    precision: Precision,
    curvature: Curvature,
    engine: EngineName,
    directions: int,
) -> Values:
    """Loss, gradient and products at the problem's parameters, without a trace.

    A scaled loss is 2ᵏ times the loss, k = 16 or the next lower for which all values are finite,
    as `torch.amp.GradScaler` backs off.

    Raises:
        RuntimeError: Where torch has no kernel for the precision, or at every scale an overflow.
    """
    problem = _cast(problem, precision.dtype)
    params = list(problem.module.parameters())
    vs = [_direction(problem, i) for i in range(directions)]
    for exponent in range(FIRST_EXPONENT, -1, -1) if precision.scaled else (0,):
        closure = partial(_step, problem, precision, 2.0**exponent)
        with ClosureOracle(closure, params, engine=engine, leave_no_trace=True) as oracle:
            point = oracle.trace(curvature)
            products = torch.stack([_flat(point.product(v)) for v in vs])
        values = Values(
            point.loss.double() / 2.0**exponent,
            _flat(point.grad) / 2.0**exponent,
            products / 2.0**exponent,
            exponent if precision.scaled else None,
        )
        if values.is_finite:
            return values
    raise RuntimeError("Not finite at any loss scale.")


def measure(problem: Problem, *, directions: int) -> list[Row]:
    """The errors of all engines in all precisions."""
    rows = []
    for curvature, engines in ENGINES.items():
        reference = compute(problem, REFERENCE, curvature, "graph", directions)
        for precision in PRECISIONS:
            for engine in engines:
                row = Row(precision.name, curvature, engine)
                try:
                    values = compute(problem, precision, curvature, engine, directions)
                except RuntimeError as error:
                    rows.append(replace(row, failure=str(error).partition("\n")[0]))
                else:
                    rows.append(_compared(row, values, reference))
    return rows


def _step(problem: Problem, precision: Precision, scale: float) -> Tensor:
    """A training step's closure, as under Lightning's mixed precision."""
    kind = problem.inputs.device.type
    autocast = (
        nullcontext() if precision.autocast is None else torch.autocast(kind, precision.autocast)
    )
    with autocast:
        loss = problem.loss(problem.module(problem.inputs))
    problem.module.zero_grad()
    loss = loss * scale
    loss.backward()
    return loss


def _cast(problem: Problem, dtype: torch.dtype) -> Problem:
    """A copy in ``dtype``; indices stay."""
    copied, inputs = problem.copy(), problem.inputs
    return replace(
        copied,
        module=copied.module.to(dtype),
        inputs=inputs.to(dtype) if inputs.is_floating_point() else inputs,
    )


def _direction(problem: Problem, seed: int) -> list[Tensor]:
    """A direction of unit length in numbers that float32 holds, the same in every precision."""
    generator = torch.Generator().manual_seed(seed)
    params = list(problem.module.parameters())
    v = [torch.randn(p.shape, generator=generator) for p in params]
    return [
        x.to(p.detach())
        for x, p in zip(trees.scale(v, 1 / float(trees.norm(v))), params, strict=True)
    ]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


def _compared(row: Row, values: Values, reference: Values) -> Row:
    products = (values.products - reference.products).norm(dim=1) / reference.products.norm(dim=1)
    return replace(
        row,
        loss=float((values.loss - reference.loss).abs() / reference.loss.abs()),
        gradient=float((values.gradient - reference.gradient).norm() / reference.gradient.norm()),
        product=math.sqrt(float(products.square().mean())),
        exponent=values.exponent,
    )
