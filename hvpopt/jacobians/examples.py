"""Jacobians of batches, example by example, at the cost of one example's rows or columns.

Where yₛ = f(x)ₛ depends on xₛ only, the Jacobian of Σₛ yₛ by x holds every example's Jacobian, and
so does the Jacobian of f(x + d) by one shift d of all examples. The zeros of ∂yₛ/∂xₜ, s ≠ t, are
never computed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hvpopt.jacobians.functions import Blocks, LeafFunction
from hvpopt.jacobians.ways import Axis


def as_one_example(
    f: LeafFunction, at: Sequence[Tensor], axis: Axis
) -> tuple[LeafFunction, tuple[Tensor, ...]]:
    """(g, point) whose Jacobian holds all examples' Jacobians of f, with few rows, or columns."""
    if axis == "rows":

        def summed(*xs: Tensor) -> tuple[Tensor, ...]:
            return tuple(y.sum(0) for y in f(*xs))

        return summed, tuple(at)

    def shifted(*shifts: Tensor) -> tuple[Tensor, ...]:
        return f(*(x + d for x, d in zip(at, shifts, strict=True)))

    return shifted, tuple(x.new_zeros(x.shape[1:]) for x in at)


def examples_first(blocks: Blocks, at: Sequence[Tensor], axis: Axis) -> Blocks:
    """The blocks of g, in the form (B, *output, *input) of each example's."""
    if axis == "columns":
        return blocks
    return [
        [b.movedim(b.dim() - x.dim(), 0) for b, x in zip(row, at, strict=True)] for row in blocks
    ]


def check_uncoupled(f: LeafFunction, at: Sequence[Tensor], blocks: Blocks, axis: Axis) -> None:
    """Lets blocks pass that are each example's own Jacobian.

    With random weights cₛ of the examples and a random w, Σₛ cₛ wᵀ ∂yₛ/∂xₜ is cₜ wᵀ Jₜ for all t
    only where ∂yₛ/∂xₜ = 0 for s ≠ t, but for chance; forward, Σₜ cₜ ∂yₛ/∂xₜ v is cₛ Jₛ v. Both
    take one product. What couples the examples by less than the cube root of the epsilon of the
    coarsest dtype of inputs, outputs and autocast (half a per cent in float32, a fifth in
    bfloat16) may pass for rounding.

    Raises:
        ValueError: If examples depend on each other.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(shape: Sequence[int], like: Tensor) -> Tensor:
        return torch.randn(shape, generator=generator).to(like)

    weights = normal(at[0].shape[:1], at[0])

    def weighted(x: Tensor) -> Tensor:
        """cₛ x for every example s."""
        return weights.to(x).view(-1, *[1] * x.dim()) * x

    size, rows = len(weights), axis == "rows"
    if rows:
        outputs, pullback = torch.func.vjp(f, *at)[:2]
        probes = [normal(y.shape[1:], y) for y in outputs]
        found = pullback(tuple(map(weighted, probes)))
    else:
        probes = [normal(x.shape[1:], x) for x in at]
        outputs, found = torch.func.jvp(f, tuple(at), tuple(map(weighted, probes)))[:2]
    eps = _coarsest([*at, *outputs, *found])
    for product, group in zip(found, zip(*blocks, strict=True) if rows else blocks, strict=True):
        own = torch.zeros(size, product[0].numel(), dtype=product.dtype, device=product.device)
        for probe, b in zip(probes, group, strict=True):
            n = probe.numel()
            matrices = b.reshape(size, n, -1) if rows else b.reshape(size, -1, n).mT
            own += (probe.flatten().to(b) @ matrices).to(own)
        _check_same(product.reshape(size, -1), weights.to(own).view(-1, 1) * own, eps)


def _coarsest(tensors: Sequence[Tensor]) -> float:
    """The largest epsilon of the dtypes that f seems to compute in."""
    dtypes = {x.dtype for x in tensors}
    kind = tensors[0].device.type
    if torch.is_autocast_enabled(kind):
        dtypes.add(torch.get_autocast_dtype(kind))
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _check_same(found: Tensor, own: Tensor, eps: float) -> None:
    rtol = eps ** (1 / 3)
    error, scale = (found - own).abs().max(), torch.maximum(found.abs().max(), own.abs().max())
    if bool(error > rtol * scale):
        raise ValueError(
            "batched=True, but f's value for one example depends on other examples (by "
            f"{float(error / scale):.1e} of the largest derivative), as BatchNorm in training mode "
            "makes it, or attention over the wrong dimension; or f computes in a lower precision "
            "than its arguments and value have. Put the module into eval mode, compute in a higher "
            "precision, or take the whole Jacobian with batched=False."
        )
