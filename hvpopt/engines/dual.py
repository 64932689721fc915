"""The dual engine: loss, gradient and one product from one run of the closure.

The parameters carry tangents while the closure runs (forward mode), so that the gradient which
``loss.backward()`` computes carries the derivative of the gradient along them: forward over
reverse, Pearlmutter (1994). For the GGN the tangents stop at the network's outputs, where they are
J v; the loss's curvature turns them into cotangents for a second reverse pass.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from hvpopt.engines.base import Runner, Trace, fill, unit_cotangent, vjp
from hvpopt.engines.graph import GraphRecorder
from hvpopt.engines.split import NO_SPLIT, Curvature, LossSplit, SplitNotFoundError
from hvpopt.trees import TensorList

REMAINDER = (
    "A part of the loss does not go through a loss function of torch.nn.functional, and the dual "
    "engine's GGN has no product for it: choose engine='graph', or express a penalty on the "
    "weights as the optimizer's weight_decay."
)


class RemainderError(ValueError):
    """Raised where the dual engine meets a loss with a part outside its split."""


class DualLevel:
    """A forward-mode level that can be left before its ``with`` block ends."""

    def __init__(self, params: Sequence[Tensor], tangents: Sequence[Tensor]) -> None:
        self._params, self._tangents = params, tangents
        self._level: int | None = None

    def __enter__(self) -> "DualLevel":
        self._level = forward_ad.enter_dual_level()
        try:
            # The values do not change: graphs that were recorded from them stay valid.
            with torch.no_grad(), _unsafe_preserve_version_counter(tuple(self._params)):
                for p, t in zip(self._params, self._tangents, strict=True):
                    p.copy_(forward_ad.make_dual(p.detach().clone(), t))
        except BaseException:
            self.leave()
            raise
        return self

    def leave(self) -> None:
        """Clears the tangents of every tensor made at this level."""
        if self._level is not None:
            forward_ad.exit_dual_level(level=self._level)
            self._level = None

    def __exit__(self, *exc: object) -> None:
        self.leave()


class DualSplit(LossSplit):
    """A split that also takes the tangents J v off the network's outputs."""

    def __init__(self) -> None:
        super().__init__()
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


