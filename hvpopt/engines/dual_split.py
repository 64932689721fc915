"""What the dual engine does to the calls of loss functions."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from hvpopt.engines.split import Curvature, LossSplit


class DualSplit(LossSplit):
    """A split that also takes the tangents J v off the network's outputs."""

    def __init__(self, curvature: Curvature) -> None:
        super().__init__(curvature)
        self.tangents: list[Tensor | None] = []

    def _cut(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        primal, tangent = forward_ad.unpack_dual(value)
        num_cuts = len(self.cuts)
        leaf = super()._cut(primal)
        if len(self.cuts) == num_cuts:
            return value
        self.tangents.append(None if tangent is None else tangent.detach())
        return leaf


class ZeroTangents(LossSplit):
    """Gives the targets of F.mse_loss a tangent, of which its backward's formula needs storage."""

    def handles(self, func: object) -> bool:
        """Whether ``func`` is mse_loss."""
        return func is F.mse_loss

    def __call__(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """``func(*args, **kwargs)``."""
        given = (*args, *kwargs.values())
        dtypes = [x.dtype for x in given if isinstance(x, Tensor) and x.is_floating_point()]

        def dual(value: Any) -> Any:
            if not isinstance(value, Tensor) or forward_ad.unpack_dual(value).tangent is not None:
                return value
            if not value.is_floating_point():  # labels; integers have no tangents
                value = value.to(dtypes[0])
            return forward_ad.make_dual(value, torch.zeros_like(value))

        return func(*map(dual, args), **{k: dual(x) for k, x in kwargs.items()})
