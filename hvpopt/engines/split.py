"""The split of a training loss into a network's outputs z and a loss of z, for the GGN.

A loss function of ``torch.nn.functional`` is called with the network's output z. The split hands
it a view of z that can be severed from z while derivatives are taken, so that the loss is a
function of the views (and of the parameters, where a part of it bypasses them), and each z is a
function of the parameters:

    L(θ) = ℓ(z(θ), θ)      G = Jᵀ ∇²_zz ℓ J + ∇²_θθ ℓ,      J = ∂z/∂θ

The first term is the generalised Gauss-Newton matrix (Schraudolph 2002, section 3.1); the second
is the Hessian of what bypasses the loss functions, a penalty on the weights, say.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hvpopt.engines.support import graph_nodes

Curvature = Literal["hessian", "ggn"]

_CONVEX = frozenset(
    (
        F.binary_cross_entropy,
        F.binary_cross_entropy_with_logits,
        F.cross_entropy,
        F.gaussian_nll_loss,
        F.huber_loss,
        F.mse_loss,
        F.multilabel_soft_margin_loss,
        F.poisson_nll_loss,
        F.smooth_l1_loss,
        F.soft_margin_loss,
    )
)
# These are linear in log-probabilities; the curvature is that of the log_softmax before them.
_LINEAR = frozenset((F.nll_loss, F.kl_div))
_LOG_SOFTMAX = frozenset((F.log_softmax, torch.log_softmax, Tensor.log_softmax))

NO_SPLIT = (
    "The GGN needs to know which tensor is the network's output, and found no call of a convex "
    "loss function of torch.nn.functional in the closure (it knows "
    f"{', '.join(sorted(f.__name__ for f in _CONVEX | _LINEAR))}). Compute the loss by one of "
    "them (F.mse_loss(residual, torch.zeros_like(residual)) for a mean of squares), or choose "
    "curvature='hessian'."
)


class SplitNotFoundError(ValueError):
    """Raised where a GGN is asked for and no loss function was called."""


class _Severance:
    """Whether derivatives stop at the cuts."""

    on = False


class _Cut(torch.autograd.Function):
    """The identity, with a derivative that can be switched off."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, severance: _Severance) -> Tensor:
        ctx.severance = severance
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (None if ctx.severance.on else grad), None


@dataclass(frozen=True)
class Cut:
    """One output of the network and the view that stands for it in the loss."""

    output: Tensor
    leaf: Tensor


class LossSplit:
    """Cuts the graph at the inputs of the loss functions that are called with it.

    What already depends on a cut, the input of a loss of a loss, is not cut again.
    """

    def __init__(self) -> None:
        self.cuts: list[Cut] = []
        self._severance = _Severance()
        self._log_softmaxes: dict[int, tuple[Tensor, Callable[..., Tensor], Any, Any]] = {}

    def handles(self, func: object) -> bool:
        """Whether ``func`` is a loss function, or a log_softmax that one may come after."""
        return func in _CONVEX or func in _LINEAR or func in _LOG_SOFTMAX

    def __call__(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """``func(*args, **kwargs)`` with the network's outputs replaced by leaves."""
        if func in _LOG_SOFTMAX:
            out = func(*args, **kwargs)
            self._log_softmaxes[id(out)] = (out, func, args, kwargs)
            return out
        if func in _LINEAR:
            log_probs = args[0] if args else kwargs["input"]
            if id(log_probs) not in self._log_softmaxes:
                return func(*args, **kwargs)
            _, log_softmax, inner_args, inner_kwargs = self._log_softmaxes[id(log_probs)]
            log_probs = log_softmax(*self._cut_all(inner_args), **self._cut_values(inner_kwargs))
            if args:
                args = (log_probs, *args[1:])
            else:
                kwargs = {**kwargs, "input": log_probs}
            return func(*args, **kwargs)
        return func(*self._cut_all(args), **self._cut_values(kwargs))

    def _cut_all(self, values: Sequence[Any]) -> list[Any]:
        return [self._cut(value) for value in values]

    def _cut_values(self, values: dict[str, Any]) -> dict[str, Any]:
        return {key: self._cut(value) for key, value in values.items()}

    @contextmanager
    def severed(self) -> Iterator[None]:
        """While active, no derivative passes a cut."""
        self._severance.on = True
        try:
            yield
        finally:
            self._severance.on = False

    def _cut(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.requires_grad or _is_transformed(value):
            return value
        if self.cuts and any(node.name() == "_CutBackward" for node in graph_nodes([value])):
            return value
        leaf: Tensor = _Cut.apply(value, self._severance)
        self.cuts.append(Cut(value, leaf))
        return leaf


def _is_transformed(value: Tensor) -> bool:
    """Whether the closure itself is differentiating here by ``torch.func``."""
    return torch._C._functorch.is_functorch_wrapped_tensor(value)
