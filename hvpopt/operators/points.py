"""One batch's loss at the current parameters, and its products."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hvpopt.closure import ClosureOracle
from hvpopt.engines.base import fill
from hvpopt.engines.choice import EngineChoice
from hvpopt.engines.reduction import Reduction, TermCount, UnknownReductionError
from hvpopt.engines.split import Curvature
from hvpopt.engines.support import without_hooks
from hvpopt.linearization import LinearizedClosure
from hvpopt.operators.data import version
from hvpopt.trees import TensorList

NumTerms = Callable[[Any], float] | Literal["sum"] | None


class BatchLoss:
    """The closure of a `ClosureOracle` for one batch, which also finds how many terms it has.

    Args:
        loss: from a batch to a scalar tensor, or a dict with one under "loss".
        batch: what it is called with.
        num_terms: as in `CurvatureOperator`.
    """

    def __init__(self, loss: Callable[[Any], Any], batch: Any, num_terms: NumTerms) -> None:
        self._loss, self._batch, self._num_terms = loss, batch, num_terms
        self.found: TermCount | UnknownReductionError | None = None
        self.wanted: Sequence[Tensor] | None = None
        """Parameters whose gradients the next run computes."""
        self.grads: TensorList = []

    def __call__(self) -> Tensor:
        """One run."""
        with Reduction() as reduction:
            value = _scalar(self._loss(self._batch))
        if self.found is None:
            try:
                self.found = self._terms(reduction, value)
            except UnknownReductionError as error:  # of no consequence for a single batch
                self.found = error.with_traceback(None)
        if self.wanted is not None:
            with without_hooks(self.wanted):
                grads = torch.autograd.grad(value, self.wanted, allow_unused=True)
            self.grads = [g.clone() for g in fill(grads, self.wanted)]
        value.backward()
        return value

    def _terms(self, reduction: Reduction, value: Tensor) -> TermCount:
        if self._num_terms is None:
            return reduction.terms(value)
        if self._num_terms == "sum":
            return TermCount("sum", 1.0)
        number = float(self._num_terms(self._batch))
        if not 0 <= number < float("inf"):
            raise ValueError(f"num_terms returned {number}; expected how many terms a batch has.")
        return TermCount("mean", number)


def _scalar(value: Any) -> Tensor:
    """A loss function's result as a scalar tensor."""
    if isinstance(value, dict) and "loss" in value:
        value = value["loss"]
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        given = (
            f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
            if isinstance(value, Tensor)
            else f"a {type(value).__name__}"
        )
        raise TypeError(f"loss(batch) returned {given}; expected a real scalar tensor.")
    if not value.requires_grad:
        raise ValueError(
            "loss(batch) returned a tensor that requires no gradient: compute it from the "
            "parameters without detach() or torch.no_grad()."
        )
    return value.reshape(()) if value.dim() > 0 else value


class BatchPoint:
    """A batch's loss, gradient and products at the current parameters.

    Args:
        closure: the batch's loss.
        params: what to differentiate by.
        curvature: of what the products are.
        choice: of the engine.
        keep: traces once, and keeps the graph for products to come.
    """

    def __init__(
        self,
        closure: BatchLoss,
        params: TensorList,
        curvature: Curvature,
        choice: EngineChoice,
        *,
        keep: bool,
    ) -> None:
        self._closure, self._params = closure, params
        self._curvature, self._keep = curvature, keep
        self._oracle = ClosureOracle(
            closure, params, engine=choice, leave_no_trace=True, local=True
        )
        self._oracle.__enter__()
        self._trace: LinearizedClosure | None = None
        self._stamp: tuple[object, ...] = ()

    def close(self) -> None:
        """Releases the graph."""
        self._trace = None
        self._oracle.__exit__()

    @property
    def terms(self) -> TermCount | UnknownReductionError:
        """How the loss is reduced; known after the first run."""
        assert self._closure.found is not None
        return self._closure.found

    def products(self, vs: Sequence[TensorList]) -> list[TensorList]:
        """The products with some vectors, from one trace."""
        if len(vs) == 1 and not self._keep:
            return [self._oracle.trace_along(vs[0], self._curvature)[2]]
        if self._trace is None:
            self._trace = self._oracle.trace(self._curvature)
        results = [self._trace.product(v) for v in vs]
        self._stamp = self._state()  # finite differences move the parameters and put them back
        return results

    def loss(self) -> Tensor:
        """The loss, a scalar."""
        return self._oracle.evaluate() if self._trace is None else self._trace.loss

    def gradient(self) -> TensorList:
        """The loss's gradient."""
        if self._trace is not None:
            return self._trace.batch_grad
        self._closure.wanted = self._params
        try:
            self._oracle.evaluate()
        finally:
            self._closure.wanted = None
        return self._closure.grads

    @property
    def is_fresh(self) -> bool:
        """Whether there is a trace, and nothing that it depends on has changed since.

        Of modules: parameters, buffers, and whether they are in training mode.
        """
        return self._trace is not None and self._stamp == self._state()

    def _state(self) -> tuple[object, ...]:
        tensors = list(self._params)
        modes = []
        for module in self._oracle.modules:
            modes.append(module.training)
            spaces = (module._parameters, module._buffers)
            tensors += [t for space in spaces for t in space.values() if t is not None]
        return (tuple(modes), tuple((id(t), t.data_ptr(), version(t)) for t in tensors))
