"""The graph engine: products from a retained double-backward graph.

``loss.backward()`` in the closure is replaced by a gradient with ``create_graph=True``. The graph
of that gradient is kept, and each product is one more reverse pass over it: the Hessian by
Pearlmutter's ∇(gᵀv) (1994), the GGN by Schraudolph's Jᵀ(∇²ℓ (J v)) (2002), where J v is the
derivative of the linear map u ↦ Jᵀu along v, so that reverse mode suffices.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hvpopt.engines.base import Runner, Trace, fill, reverse, unit_cotangent, vjp
from hvpopt.engines.custom_functions import check_applications, recorded_applications
from hvpopt.engines.dual_level import check_modes_agree, derivative_along, is_rough
from hvpopt.engines.gauss_newton import head_of
from hvpopt.engines.split import Curvature, LossSplit
from hvpopt.engines.support import (
    announce_accumulated,
    hooked,
    reaches_dead_end,
    without_hooks,
)
from hvpopt.trees import TensorList

Piece = Callable[[TensorList, Sequence[Tensor | None] | None, bool], Sequence[Tensor | None]]


class GraphRecorder:
    """Linearises the closure's loss at each of its ``backward`` calls.

    Args:
        run: whose parameters; no reducer sees gradients that ``autograd.grad`` computes, so that
            they are averaged over the ranks here.
        split: where given, products are of its matrix, the GGN or a Fisher, else the Hessian's.
        create_graph: False for the gradient alone, without products.
        tangents: v ↦ J v at every cut of the split, by other means than the graph.
    """

    def __init__(
        self,
        run: Runner,
        split: LossSplit | None = None,
        *,
        create_graph: bool = True,
        tangents: Callable[[TensorList], Sequence[Tensor | None]] | None = None,
    ) -> None:
        self._run = run
        self._params = run.params
        self._split = split
        self._create_graph = create_graph
        self._tangents = tangents
        self._pieces: list[Piece] = []
        self.losses: list[Tensor] = []
        self.grads: list[Tensor | None] = [None] * len(self._params)
        self.has_remainder = False
        self.roots: list[Tensor | None] = []

    def __call__(self, loss: Tensor, plain: Callable[..., None], /, **options: Any) -> None:
        """Takes the place of ``loss.backward()``; gradients gather in ``self.grads``."""
        others = self._run.other_leaves
        leaves = [*self._params, *others]
        with torch.autocast(loss.device.type, enabled=False), without_hooks(leaves):
            if self._split is None:
                grads = self._gradient(loss, others, options.get("retain_graph"))
            else:
                grads = self._gauss_newton(loss, self._split, others)
        self.losses.append(loss.detach())
        count = len(self._params)
        for i, g in enumerate(grads[:count]):
            if g is not None:
                kept = self.grads[i]
                self.grads[i] = g.detach() if kept is None else kept + g.detach()
        self._write(leaves, grads)

    def _gradient(
        self, loss: Tensor, others: TensorList, retain_graph: bool | None
    ) -> list[Tensor | None]:
        """The gradient, and with a graph the Hessian's product as a piece."""
        params, keep = self._params, self._create_graph
        keep_graph = keep or bool(retain_graph)
        one = unit_cotangent(loss) if keep else torch.ones_like(loss)
        grads = reverse(
            [loss], [*params, *others], [one], retain_graph=keep_graph, create_graph=keep
        )
        if keep:
            slopes = grads[: len(params)]
            self.roots += slopes
            self._pieces.append(lambda v, _, keep: vjp(slopes, params, v, retain_graph=keep))
        return grads

    def _gauss_newton(
        self, loss: Tensor, split: LossSplit, others: TensorList
    ) -> list[Tensor | None]:
        """The gradient by the chain rule through the cut, and Jᵀ(C (J v)) as a piece."""
        params = self._params
        inputs = [*params, *others]
        head = head_of(loss, split, inputs)
        rest = head.rest[: len(params)]
        self.has_remainder |= any(r is not None for r in rest)

        cotangents = [s.detach().requires_grad_() for s in head.slopes]
        pulled = vjp(head.outputs, inputs, cotangents, create_graph=self._tangents is None)
        self.roots += [*pulled, *head.roots]
        pulled_by_params = pulled[: len(params)]
        rough = self._tangents is not None and is_rough(loss)

        # v ↦ J v, C (J v), Jᵀ(C J v)
        def product(
            v: TensorList, tangents: Sequence[Tensor | None] | None, _: bool
        ) -> Sequence[Any]:
            if tangents is None:
                along = vjp(pulled_by_params, cotangents, v)
            else:
                along = [tangents[i] for i in head.used]
                forward = derivative_along(head.slopes, along)
                check_modes_agree(forward, pulled_by_params, v, rough=rough)
            inner = vjp(head.outputs, params, head.curve(along))
            if not head.with_rest:
                return inner
            with split.severed():
                outer_rest = vjp(rest, params, v)
            return [_plus(a, b) for a, b in zip(inner, outer_rest, strict=True)]

        self._pieces.append(product)
        return [_plus(a, b) for a, b in zip(pulled, head.rest, strict=True)]

    def _write(self, leaves: TensorList, grads: Sequence[Tensor | None]) -> None:
        """Adds to each leaf's ``.grad`` what ``loss.backward()`` would have added.

        Under data parallelism the parameters' are then averaged; other leaves may be inputs.
        """
        with torch.no_grad():
            for leaf, g in zip(leaves, grads, strict=True):
                if g is not None:
                    g = hooked(leaf, g.detach()) if self._run.is_first else g.detach()
                    leaf.grad = _laid_out(g, leaf) if leaf.grad is None else leaf.grad.add_(g)
        sparse = any(g is not None and g.layout != torch.strided for g in grads)
        if self._run.size > 1 and not sparse:  # the optimizer refuses sparse ones
            means = self._run.average(fill([p.grad for p in self._params], self._params))
            for p, mean in zip(self._params, means, strict=True):
                p.grad = mean
        if self._run.is_first:
            for leaf, g in zip(leaves, grads, strict=True):
                if g is not None:
                    announce_accumulated(leaf)

    def as_trace(self) -> Trace:
        """What was recorded."""
        return Trace(
            loss=torch.stack(self.losses).sum(),
            batch_grad=fill(self.grads, self._params),
            product=self.product,
            has_remainder=self.has_remainder,
        )

    def product(self, v: TensorList, *, is_last: bool = False) -> TensorList:
        """The Hessian or GGN of the summed losses times ``v``; the last may free the graph."""
        keep = not is_last or len(self._pieces) > 1
        tangents = self._tangents(v) if self._tangents else None
        with torch.enable_grad(), self._run.recomputation(), without_hooks(self._params):
            parts = [fill(piece(v, tangents, keep), self._params) for piece in self._pieces]
        total = parts[0]
        for part in parts[1:]:
            torch._foreach_add_(total, part)
        return total


