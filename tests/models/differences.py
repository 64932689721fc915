"""Curvature products from first derivatives alone: an oracle that shares no code with the engines.

Plain ``loss.backward()`` in float64 on the default kernels, at displaced parameters, by central
differences that Romberg's scheme extrapolates. Random numbers start from one seed and buffers from
one state at every evaluation, so that all of them see the same function.

    D(h) = (g(θ + h v) − g(θ − h v)) / 2h,   R(h) = (4 D(h/2) − D(h)) / 3,
    value = (16 R(h/2) − R(h)) / 15,         error = ‖R(h/2) − R(h)‖
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from problems import flat
from torch import Tensor, nn

SEED = 11
STEP = 4e-3
"""‖h v‖: truncation of order h⁶ and rounding of order ε/h are then both near 1e-12."""


@dataclass(frozen=True)
class Estimate:
    """A derivative along a direction."""

    value: list[Tensor]
    error: float
    """The norm of the difference of the last two extrapolations but one, an upper estimate."""


@contextmanager
def restored(*nets: nn.Module) -> Iterator[None]:
    """Random numbers start from ``SEED``; buffers are copies, so that the nets' own stay as is."""
    modules = [m for net in nets for m in net.modules() if isinstance(m._buffers, dict)]
    held = [(module._buffers, dict(module._buffers)) for module in modules]
    for buffers, originals in held:
        buffers.update({k: None if b is None else b.clone() for k, b in originals.items()})
    python = random.getstate()
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        random.seed(SEED)
        try:
            yield
        finally:
            random.setstate(python)
            for buffers, originals in held:
                buffers.clear()
                buffers.update(originals)


def along(
    function: Callable[[], list[Tensor]], params: Sequence[Tensor], v: Sequence[Tensor]
) -> Estimate:
    """d/dt function(θ + t v) at t = 0; ``function`` reads the parameters, which are put back."""
    length = float(flat(list(v)).norm()) or 1.0
    start = [p.detach().clone() for p in params]

    def at(t: float) -> Tensor:
        with torch.no_grad():
            for p, origin, direction in zip(params, start, v, strict=True):
                p.copy_(origin + t * direction)
        return flat(function())

    try:
        steps = [STEP / length * 0.5**level for level in range(3)]
        coarse, middle, fine = ((at(h) - at(-h)) / (2 * h) for h in steps)
    finally:
        with torch.no_grad():
            for p, origin in zip(params, start, strict=True):
                p.copy_(origin)
    first, second = (4 * middle - coarse) / 3, (4 * fine - middle) / 3
    value = (16 * second - first) / 15
    shapes = function()
    parts = value.split([s.numel() for s in shapes])
    return Estimate(
        [part.view(s.shape) for part, s in zip(parts, shapes, strict=True)],
        float((second - first).norm()),
    )


def gradient(
    closure: Callable[[], object], params: Sequence[Tensor], *nets: nn.Module
) -> list[Tensor]:
    """What a plain run of the closure leaves in ``p.grad`` (zeros for None); leaves no trace."""
    held = [p.grad for p in params]
    for p in params:
        p.grad = None
    with restored(*nets):
        closure()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in params]
    for p, grad in zip(params, held, strict=True):
        p.grad = grad
    return [g.detach() for g in grads]


def hessian_product(
    closure: Callable[[], object], params: Sequence[Tensor], v: Sequence[Tensor], *nets: nn.Module
) -> Estimate:
    """H v, where the gradient is the gradient of a function: no part of it stops derivatives."""
    return along(lambda: gradient(closure, params, *nets), params, v)


def ggn_product(
    output: Callable[[], Tensor],
    loss: Callable[[Tensor], Tensor],
    params: Sequence[Tensor],
    v: Sequence[Tensor],
    *nets: nn.Module,
) -> Estimate:
    """Jᵀ ∇²loss(z) J v, z = output(): two differences and one reverse pass."""

    def z() -> Tensor:
        with restored(*nets):
            return output()

    tangent = along(lambda: [z().detach()], params, v)
    leaf = z().detach().requires_grad_()

    def slope() -> list[Tensor]:
        with restored(*nets):
            return [torch.autograd.grad(loss(leaf), leaf)[0]]

    curved = along(slope, [leaf], tangent.value)
    pulled = torch.autograd.grad(z(), list(params), curved.value, allow_unused=True)
    value = [torch.zeros_like(p) if g is None else g for g, p in zip(pulled, params, strict=True)]
    return Estimate([g.detach() for g in value], tangent.error + curved.error)
