"""Arithmetic on lists of tensors, fused with ``torch._foreach_*``.

A vector of the optimizer's space is a list of tensors, one for each parameter, in the
optimizer's order. Dots and norms are sums over the whole list, in float32 or wider.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

TensorList = list[Tensor]


def _wide(x: Tensor) -> Tensor:
    """``x`` flat, in float32 or wider."""
    flat = x.reshape(-1)
    return flat if flat.dtype in (torch.float32, torch.float64) else flat.float()


def dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """The inner product Σᵢ ⟨xᵢ, yᵢ⟩, a scalar tensor in float32 or wider.

    Examples:
        >>> dot([torch.ones(2), torch.ones(3)], [torch.ones(2), 2 * torch.ones(3)])
        tensor(8.)
    """
    terms = [torch.dot(_wide(x), _wide(y)) for x, y in zip(xs, ys, strict=True)]
    if len({(t.dtype, t.device) for t in terms}) > 1:
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in terms) else torch.float32
        terms = [t.to(terms[0].device, dtype) for t in terms]
    return torch.stack(terms).sum() if len(terms) > 1 else terms[0]


def norm(xs: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of the whole list, a scalar tensor in float32 or wider."""
    return dot(xs, xs).sqrt()


def add(xs: Sequence[Tensor], ys: Sequence[Tensor], scale: float = 1.0) -> TensorList:
    """``xs + scale * ys`` as new tensors."""
    return list(torch._foreach_add(list(xs), list(ys), alpha=scale))


def add_(xs: Sequence[Tensor], ys: Sequence[Tensor], scale: float = 1.0) -> None:
    """Adds ``scale * ys`` to ``xs`` in place."""
    torch._foreach_add_(list(xs), list(ys), alpha=scale)


def scale(xs: Sequence[Tensor], factor: float) -> TensorList:
    """``factor * xs`` as new tensors."""
    return list(torch._foreach_mul(list(xs), factor))


def scale_each(factors: Sequence[float], xs: Sequence[Tensor]) -> TensorList:
    """Each tensor times its own factor, as new tensors."""
    return list(torch._foreach_mul(list(xs), list(factors)))


def zeros_like(xs: Sequence[Tensor]) -> TensorList:
    """Zeros of the shapes, dtypes and devices of ``xs``, detached."""
    return [torch.zeros_like(x, requires_grad=False) for x in xs]


def clone(xs: Sequence[Tensor]) -> TensorList:
    """Detached copies of ``xs``."""
    return [x.detach().clone() for x in xs]


def copy_(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> None:
    """Writes ``ys`` into ``xs`` in place, without recording."""
    with torch.no_grad():
        torch._foreach_copy_(list(xs), list(ys))


def all_finite(xs: Sequence[Tensor]) -> bool:
    """Whether no entry of the list is NaN or infinite.

    Seen by the sum of their squares, at one look. Only where that is not finite, which it need not
    be for large entries, is each tensor looked at.
    """
    if not xs or bool(torch.isfinite(dot(xs, xs))):
        return True
    return all(bool(torch.isfinite(x).all()) for x in xs)


def rademacher_like(xs: Sequence[Tensor], generator: torch.Generator | None = None) -> TensorList:
    """Probes with independent entries ±1, each with probability ½, so that E[zzᵀ] = I.

    A CPU ``generator`` gives the same probes on every device.
    """
    probes = []
    for x in xs:
        bits = torch.randint(0, 2, x.shape, generator=generator)
        probes.append((2 * bits - 1).to(x.device, x.dtype))
    return probes


def normal_like(xs: Sequence[Tensor], generator: torch.Generator | None = None) -> TensorList:
    """Probes with independent standard normal entries; a CPU ``generator`` as above."""
    return [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in xs]
