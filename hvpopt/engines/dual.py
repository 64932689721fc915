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
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointError

from hvpopt.engines.base import Run, Runner, Trace, fill, reverse, vjp
from hvpopt.engines.custom_functions import check_applications, recorded_applications
from hvpopt.engines.dual_level import (
    DualLevel,
    check_modes_agree,
    derivative_along,
    is_rough,
    needs_graph,
)
from hvpopt.engines.dual_split import DualSplit, ZeroTangents
from hvpopt.engines.gauss_newton import head_of
from hvpopt.engines.graph import GraphRecorder
from hvpopt.engines.split import Curvature, LossSplit
from hvpopt.engines.support import without_hooks
from hvpopt.trees import TensorList

REMAINDER = (
    "A part of the loss does not go through a loss function of torch.nn.functional, and the dual "
    "engine's GGN has no product for it: choose engine='graph', or express a penalty on the "
    "weights as the optimizer's weight_decay."
)

CHECKPOINTED = (
    "The closure checkpoints a layer, which would be recomputed without the tangents that the dual "
    "engine's GGN computed it with: choose engine='graph'."
)


class RemainderError(ValueError):
    """Raised where the dual engine meets a loss with a part outside its split."""


class DualRecorder:
    """Reads the Hessian-vector product off the gradient of each ``backward`` call.

    Args:
        run: whose parameters.
        create_graph: lets the reverse pass use formulas that themselves have forward-mode
            derivatives (SiLU, GroupNorm), at the cost of memory.
        check: the tangents, where forward and reverse mode are to be compared.
    """

    def __init__(
        self, run: Run, *, create_graph: bool = False, check: TensorList | None = None
    ) -> None:
        self._run = run
        self._params = run.params
        self.create_graph = create_graph
        self._check = check
        self._grads: list[Tensor | None] = [None] * len(self._params)
        self.losses: list[Tensor] = []
        self.products: list[Tensor | None] = [None] * len(self._params)

    def __call__(self, loss: Tensor, plain: Callable[..., None], /, **options: Any) -> None:
        """Takes the place of ``loss.backward()``."""
        primal, tangent = forward_ad.unpack_dual(loss)
        self.losses.append(primal.detach().clone())
        self.create_graph |= self._check is not None and needs_graph(loss)
        options["create_graph"] = options["create_graph"] or self.create_graph
        # With a tangent of zeros, which formulas may write to, as they may not to a ZeroTensor.
        one = forward_ad.make_dual(torch.ones_like(loss), torch.zeros_like(loss))
        if self._run.is_first:
            self._backward(loss, one, plain, options)
        else:
            with without_hooks(self._params):
                keep, more = options["retain_graph"], options["create_graph"]
                grads = reverse(
                    [loss], self._params, [one], retain_graph=bool(keep or more), create_graph=more
                )
            for i, (p, grad) in enumerate(zip(self._params, grads, strict=True)):
                g = self._keep(i, grad)
                if g is not None:
                    p.grad = g if p.grad is None else p.grad + g
        if self._check is not None:
            rough = is_rough(loss)
            check_modes_agree(tangent, self._grads, self._check, rough=rough)
            self._grads = [None] * len(self._params)

    def _backward(
        self, loss: Tensor, one: Tensor, plain: Callable[..., None], options: dict[str, Any]
    ) -> None:
        """``loss.backward()``, which gives every leaf its gradient and wakes DDP's reducer."""
        handles = [p.register_hook(partial(self._keep, i)) for i, p in enumerate(self._params)]
        for p in self._params:  # ours comes first: theirs are for the gradient
            hooks: Any = p._backward_hooks
            hooks.move_to_end(next(reversed(hooks)), last=False)
        try:
            with warnings.catch_warnings():
                # of a reference cycle, which there is not: what becomes p.grad is detached
                warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True")
                plain(loss, one, **options)
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, index: int, grad: Tensor | None) -> Tensor | None:
        """Keeps the gradient's tangent, and returns it without."""
        if grad is None:
            return None
        primal, tangent = forward_ad.unpack_dual(grad)
        if tangent is not None:
            kept, tangent = self.products[index], tangent.detach()
            self.products[index] = tangent.clone() if kept is None else kept + tangent
        primal = primal.detach()
        if self._check is not None:
            self._grads[index] = primal
        return primal