class _ZeroTangents(LossSplit):
    """Gives the targets of F.mse_loss a tangent, of which its backward's formula needs storage."""

    def handles(self, func: object) -> bool:
        return func is F.mse_loss

    def __call__(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return func(*map(self._dual, args), **{k: self._dual(x) for k, x in kwargs.items()})

    def _dual(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or forward_ad.unpack_dual(value).tangent is not None:
            return value
        return forward_ad.make_dual(value, torch.zeros_like(value))


class DualRecorder:
    """Reads the Hessian-vector product off the gradient of each ``backward`` call.

    Args:
        run: whose parameters.
        create_graph: lets the reverse pass use formulas that themselves have forward-mode
            derivatives (SiLU, GroupNorm), at the cost of memory.
    """

    def __init__(self, run: Runner, *, create_graph: bool = False) -> None:
        self._run = run
        self._params = run.params
        self._create_graph = create_graph
        self.losses: list[Tensor] = []
        self.products: list[Tensor | None] = [None] * len(self._params)

    def __call__(self, loss: Tensor, plain: Callable[..., None], /, **options: Any) -> None:
        """Takes the place of ``loss.backward()``."""
        self.losses.append(forward_ad.unpack_dual(loss.detach()).primal.clone())
        options["create_graph"] = options["create_graph"] or self._create_graph
        # With a tangent of zeros, which formulas may write to, as they may not to a ZeroTensor.
        one = forward_ad.make_dual(torch.ones_like(loss), torch.zeros_like(loss))
        if self._run.is_first:
            self._backward(loss, one, plain, options)
            return
        grads = torch.autograd.grad(loss, self._params, one, allow_unused=True, **options)
        for i, grad in enumerate(grads):
            if grad is not None:
                self._keep(i, grad)

    def _backward(
        self, loss: Tensor, one: Tensor, plain: Callable[..., None], options: dict[str, Any]
    ) -> None:
        """``loss.backward()``, which gives every leaf its gradient and wakes DDP's reducer."""
        handles = [p.register_hook(partial(self._keep, i)) for i, p in enumerate(self._params)]
        try:
            with warnings.catch_warnings():
                # of a reference cycle, which there is not: what becomes p.grad is detached
                warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True")
                plain(loss, one, **options)
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, index: int, grad: Tensor) -> Tensor:
        """Keeps the gradient's tangent, and returns it without."""
        primal, tangent = forward_ad.unpack_dual(grad)
        if tangent is not None:
            kept, tangent = self.products[index], tangent.detach()
            self.products[index] = tangent.clone() if kept is None else kept + tangent
        return primal.detach()


class DualGaussNewtonRecorder:
    """The GGN's product from the tangents at the split and one more reverse pass.

    Args:
        run: whose parameters.
        split: where the tangents stop.
        level: is left before the reverse passes, which then carry no tangents. (Checkpointed
            layers, which recompute without them what they computed with them, raise.)
    """

    def __init__(self, run: Runner, split: DualSplit, level: DualLevel) -> None:
        self._run, self._split, self._level = run, split, level
        self._params = run.params
        self.losses: list[Tensor] = []
        self.products: list[Tensor | None] = [None] * len(self._params)

    def __call__(self, loss: Tensor, plain: Callable[..., None], /, **_: Any) -> None:
        """Takes the place of ``loss.backward()``; may run once a closure, as it ends the level."""
        if self.losses:
            raise RemainderError(
                "The closure calls backward more than once, which the dual engine's GGN does not "
                "support: choose engine='graph'."
            )
        split, num_cuts = self._split, len(self._split.cuts)
        leaves = [cut.leaf for cut in split.cuts]
        with split.severed():
            outer = torch.autograd.grad(
                loss,
                [*leaves, *self._params],
                unit_cotangent(loss),
                create_graph=True,
                allow_unused=True,
            )
        used = [i for i in range(num_cuts) if outer[i] is not None]
        if not used:
            raise SplitNotFoundError(NO_SPLIT)
        if any(r is not None and r.count_nonzero() for r in outer[num_cuts:]):
            raise RemainderError(REMAINDER)
        slopes = [outer[i] for i in used]
        curved = vjp(slopes, [leaves[i] for i in used], [split.tangents[i] for i in used])
        outputs = [split.cuts[i].output for i in used]
        self._level.leave()
        self.losses.append(loss.detach())
        self.products = vjp(outputs, self._params, curved)
        if self._run.is_first:
            torch.autograd.backward(outputs, [s.detach() for s in slopes if s is not None])


class DualEngine:
    """Traces by tangents on the parameters.

    Args:
        thorough: ``create_graph`` of `DualRecorder`; for the Hessian.
    """

    def __init__(self, *, thorough: bool = False) -> None:
        self.thorough = thorough
        self.name = "dual (thorough)" if thorough else "dual"

    def trace(self, run: Runner, curvature: Curvature) -> Trace:
        """Loss and gradient from one run; each product is one more run of the closure.

        For the GGN that run is the forward half: it yields J v, and Jᵀ is the retained graph's.
        """
        if curvature == "ggn":
            return self._trace_gauss_newton(run)
        recorder = GraphRecorder(run, create_graph=False)
        run(recorder)
        return replace(
            recorder.as_trace(), product=lambda v: self.trace_along(run, v, curvature)[1]
        )

    def _trace_gauss_newton(self, run: Runner) -> Trace:
        def tangents(v: TensorList) -> list[Tensor | None]:
            split = DualSplit()
            run(lambda loss, plain, /, **_: None, split=split, around=DualLevel(run.params, v))
            return split.tangents

        split = LossSplit()
        recorder = GraphRecorder(run, split, tangents=tangents)
        run(recorder, split=split)
        return recorder.as_trace()

    def trace_along(
        self, run: Runner, v: TensorList, curvature: Curvature
    ) -> tuple[Tensor, TensorList]:
        """Loss, gradient (in ``p.grad``) and one product from one run of the closure."""
        level = DualLevel(run.params, v)
        if curvature == "ggn":
            split = DualSplit()
            along = DualGaussNewtonRecorder(run, split, level)
            run(along, split=split, around=level)
            return torch.stack(along.losses).sum(), fill(along.products, run.params)
        recorder = DualRecorder(run, create_graph=self.thorough)
        run(recorder, split=_ZeroTangents(), around=level)
        return torch.stack(recorder.losses).sum(), fill(recorder.products, run.params)
