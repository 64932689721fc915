"""Batch normalisation in training mode with a short second derivative.

Per channel, over its m values x, with x̂ = r (x − μ), r = (σ² + ε)^-½ and p̄ = mean p:

    y = γ x̂ + β         X(u) = γ r Π u,   Π u = u − ū − x̂ mean(u x̂)

X(u) is the gradient by x, and Σ u x̂ and Σ u are those by γ and β. Their derivatives along (u', x',
γ'), and the adjoint of that map at cotangents (c, a, b), are again sums of u, x and two of the
three with one coefficient for each channel. Torch's own formulas take some sixty passes over the
activations for them, in a convolutional network as long as all convolutions together.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hvpopt.engines.needs import needed, off_leaf, remember


def _per_channel(s: Tensor, like: Tensor) -> Tensor:
    return s.view(-1, *[1] * (like.dim() - 2))


def _sums(u: Tensor, x: Tensor, mean: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Π u r, Σ u x̂ and Σ u."""
    return _kernel(u, x, torch.ones_like(r), mean, r, 0.0)


def _kernel(
    u: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, r: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """X(u), Σ u x̂ and Σ u."""
    return torch.ops.aten.native_batch_norm_backward.default(
        u, x, gamma, None, None, mean, r, True, eps, [True, True, True]
    )


def _mean(u: Tensor, v: Tensor) -> Tensor:
    """Per channel."""
    return (u * v).mean([0, *range(2, u.dim())])


class _BatchNorm(torch.autograd.Function):
    """γ x̂ + β, which also updates the running statistics."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        gamma: Tensor,
        beta: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_batch_norm(
            x, gamma, beta, running_mean, running_var, True, momentum, eps
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, gamma, _, _, _, _, ctx.eps = inputs
        remember(ctx, inputs)
        _, mean, r = output
        ctx.mark_non_differentiable(mean, r)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, gamma, mean, r)
        ctx.save_for_forward(x, gamma, mean, r)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, *_: Any) -> Any:
        if u is None:
            return (None,) * 7
        x, gamma, mean, r = ctx.saved_tensors
        is_plain = not torch.is_grad_enabled() and forward_ad._current_level < 0
        backward = _kernel if is_plain else _Backward.apply
        grads = backward(u, x, gamma, mean, r, ctx.eps)
        needed = zip(grads, ctx.needs_input_grad, strict=False)
        return *(g if needs else None for g, needs in needed), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dg: Tensor | None, db: Tensor | None, *_: Any) -> Any:
        x, gamma, mean, r = ctx.saved_tensors
        along = None
        if dx is not None:
            along = _sums(dx, x, mean, r)[0] * _per_channel(gamma, x)
        if dg is not None:
            scaled = _per_channel(dg * r, x)
            shift = _per_channel(dg * r * mean, x)
            along = torch.addcmul(-shift if along is None else along.sub_(shift), x, scaled)
        if db is not None:
            shift = _per_channel(db, x)
            along = shift.expand_as(x).clone() if along is None else along + shift
        return along, None, None


class _Backward(torch.autograd.Function):
    """X(u), Σ u x̂, Σ u."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        u: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, r: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _kernel(u, x, gamma, mean, r, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        u, x, gamma, mean, r, ctx.eps = inputs
        remember(ctx, inputs)
        _, u_xhat, u_sum = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, x, gamma, mean, r, u_xhat.detach(), u_sum.detach())
        ctx.save_for_forward(u, x, gamma, mean, r, u_xhat.detach(), u_sum.detach())

    @staticmethod
    def backward(ctx: Any, c: Tensor | None, a: Tensor | None, b: Tensor | None) -> Any:
        u, x, gamma, mean, r, u_xhat, u_sum = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable(u, x, gamma, ctx.eps, (c, a, b)), None, None, None
        for_u, for_x, for_gamma = needed(ctx)[:3]
        m = x.numel() // x.shape[1]
        s, ubar = u_xhat / m, u_sum / m
        by_u, by_x, by_gamma = None, None, None
        scale, weight, of_xhat = gamma * r, torch.zeros_like(r), torch.zeros_like(r)
        if c is not None:
            projected, c_xhat, c_sum = _sums(c, x, mean, r)
            if for_u:
                by_u = projected * _per_channel(gamma, x)
            if for_x or for_gamma:
                t = c_xhat / m
                k = _mean(c, u) - c_sum / m * ubar - t * s
                by_gamma = m * r * k
                # r Π(w) − r² γ k x̂,  w = −γ r (s c + t u),  with r Π c = projected
                by_x = projected.mul_(_per_channel(-scale * s, x))
                weight = -scale * r * t
                of_xhat = -weight * s - r * scale * k
        if for_u and (a is not None or b is not None):
            slope = torch.zeros_like(r) if a is None else a * r
            shift = -slope * mean if b is None else b - slope * mean
            start = _per_channel(shift, x) if by_u is None else by_u.add_(_per_channel(shift, x))
            by_u = torch.addcmul(start, x, _per_channel(slope, x))
        if for_x:
            if a is not None:
                weight = weight + a * r
                of_xhat = of_xhat - a * r * s
            shift = _per_channel(-weight * ubar - of_xhat * r * mean, x)
            by_x = shift if by_x is None else by_x.add_(shift)
            by_x = torch.addcmul(by_x, u, _per_channel(weight, x))
            by_x = torch.addcmul(by_x, x, _per_channel(of_xhat * r, x))
        return by_u, by_x if for_x else None, by_gamma, None, None, None

    @staticmethod
    def jvp(ctx: Any, du: Tensor | None, dx: Tensor | None, dg: Tensor | None, *_: Any) -> Any:
        u, x, gamma, mean, r, u_xhat, u_sum = ctx.saved_tensors
        m = x.numel() // x.shape[1]
        s, ubar = u_xhat / m, u_sum / m
        scale = gamma * r
        along, along_xhat, along_sum = None, torch.zeros_like(r), torch.zeros_like(r)
        of_u, of_xhat = torch.zeros_like(r), torch.zeros_like(r)
        if du is not None:
            along, along_xhat, along_sum = _sums(du, x, mean, r)
            along = along * _per_channel(gamma, x)
        if dx is not None:
            moved, x_xhat, x_sum = _sums(dx, x, mean, r)
            p = x_xhat / m
            k = _mean(u, dx) - ubar * x_sum / m - s * p
            along_xhat = along_xhat + m * r * k
            along = (
                -moved * _per_channel(scale * s, x)
                if along is None
                else torch.addcmul(along, moved, _per_channel(-scale * s, x))
            )
            of_u = of_u - scale * r * p
            of_xhat = of_xhat - scale * r * k
        if dg is not None:
            of_u = of_u + dg * r
        of_xhat = of_xhat - of_u * s
        along = torch.zeros_like(x) if along is None else along
        along = torch.addcmul(along, u, _per_channel(of_u, x))
        along = torch.addcmul(along, x, _per_channel(of_xhat * r, x))
        along = along.sub_(_per_channel(of_u * ubar + of_xhat * r * mean, x))
        return along, along_xhat, along_sum


