"""Convolutions whose derivatives of every order are convolutions of the fast kinds.

A convolution y = x ∗ w is bilinear, and so are its two adjoints, the gradients by its input,
X(u, w), and by its weight, W(u, x). The derivative of each of the three is made of the other two:

    ⟨u, x ∗ w⟩ = ⟨X(u, w), x⟩ = ⟨W(u, x), w⟩

so that two autograd Functions that refer to each other, the convolution and the pair of its
adjoints, have all derivatives: the pair's, at cotangents (c, d), are c ∗ w + x ∗ d by u, and the
same pair at (u, c, d) by x and w. Torch's own double backward computes them by convolutions with
kernels as large as the image, which on a CPU take several times as long, and what it does not need.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvpopt.engines.needs import needed, off_leaf, remember


class _Geometry(NamedTuple):
    """How a convolution runs, one number for each dimension of the image."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


Pair = tuple[Tensor | None, Tensor | None]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


class _Convolution(torch.autograd.Function):
    """x ∗ w + b."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor | None, geometry: _Geometry) -> Tensor:
        return torch.ops.aten.convolution.default(x, w, b, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, w, _, ctx.geometry = inputs
        remember(ctx, inputs)
        ctx.shape = output.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w)
        ctx.save_for_forward(x, w)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None) -> Any:
        if u is None:
            return None, None, None, None
        x, w = ctx.saved_tensors
        for_x, for_w, for_b, _ = needed(ctx)
        by_x, by_w = _adjoints(u, x, w, ctx.geometry, for_x, for_w)
        return by_x, by_w, u.sum([0, *range(2, u.dim())]) if for_b else None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dw: Tensor | None, db: Tensor | None, _: None) -> Any:
        x, w = ctx.saved_tensors
        along = _along(x, w, dx, dw, ctx.geometry)
        if db is not None:
            along_b = db.reshape(-1, *[1] * (x.dim() - 2))
            along = along_b.expand(ctx.shape).clone() if along is None else along + along_b
        return along


class _Adjoints(torch.autograd.Function):
    """X(u, w) and W(u, x), each where it is wanted."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        u: Tensor, x: Tensor, w: Tensor, geometry: _Geometry, for_x: bool, for_w: bool
    ) -> Pair:
        return _kernel(u, x, w, geometry, for_x, for_w)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        u, x, w, ctx.geometry, ctx.for_x, ctx.for_w = inputs
        remember(ctx, inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, x, w)
        ctx.save_for_forward(u, x, w)

    @staticmethod
    def backward(ctx: Any, c: Tensor | None, d: Tensor | None) -> Any:
        u, x, w = ctx.saved_tensors
        for_u, for_x, for_w = needed(ctx)[:3]
        by_u = _along(x, w, c, d, ctx.geometry) if for_u else None
        by_x, by_w = None, None
        if (for_x and d is not None) or (for_w and c is not None):
            wants = for_x and d is not None, for_w and c is not None
            c, d = x if c is None else c, w if d is None else d  # for its shape
            by_x, by_w = _adjoints(u, c, d, ctx.geometry, *wants)
        return by_u, by_x, by_w, None, None, None

    @staticmethod
    def jvp(ctx: Any, du: Tensor | None, dx: Tensor | None, dw: Tensor | None, *_: None) -> Any:
        u, x, w = ctx.saved_tensors
        by_x, by_w = None, None
        if du is not None:
            by_x, by_w = _adjoints(du, x, w, ctx.geometry, ctx.for_x, ctx.for_w)
        wants = ctx.for_x and dw is not None, ctx.for_w and dx is not None
        if any(wants):
            dx, dw = x if dx is None else dx, w if dw is None else dw
            more_x, more_w = _adjoints(u, dx, dw, ctx.geometry, *wants)
            by_x, by_w = _sum(by_x, more_x), _sum(by_w, more_w)
        return by_x, by_w


def _kernel(u: Tensor, x: Tensor, w: Tensor, geometry: _Geometry, for_x: bool, for_w: bool) -> Pair:
    mask = [for_x, for_w, False]
    return torch.ops.aten.convolution_backward.default(u, x, w, None, *geometry, mask)[:2]


