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

from hvpopt.engines.base import Runner, Trace, fill, unit_cotangent, vjp
from hvpopt.engines.split import NO_SPLIT, Curvature, LossSplit, SplitNotFoundError
from hvpopt.trees import TensorList

Piece = Callable[[TensorList, Sequence[Tensor | None] | None], Sequence[Tensor | None]]


class GraphRecorder:
    """Linearises the closure's loss at each of its ``backward`` calls.

    Args:
        run: whose parameters; no reducer sees gradients that ``autograd.grad`` computes, so that
            they are averaged over the ranks here.
        split: where given, products are the GGN's, else the Hessian's.
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

    def __call__(self, loss: Tensor, plain: Callable[..., None], /, **_: Any) -> None:
        """Takes the place of ``loss.backward()``; gradients gather in ``self.grads``."""
        with torch.autocast(loss.device.type, enabled=False):
            if self._split is None:
                grads: Sequence[Tensor | None] = torch.autograd.grad(
                    loss,
                    self._params,
                    unit_cotangent(loss) if self._create_graph else None,
                    create_graph=self._create_graph,
                    retain_graph=True if self._create_graph else None,
                    allow_unused=True,
                )
                if self._create_graph:
                    self.roots += grads
                    self._pieces.append(lambda v, _: vjp(grads, self._params, v))
            else:
                grads = self._gauss_newton(loss, self._split)
        self.losses.append(loss.detach())
        self._add_grads(grads)

    def _gauss_newton(self, loss: Tensor, split: LossSplit) -> list[Tensor | None]:
        """The gradient by the chain rule through the cut, and the GGN's product as a piece."""
        params, num_cuts = self._params, len(split.cuts)
        leaves = [cut.leaf for cut in split.cuts]
        outer = torch.autograd.grad(
            loss, [*leaves, *params], unit_cotangent(loss), create_graph=True, allow_unused=True
        )
        used = [i for i in range(num_cuts) if outer[i] is not None]
        if not used:
            raise SplitNotFoundError(NO_SPLIT)
        leaves = [leaves[i] for i in used]
        outputs = [split.cuts[i].output for i in used]
        slopes = [outer[i] for i in used]
        rest = outer[num_cuts:]
        self.has_remainder |= any(r is not None for r in rest)

        cotangents = [s.detach().requires_grad_() for s in slopes if s is not None]
        pulled = vjp(outputs, params, cotangents, create_graph=self._tangents is None)
        self.roots += [*pulled, *slopes, *rest]

        # v ↦ J v, ∇²ℓ (J v), Jᵀ(∇²ℓ J v)
        def product(v: TensorList, tangents: Sequence[Tensor | None] | None) -> list[Tensor | None]:
            along = vjp(pulled, cotangents, v) if tangents is None else [tangents[i] for i in used]
            curved = vjp(slopes, leaves, along)
            inner = vjp(outputs, params, curved)
            outer_rest = vjp(rest, params, v)
            return [_plus(a, b) for a, b in zip(inner, outer_rest, strict=True)]

        self._pieces.append(product)
        return [_plus(a, b) for a, b in zip(pulled, rest, strict=True)]

    def _add_grads(self, grads: Sequence[Tensor | None]) -> None:
        """Adds to ``self.grads``, and to ``p.grad`` what ``loss.backward()`` would have added."""
        found = [(i, g.detach()) for i, g in enumerate(grads) if g is not None]
        with torch.no_grad():
            for i, g in found:
                p, kept = self._params[i], self.grads[i]
                self.grads[i] = g.clone() if kept is None else kept + g
                p.grad = g.clone() if p.grad is None else p.grad.add_(g)
        sparse = any(g.layout != torch.strided for _, g in found)  # the optimizer refuses these
        if self._run.size == 1 or sparse:
            return
        means = self._run.average(fill([p.grad for p in self._params], self._params))
        for p, mean in zip(self._params, means, strict=True):
            p.grad = mean

    def product(self, v: TensorList) -> TensorList:
        """The Hessian or GGN of the summed losses times ``v``."""
        with torch.enable_grad():
            tangents = self._tangents(v) if self._tangents else None
            parts = [fill(piece(v, tangents), self._params) for piece in self._pieces]
        total = parts[0]
        for part in parts[1:]:
            torch._foreach_add_(total, part)
        return total


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _check_twice_differentiable(roots: Sequence[Tensor | None]) -> None:
    """Raises where a graph contains what ``once_differentiable`` leaves in place of a formula."""
    nodes = [root.grad_fn for root in roots if root is not None and root.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node.name().endswith("Error"):
            raise RuntimeError(
                "The backward of a custom autograd Function is marked once_differentiable, so "
                "that double backward would take it for a constant. Write its backward in "
                "differentiable operations, or give it a jvp and choose engine='dual'."
            )
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)


class GraphEngine:
    """Traces by a `GraphRecorder`."""

    name = "graph"

    def __init__(self) -> None:
        self._is_checked = False

    def trace(self, run: Runner, curvature: Curvature) -> Trace:
        """Loss, gradient and as many products as wanted from one run of the closure.

        Raises:
            RuntimeError: if the closure has a custom Function marked ``once_differentiable``
                (looked for in the first trace): torch would take its gradient for constant.
        """
        split = LossSplit() if curvature == "ggn" else None
        recorder = GraphRecorder(run, split)
        run(recorder, split=split)
        if not self._is_checked:
            _check_twice_differentiable(recorder.roots)
            self._is_checked = True
        return Trace(
            loss=torch.stack(recorder.losses).sum(),
            batch_grad=fill(recorder.grads, run.params),
            product=recorder.product,
            has_remainder=recorder.has_remainder,
        )

    def trace_along(
        self, run: Runner, v: TensorList, curvature: Curvature
    ) -> tuple[Tensor, TensorList]:
        """The loss and one product."""
        trace = self.trace(run, curvature)
        return trace.loss, trace.product(v)