class DualGaussNewtonRecorder:
    """The GGN's product from the tangents at the split and one more reverse pass.

    Args:
        run: whose parameters.
        split: where the tangents stop.
        level: is left before the reverse passes, which then carry no tangents. (Checkpointed
            layers, which recompute without them what they computed with them, raise.)
        check: the tangents, where forward and reverse mode are to be compared.
    """

    def __init__(
        self, run: Runner, split: DualSplit, level: DualLevel, *, check: TensorList | None = None
    ) -> None:
        self._run, self._split, self._level, self._check = run, split, level, check
        self._params = run.params
        self.losses: list[Tensor] = []
        self.products: list[Tensor | None] = [None] * len(self._params)

    def __call__(self, loss: Tensor, plain: Callable[..., None], /, **options: Any) -> None:
        """Takes the place of ``loss.backward()``; may run once a closure, as it ends the level."""
        if self.losses:
            raise RemainderError(
                "The closure calls backward more than once, which the dual engine's GGN does not "
                "support: choose engine='graph'."
            )
        with without_hooks(self._params):
            head = head_of(loss, self._split, self._params)
            tangents = [self._split.tangents[i] for i in head.used]
            curved = head.curve(tangents)
            self._level.leave()
            if head.with_rest:
                with self._split.severed():
                    bent = vjp(head.rest, self._params, self._level.tangents)
                if any(t is not None and t.count_nonzero() for t in (*head.rest, *bent)):
                    raise RemainderError(REMAINDER)
            self.losses.append(loss.detach())
            try:
                self.products = vjp(head.outputs, self._params, curved)
            except CheckpointError as error:
                raise RuntimeError(CHECKPOINTED) from error
            if self._check is not None or (self._run.wants_gradient and not self._run.is_first):
                self._pull(head.outputs, head.slopes, tangents, loss)
        if self._run.is_first:
            plain(loss, **options)

    def _pull(
        self,
        outputs: TensorList,
        slopes: TensorList,
        tangents: Sequence[Tensor | None],
        loss: Tensor,
    ) -> None:
        """The gradient through the cuts, which forward mode must agree with."""
        grads = vjp(outputs, self._params, slopes)
        if self._check is not None:
            along = derivative_along(slopes, tangents)
            check_modes_agree(along, grads, self._check, rough=is_rough(loss))
        if not self._run.is_first:
            for p, g in zip(self._params, grads, strict=True):
                p.grad = None if g is None else g.detach()


class DualEngine:
    """Traces by tangents on the parameters.

    Args:
        thorough: ``create_graph`` of `DualRecorder`; for the Hessian.
    """

    def __init__(self, *, thorough: bool = False) -> None:
        self.thorough = thorough
        self.name = "dual (thorough)" if thorough else "dual"
        self._is_checked = False

    def trace(self, run: Runner, curvature: Curvature) -> Trace:
        """Loss and gradient from one run; each product is one more run of the closure.

        For the GGN and Fisher that run is the forward half: it yields J v, and Jᵀ is the retained
        graph's.
        """
        if curvature != "hessian":
            return self._trace_gauss_newton(run, curvature)
        recorder = GraphRecorder(run, create_graph=False)
        run(recorder)
        return replace(
            recorder.as_trace(), product=lambda v: self.trace_along(run, v, curvature)[1]
        )

    def _trace_gauss_newton(self, run: Runner, curvature: Curvature) -> Trace:
        def tangents(v: TensorList) -> list[Tensor | None]:
            split = DualSplit(curvature)
            run(lambda loss, plain, /, **_: None, split=split, around=DualLevel(run.params, v))
            return split.tangents

        split = LossSplit(curvature)
        recorder = GraphRecorder(run, split, tangents=tangents)
        run(recorder, split=split)
        return recorder.as_trace()

    def trace_along(
        self, run: Runner, v: TensorList, curvature: Curvature
    ) -> tuple[Tensor, TensorList]:
        """Loss, gradient (in ``p.grad``) and one product from one run of the closure.

        Raises:
            RuntimeError: in the first, if forward and reverse mode disagree.
        """
        level = DualLevel(run.params, v)
        check = None if self._is_checked else v
        if curvature != "hessian":
            split = DualSplit(curvature)
            along = DualGaussNewtonRecorder(run, split, level, check=check)
            run(along, split=split, around=level)
            self._is_checked = True
            return torch.stack(along.losses).sum(), fill(along.products, run.params)
        recorder = DualRecorder(run, create_graph=self.thorough, check=check)
        with recorded_applications(active=check is not None) as applications:
            run(recorder, split=ZeroTangents(), around=level)
        with run.untraced():
            check_applications(applications, forward=True)
        self.thorough, self._is_checked = recorder.create_graph, True
        return torch.stack(recorder.losses).sum(), fill(recorder.products, run.params)
