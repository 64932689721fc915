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
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hvpopt.engines.support import graph_nodes
from hvpopt.likelihoods import FisherKind, MonteCarlo

CurvatureName = Literal["hessian", "ggn", "fisher", "fisher_mc", "empirical_fisher"]
Curvature = CurvatureName | MonteCarlo
"""A curvature matrix by name; `MonteCarlo` is "fisher_mc" with other than one sample of seed 0."""

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

_FISHER_KINDS: dict[CurvatureName, FisherKind] = {
    "fisher": "exact",
    "fisher_mc": "monte_carlo",
    "empirical_fisher": "empirical",
}

NO_SPLIT = (
    "The GGN needs to know which tensor is the network's output, and found no call of a convex "
    "loss function of torch.nn.functional in the closure (it knows "
    f"{', '.join(sorted(f.__name__ for f in _CONVEX | _LINEAR))}). Compute the loss by one of "
    "them (F.mse_loss(residual, torch.zeros_like(residual)) for a mean of squares), or choose "
    "curvature='hessian'."
)


_IS_INNER: ContextVar[bool] = ContextVar("inner", default=False)


@contextmanager
def inner_problem() -> Iterator[None]:
    """While active, loss functions are those of an inner problem, and no split cuts the graph."""
    token = _IS_INNER.set(True)
    try:
        yield
    finally:
        _IS_INNER.reset(token)


class SplitNotFoundError(ValueError):
    """Raised where a GGN is asked for and no loss function was called."""


def curvature_name(curvature: Curvature) -> CurvatureName:
    """The name of a curvature matrix.

    Raises:
        ValueError: for an unknown name.
    """
    if isinstance(curvature, MonteCarlo):
        return "fisher_mc"
    names = get_args(CurvatureName)
    if curvature not in names:
        raise ValueError(
            f"curvature={curvature!r} is unknown: choose one of {', '.join(map(repr, names))}, or "
            "a hvpopt.likelihoods.MonteCarlo."
        )
    return curvature


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


@dataclass(frozen=True)
class LossCall:
    """A call of a loss function whose value depends on the parameters.

    Attributes:
        func: the loss function.
        args: its arguments, the leaves of cuts among them; of what is linear in
            log-probabilities, the logits are the first where its log_softmax was met.
        kwargs: its keyword arguments.
        cuts: which of the split's cuts are its own.
        value: where its value stands in the graph, whatever is later done to it in place.
        softmax_dim: the log_softmax's dimension.
    """

    func: Callable[..., Tensor]
    args: Sequence[Any]
    kwargs: dict[str, Any]
    cuts: range
    value: GradientEdge
    softmax_dim: Any = None


class LossSplit:
    """Cuts the graph at the inputs of the loss functions that are called with it.

    What already depends on a cut, the input of a loss of a loss, is not cut again.

    Args:
        curvature: which matrix the cuts are for, other than the Hessian.
    """

    def __init__(self, curvature: Curvature = "ggn") -> None:
        self.fisher_kind = _FISHER_KINDS.get(curvature_name(curvature))
        self.monte_carlo = curvature if isinstance(curvature, MonteCarlo) else MonteCarlo()
        self.generator = self.monte_carlo.generator()
        self.cuts: list[Cut] = []
        self.calls: list[LossCall] = []
        self._severance = _Severance()
        self._log_softmaxes: dict[int, tuple[Tensor, Callable[..., Tensor], Any, Any]] = {}

    def handles(self, func: object) -> bool:
        """Whether ``func`` is a loss function, or a log_softmax that one may come after."""
        is_known = func in _CONVEX or func in _LINEAR or func in _LOG_SOFTMAX
        return is_known and not _IS_INNER.get()

    def __call__(self, func: Callable[..., Tensor], *given: Any, **kwargs: Any) -> Tensor:
        """``func(*given, **kwargs)`` with the network's outputs replaced by leaves."""
        if func in _LOG_SOFTMAX:
            out = func(*given, **kwargs)
            self._log_softmaxes[id(out)] = (out, func, given, kwargs)
            return out
        args: Sequence[Any] = given
        num_cuts, logits, softmax_dim = len(self.cuts), None, None
        if func not in _LINEAR:
            args, kwargs = self._cut_all(args), self._cut_values(kwargs)
        else:
            if not args:
                args, kwargs = (kwargs["input"],), {k: kwargs[k] for k in kwargs if k != "input"}
            if id(args[0]) in self._log_softmaxes:
                _, log_softmax, inner, options = self._log_softmaxes[id(args[0])]
                inner, options = self._cut_all(inner), self._cut_values(options)
                logits, softmax_dim = _softmax_arguments(*inner, **options)
                args = (log_softmax(*inner, **options), *args[1:])
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.requires_grad and not _is_transformed(out):
            own, value = range(num_cuts, len(self.cuts)), get_gradient_edge(out)
            args = args if logits is None else (logits, *args[1:])
            self.calls.append(LossCall(func, args, kwargs, own, value, softmax_dim))
        return out

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


def _softmax_arguments(input: Tensor, dim: Any = None, *_: Any, **__: Any) -> tuple[Tensor, Any]:
    return input, dim


def _is_transformed(value: Tensor) -> bool:
    """Whether the closure itself is differentiating here by ``torch.func``."""
    return torch._C._functorch.is_functorch_wrapped_tensor(value)
