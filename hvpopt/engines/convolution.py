"""Convolutions whose derivatives of every order are convolutions of the fast kinds.

A convolution y = x ∗ w is bilinear, and so are its two adjoints, the gradients by its input,
X(u, w), and by its weight, W(u, x). The derivative of each of the three is made of the other two:

    ⟨u, x ∗ w⟩ = ⟨X(u, w), x⟩ = ⟨W(u, x), w⟩

so that three autograd Functions that refer to one another have all derivatives. Torch's own double
backward computes the same by convolutions with kernels as large as the image, which on a CPU take
several times as long.
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


def _adjoints(
    u: Tensor, x: Tensor, w: Tensor, geometry: _Geometry, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.convolution_backward(u, x, w, None, *geometry, mask)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


class _Convolution(torch.autograd.Function):
    """x ∗ w + b."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor | None, geometry: _Geometry) -> Tensor:
        return torch.ops.aten.convolution(x, w, b, *geometry)

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
        return (
            _ByInput.apply(u, w, x, ctx.geometry) if for_x else None,
            _ByWeight.apply(u, x, w, ctx.geometry) if for_w else None,
            u.sum([0, *range(2, u.dim())]) if for_b else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dw: Tensor | None, db: Tensor | None, _: None) -> Any:
        x, w = ctx.saved_tensors
        along_x = None if dx is None else convolution(dx, w, None, ctx.geometry)
        along_w = None if dw is None else convolution(x, dw, None, ctx.geometry)
        along = _sum(along_x, along_w)
        if db is not None:
            along_b = db.reshape(-1, *[1] * (x.dim() - 2))
            along = along_b.expand(ctx.shape).clone() if along is None else along + along_b
        return along


class _ByInput(torch.autograd.Function):
    """X(u, w), of the shape of ``x``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, w: Tensor, x: Tensor, geometry: _Geometry) -> Tensor:
        return _adjoints(u, x, w, geometry, [True, False, False])[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        u, w, x, ctx.geometry = inputs
        remember(ctx, inputs)
        ctx.x = x.detach()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, w)
        ctx.save_for_forward(u, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        if g is None:
            return None, None, None, None
        u, w = ctx.saved_tensors
        for_u, for_w = needed(ctx)[:2]
        return (
            _Convolution.apply(g, w, None, ctx.geometry) if for_u else None,
            _ByWeight.apply(u, g, w, ctx.geometry) if for_w else None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, du: Tensor | None, dw: Tensor | None, *_: None) -> Any:
        u, w = ctx.saved_tensors
        along_u = None if du is None else _ByInput.apply(du, w, ctx.x, ctx.geometry)
        along_w = None if dw is None else _ByInput.apply(u, dw, ctx.x, ctx.geometry)
        return _sum(along_u, along_w)


class _ByWeight(torch.autograd.Function):
    """W(u, x), of the shape of ``w``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, x: Tensor, w: Tensor, geometry: _Geometry) -> Tensor:
        return _adjoints(u, x, w, geometry, [False, True, False])[1]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        u, x, w, ctx.geometry = inputs
        remember(ctx, inputs)
        ctx.w = w.detach()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, x)
        ctx.save_for_forward(u, x)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        if g is None:
            return None, None, None, None
        u, x = ctx.saved_tensors
        for_u, for_x = needed(ctx)[:2]
        return (
            _Convolution.apply(x, g, None, ctx.geometry) if for_u else None,
            _ByInput.apply(u, g, x, ctx.geometry) if for_x else None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, du: Tensor | None, dx: Tensor | None, *_: None) -> Any:
        u, x = ctx.saved_tensors
        along_u = None if du is None else _ByWeight.apply(du, x, ctx.w, ctx.geometry)
        along_x = None if dx is None else _ByWeight.apply(u, dx, ctx.w, ctx.geometry)
        return _sum(along_u, along_x)


def convolution(x: Tensor, w: Tensor, b: Tensor | None, geometry: _Geometry) -> Tensor:
    """x ∗ w + b."""
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
        dilation = _numbers(dilation, num_dims)
        if padding == "same":  # of an even total, the same on both sides
            totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            if any(total % 2 for total in totals):
                return None
            padding = [total // 2 for total in totals]
        elif padding == "valid":
            padding = 0
        stride, padding = _numbers(stride, num_dims), _numbers(padding, num_dims)
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
    numbers = [given] if isinstance(given, int) else list(given)
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
