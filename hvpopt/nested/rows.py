"""Per-example arithmetic: reductions over all dimensions but the first, scalars for each row."""

import math

import torch
from torch import Tensor


def row_dots(x: Tensor, y: Tensor) -> Tensor:
    """⟨xᵢ, yᵢ⟩ for each example, (batch,), in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vecdot(x.flatten(1).to(wide), y.flatten(1).to(wide))


def row_norms(x: Tensor) -> Tensor:
    """‖xᵢ‖ for each example, (batch,), in float32 or wider."""
    return row_dots(x, x).sqrt()


def per_row(scalar: Tensor | float, like: Tensor) -> Tensor | float:
    """A number, or one for each example (batch,), to multiply ``like`` (batch, *shape) by."""
    if not isinstance(scalar, Tensor):
        return scalar
    scalar = scalar.to(like.dtype)
    return scalar if scalar.dim() == 0 else scalar.view(-1, *[1] * (like.dim() - 1))


def less(u: Tensor, scalar: Tensor | float, v: Tensor) -> Tensor:
    """u − scalar · v, with a number or one for each example (batch,)."""
    if not isinstance(scalar, Tensor):
        return torch.sub(u, v, alpha=scalar)
    return u - per_row(scalar, u) * v


def all_finite(energies: Tensor, g: Tensor) -> bool:
    """Whether nothing is NaN or infinite, nor sums up to more than the dtype holds."""
    return math.isfinite(float(g.detach().sum() + energies.detach().sum()))


def are_finite(energies: Tensor, g: Tensor) -> Tensor:
    """Which examples have neither NaN nor infinity in their energy and gradient, (batch,)."""
    # a sum is finite only if its terms are
    return torch.isfinite(g.detach().flatten(1).sum(1).add_(energies.detach()))