def _differentiable(
    u: Tensor, x: Tensor, gamma: Tensor, eps: float, cotangents: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The adjoint in operations with derivatives of their own, for third ones."""
    dims = [0, *range(2, x.dim())]
    with torch.enable_grad():
        u, x, gamma = (t.view_as(t) for t in (u, x, gamma))  # of which none depends on another
        variance, mean = torch.var_mean(x, dims, unbiased=False, keepdim=True)
        r = (variance + eps).rsqrt()
        xhat = (x - mean) * r
        by_gamma, by_beta = (u * xhat).sum(dims), u.sum(dims)
        means = (u.mean(dims, keepdim=True), (u * xhat).mean(dims, keepdim=True))
        by_x = _per_channel(gamma, x) * r * (u - means[0] - xhat * means[1])
        pairs = [
            (o, c)
            for o, c in zip((by_x, by_gamma, by_beta), cotangents, strict=True)
            if c is not None and o.requires_grad
        ]
        inputs = [t for t in (u, x, gamma) if t.requires_grad]
        grads = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], inputs, [c for _, c in pairs],
                create_graph=True, allow_unused=True,
            )
        )  # fmt: skip
    return tuple(next(grads) if t.requires_grad else None for t in (u, x, gamma))


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """``torch.nn.functional.batch_norm`` in training mode, or None where that is to be called."""
    x = input
    if (
        not training
        or x.dim() < 2
        or x.numel() <= x.shape[1]
        or x.dtype not in (torch.float32, torch.float64)
        or eps <= 0
        or any(t is not None and t.dtype != x.dtype for t in (weight, bias))
        or any(
            t is not None and t.numel() != x.shape[1]
            for t in (weight, bias, running_mean, running_var)
        )
        or not torch.is_grad_enabled()
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
    ):
        return None
    gamma = x.new_ones(x.shape[1]) if weight is None else weight
    statistics = (running_mean, running_var, momentum, eps)
    beta = None if bias is None else off_leaf(bias)
    return _BatchNorm.apply(off_leaf(x), off_leaf(gamma), beta, *statistics)[0]