def _adjoints(
    u: Tensor, x: Tensor, w: Tensor, geometry: _Geometry, for_x: bool, for_w: bool
) -> Pair:
    """X(u, w) and W(u, x); what no graph is built for goes to the kernel straight away."""
    if not (for_x or for_w):
        return None, None
    pair = _Adjoints.apply if torch.is_grad_enabled() else _kernel
    return pair(u, x, w, geometry, for_x, for_w)


def _along(
    x: Tensor, w: Tensor, dx: Tensor | None, dw: Tensor | None, geometry: _Geometry
) -> Tensor | None:
    """dx ∗ w + x ∗ dw, the derivative of x ∗ w."""
    along_x = None if dx is None else convolution(dx, w, None, geometry)
    along_w = None if dw is None else convolution(x, dw, None, geometry)
    if along_x is not None and along_w is not None and not torch.is_grad_enabled():
        return along_x.add_(along_w)
    return _sum(along_x, along_w)


def convolution(x: Tensor, w: Tensor, b: Tensor | None, geometry: _Geometry) -> Tensor:
    """x ∗ w + b."""
    if not torch.is_grad_enabled():
        return torch.ops.aten.convolution.default(x, w, b, *geometry)
    x, w = _as_autocast(x), _as_autocast(w)
    b = None if b is None else off_leaf(_as_autocast(b))
    return _Convolution.apply(off_leaf(x), off_leaf(w), b, geometry)


def _plain(num_dims: int) -> Callable[..., Tensor | None]:
    def convolve(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        """``torch.convNd``, or None where that had better be called."""
        if not _is_usual(input, weight, bias, num_dims):
            return None
        stride, dilation = _numbers(stride, num_dims), _numbers(dilation, num_dims)
        if isinstance(padding, str) and (padding not in ("same", "valid") or set(stride) != {1}):
            return None
        if padding == "same":  # of an even total, the same on both sides
            totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            if any(total % 2 for total in totals):
                return None
            padding = [total // 2 for total in totals]
        elif padding == "valid":
            padding = 0
        padding = _numbers(padding, num_dims)
        geometry = _Geometry(stride, padding, dilation, False, [0] * num_dims, groups)
        return convolution(input, weight, bias, geometry)

    return convolve


def _transposed(num_dims: int) -> Callable[..., Tensor | None]:
    def convolve(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor | None:
        """``torch.conv_transposeNd``, or None where that had better be called."""
        if not _is_usual(input, weight, bias, num_dims):
            return None
        stride, padding = _numbers(stride, num_dims), _numbers(padding, num_dims)
        dilation, extra = _numbers(dilation, num_dims), _numbers(output_padding, num_dims)
        geometry = _Geometry(stride, padding, dilation, True, extra, groups)
        return convolution(input, weight, bias, geometry)

    return convolve


def _is_usual(x: Any, w: Any, b: Any, num_dims: int) -> bool:
    """Whether a convolution has a batch, real numbers of one dtype, and a derivative."""
    return (
        isinstance(x, Tensor)
        and isinstance(w, Tensor)
        and x.dim() == w.dim() == num_dims + 2
        and x.is_floating_point()
        and (x.dtype == w.dtype or torch.is_autocast_enabled(x.device.type))
        and (x.requires_grad or w.requires_grad)
        and torch.is_grad_enabled()
        and not any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in (x, w))
    )


def _as_autocast(t: Tensor) -> Tensor:
    """``t`` in the precision in which autocast runs convolutions, where it is active."""
    if t.dtype == torch.float64 or not torch.is_autocast_enabled(t.device.type):
        return t
    return t.to(torch.get_autocast_dtype(t.device.type))


def _numbers(given: int | Sequence[int], num_dims: int) -> list[int]:
    numbers = list(given) if isinstance(given, Sequence) else [int(given)]
    return numbers * num_dims if len(numbers) == 1 else numbers


CONVOLUTIONS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    torch.conv1d: _plain(1),
    torch.conv2d: _plain(2),
    torch.conv3d: _plain(3),
    torch.conv_transpose1d: _transposed(1),
    torch.conv_transpose2d: _transposed(2),
    torch.conv_transpose3d: _transposed(3),
}
"""By the function that each stands in for; None where that had better be called."""