def _laid_out(grad: Tensor, leaf: Tensor) -> Tensor:
    """A copy with the strides of the leaf, which ``backward()`` gives to gradients, too."""
    if grad.layout != torch.strided:
        return grad.clone()
    return torch.empty_like(leaf, requires_grad=False).copy_(grad)


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _check_twice_differentiable(roots: Sequence[Tensor | None]) -> None:
    if reaches_dead_end(roots):
        raise RuntimeError(
            "The backward of a custom autograd Function is marked once_differentiable, so that "
            "double backward would take it for a constant. Write its backward in differentiable "
            "operations, or give it a jvp and choose engine='dual'."
        )


class GraphEngine:
    """Traces by a `GraphRecorder`."""

    name = "graph"

    def __init__(self) -> None:
        self._is_checked = False

    def trace(self, run: Runner, curvature: Curvature) -> Trace:
        """Loss, gradient and as many products as wanted from one run of the closure.

        Raises:
            RuntimeError: if the closure has a custom Function marked ``once_differentiable``, or
                one that hides what its backward depends on (looked for in the first trace):
                double backward would take its gradient for constant.
        """
        return self._recorded(run, curvature).as_trace()

    def _recorded(self, run: Runner, curvature: Curvature) -> GraphRecorder:
        split = None if curvature == "hessian" else LossSplit(curvature)
        recorder = GraphRecorder(run, split)
        with recorded_applications(active=not self._is_checked) as applications:
            run(recorder, split=split)
        if not self._is_checked:
            _check_twice_differentiable(recorder.roots)
            with run.untraced():
                check_applications(applications, forward=False)
            self._is_checked = True
        return recorder

    def trace_along(
        self, run: Runner, v: TensorList, curvature: Curvature
    ) -> tuple[Tensor, TensorList]:
        """The loss and one product."""
        recorder = self._recorded(run, curvature)
        return recorder.as_trace().loss, recorder.product(v, is_last=True)
