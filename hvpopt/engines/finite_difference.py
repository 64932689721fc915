"""The finite-difference engine: central differences of two gradients.

    H v ≈ (g(θ + h v) − g(θ − h v)) / 2h,      h = ε^⅓ max(1, ‖θ‖) / ‖v‖,

ε the machine precision of the parameters, which balances the truncation error, of order h², against
the rounding error, of order ε/h. It needs nothing but a gradient and is approximate: good to a
relative 1e-9 or so in float64 and 1e-3 in float32 where the gradient is smooth. At the kinks of
ReLU and max pooling the gradient jumps, and differences count each jump in reach as curvature,
which the Hessian does not.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from hvpopt import trees
from hvpopt.engines.base import Runner, Trace, fill
from hvpopt.engines.graph import GraphRecorder
from hvpopt.engines.split import Curvature
from hvpopt.trees import TensorList


class FiniteDifferenceEngine:
    """Traces by differences of gradients; the Hessian only."""

    name = "finite_difference"

    def trace(self, run: Runner, curvature: Curvature) -> Trace:
        """Loss and gradient from one run; each product is two more."""
        if curvature != "hessian":
            raise ValueError(
                "Finite differences of the gradient give the Hessian, not the GGN or a Fisher: "
                "choose curvature='hessian', or engine='graph' or 'dual'."
            )
        recorder = GraphRecorder(run, create_graph=False)
        run(recorder)
        return replace(recorder.as_trace(), product=lambda v: self._product(run, v))

    def trace_along(
        self, run: Runner, v: TensorList, curvature: Curvature
    ) -> tuple[Tensor, TensorList]:
        """The loss and one product, from three runs."""
        trace = self.trace(run, curvature)
        return trace.loss, trace.product(v)

    def _product(self, run: Runner, v: TensorList) -> TensorList:
        length = float(trees.norm(v))
        if length == 0:
            return trees.zeros_like(v)
        epsilon = max(torch.finfo(p.dtype).eps for p in run.params)
        h = epsilon ** (1 / 3) * max(1.0, float(trees.norm(run.params).detach())) / length
        grads = []
        for step in (h, -h):
            recorder = GraphRecorder(run, create_graph=False)
            run(recorder, around=_moved(run.params, v, step))
            grads.append(fill(recorder.grads, run.params))
        return trees.scale(trees.add(grads[0], grads[1], -1.0), 1 / (2 * h))


@contextmanager
def _moved(params: Sequence[Tensor], v: Sequence[Tensor], step: float) -> Iterator[None]:
    """While active, the parameters are at θ + step v."""
    start = trees.clone(params)
    try:
        with torch.no_grad():
            trees.add_(params, v, step)
        yield
    finally:
        trees.copy_(params, start)
