"""Torch functions whose derivatives are missing or wrong, written in functions that have them.

Each computes what the original computes. They stand in for it while a closure runs for
second-order products (`hvpopt.engines.support`).

- ``cdist``, ``embedding_bag``, ``multi_margin_loss`` and ``multilabel_margin_loss`` have neither
  forward mode nor double backward.
- ``huber_loss`` and ``soft_margin_loss`` have no forward mode in their backward.
- ``batch_norm`` and convolutions have slow second derivatives, and the third ones of the former
  are wrong.
- ``linear_cross_entropy`` with options, ``max_unpool``, ``_weight_norm``: double backward takes
  saved values for constants, and is wrong without an error.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hvpopt.engines.batch_norm import batch_norm
from hvpopt.engines.convolution import CONVOLUTIONS


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``torch._weight_norm``: v g / ‖v‖, norms over all dimensions but ``dim`` (−1: over all)."""
    # over all, norm_except_dim has a tangent of another shape
    norm = torch.linalg.vector_norm(v) if dim == -1 else torch.norm_except_dim(v, 2, dim)
    return v * (g / norm)


# new in torch 2.12
LINEAR_CROSS_ENTROPY = getattr(F, "linear_cross_entropy", None)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    options: object = None,
    **kwargs: Any,
) -> Tensor:
    """``torch.nn.functional.linear_cross_entropy``: a linear map, then a cross entropy."""
    num_classes, *positions = linear_weight.shape[:-1]
    bias = None if linear_bias is None else linear_bias.reshape(-1)
    logits = F.linear(input, linear_weight.reshape(-1, linear_weight.shape[-1]), bias)
    logits = logits.reshape(*input.shape[:-1], num_classes, *positions)
    if ignore_index is not None:
        kwargs["ignore_index"] = ignore_index
    return F.cross_entropy(logits, target, **kwargs)


def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """``torch.nn.functional.huber_loss``: d²/2 where |d| ≤ δ, else δ (|d| − δ/2)."""
    input, target = torch.broadcast_tensors(input, target)
    d = input - target
    loss = torch.where(d.abs() <= delta, 0.5 * d * d, delta * (d.abs() - 0.5 * delta))
    return _reduced(loss if weight is None else loss * weight, reduction)


def soft_margin_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """``torch.nn.functional.soft_margin_loss``: log(1 + exp(−y x))."""
    return _reduced(F.softplus(-target * input), reduction)


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: object = None) -> Tensor:
    """``torch.cdist``: ‖x − y‖_p for each pair of rows, with derivative 0 where they are equal."""
    d = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    if p != 2:
        return torch.linalg.vector_norm(d, p, dim=-1)
    squared = (d * d).sum(-1)
    apart = squared > 0
    return torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0)


def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor | None:
    """``torch.nn.functional.multi_margin_loss``: Σ_{i≠y} w_y max(0, m − x_y + x_i)ᵖ / C."""
    if input.dim() == 0:
        return None
    x, y = input.reshape(-1, input.shape[-1]), target.reshape(-1, 1)
    hinge = (margin - x.gather(1, y) + x).clamp(min=0)
    hinge = hinge * hinge if p == 2 else hinge
    if weight is not None:
        hinge = hinge * weight[y]
    loss = hinge.scatter(1, y, 0.0).sum(1) / x.shape[1]
    return _reduced(loss if input.dim() > 1 else loss[0], reduction)


def multilabel_margin_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """``torch.nn.functional.multilabel_margin_loss``: Σ_{j∈Y, i∉Y} max(0, 1 − x_j + x_i) / C.

    Y are the targets before the first −1.
    """
    x, y = torch.atleast_2d(input), torch.atleast_2d(target)
    counts = (y >= 0).cumprod(1).to(x.dtype)
    index = y.clamp(min=0)
    chosen = torch.zeros_like(x).scatter_add(1, index, counts).clamp(max=1).detach()
    hinge = (1 - x.gather(1, index)[:, :, None] + x[:, None, :]).clamp(min=0)
    loss = (hinge * counts[:, :, None] * (1 - chosen)[:, None, :]).sum((1, 2)) / x.shape[1]
    return _reduced(loss if input.dim() > 1 else loss[0], reduction)


def _unpool(unpool: Callable[..., Tensor]) -> Callable[..., Tensor]:
    num_dims = 1 + [F.max_unpool1d, F.max_unpool2d, F.max_unpool3d].index(unpool)

    def unpooled(input: Tensor, indices: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``torch.nn.functional.max_unpoolNd``: each value to its place among zeros."""
        shape = unpool(input.detach(), indices, *args, **kwargs).shape
        places, values = indices.flatten(-num_dims), input.flatten(-num_dims)
        zeros = input.new_zeros(*shape[:-num_dims], math.prod(shape[-num_dims:]))
        return zeros.scatter(-1, places, values).view(shape)

    return unpooled


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    mode: str = "mean",
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """``torch.nn.functional.embedding_bag``: sums, means or maxima of rows of ``weight``."""
    if input.dim() == 2:
        count, length = input.shape
        offsets = torch.arange(0, count * length, length, device=input.device)
        weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)
        include_last_offset = False
    else:
        assert offsets is not None
        count, weights = len(offsets) - include_last_offset, per_sample_weights
    index = input.reshape(-1)
    rows = F.embedding(index, weight, max_norm=max_norm, norm_type=norm_type)
    position = torch.arange(len(index), device=index.device)
    ends = offsets[1:] if include_last_offset else offsets[1:count]
    bag = torch.searchsorted(ends.contiguous(), position.to(offsets.dtype), right=True)
    if padding_idx is not None:
        kept = index != padding_idx % len(weight)
        rows, bag = rows[kept], bag[kept]
        weights = None if weights is None else weights[kept]
    if weights is not None:
        rows = rows * weights[:, None]
    bags = rows.new_zeros(count, weight.shape[1])
    if mode == "max":
        index_of = bag[:, None].expand_as(rows)
        return bags.scatter_reduce(0, index_of, rows, "amax", include_self=False)
    total = bags.index_add(0, bag, rows)
    if mode == "sum":
        return total
    sizes = torch.bincount(bag, minlength=count).clamp(min=1)
    return total / sizes[:, None].to(total.dtype)


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


SUBSTITUTES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    **CONVOLUTIONS,
    F.batch_norm: batch_norm,
    torch._weight_norm: weight_norm,
    torch.cdist: cdist,
    F.embedding_bag: embedding_bag,
    F.huber_loss: huber_loss,
    **{f: _unpool(f) for f in (F.max_unpool1d, F.max_unpool2d, F.max_unpool3d)},
    F.multi_margin_loss: multi_margin_loss,
    F.multilabel_margin_loss: multilabel_margin_loss,
    F.soft_margin_loss: soft_margin_loss,
}
if LINEAR_CROSS_ENTROPY is not None:
    SUBSTITUTES[LINEAR_CROSS_ENTROPY] = linear_cross_entropy

# Deprecated, or without a meaning for dense second derivatives: with these the original is called.
_UNUSUAL = ("size_average", "reduce", "sparse", "scale_grad_by_freq")


def substituted(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """``func(*args, **kwargs)`` by what stands in for it, or None where nothing does."""
    stand_in = SUBSTITUTES.get(func)
    if stand_in is None or any(kwargs.get(name) not in (None, False) for name in _UNUSUAL):
        return None
    usual = {name: value for name, value in kwargs.items() if name not in _UNUSUAL}
    return stand_in(*args, **usual)
