"""The loss over all of the data, at many points in turn."""

from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from hvpopt.engines.reduction import Reduction, TermCount, UnknownReductionError
from hvpopt.operators.data import Batches
from hvpopt.operators.means import Found, WeightedMean
from hvpopt.operators.points import NumTerms
from hvpopt.trees import TensorList


class Losses:
    """The mean loss over the data where the parameters are, as a curvature operator has it.

    What an operator must know of a loss to take products is left out, so that it costs little
    more than the runs of the network. No trace is left. Weights of the batches are those of the
    first call, which also looks whether one batch's run leaves anything to the next: random
    numbers, or statistics. Where it does not, later calls guard all batches together.

    Args:
        loss: from a batch to a scalar.
        params: of the loss.
        data: batches, as for `hvpopt.operators.CurvatureOperator`. Random numbers are those of an
            operator that is made in the same random state.
        num_terms: as there.
    """

    def __init__(
        self,
        loss: Callable[[Any], Tensor],
        params: TensorList,
        data: Iterable[Any],
        num_terms: NumTerms,
    ) -> None:
        self._loss, self._params, self._num_terms = loss, params, num_terms
        self._batches = Batches(data, params)
        self._runs = Batches((), params)  # apart, so that reading data need not isolate modules
        self._terms: list[Found] = []
        self._are_apart: bool | None = None

    def __call__(self) -> Tensor:
        """The mean loss, a scalar of float64 (of float32 where the device has no other)."""
        if self._are_apart is None:
            found = self._mean(self._guarded)
            self._are_apart = torch.equal(found, self._together())
            return found
        return self._together() if self._are_apart else self._mean(self._guarded)

    def _together(self) -> Tensor:
        with self._runs.seeded(0):
            return self._mean(lambda _, batch: self._value(batch))

    def _guarded(self, index: int, batch: Any) -> Tensor:
        with self._runs.seeded(index):
            if index < len(self._terms):
                return self._value(batch)
            with Reduction() as reduction, torch.enable_grad():
                value = self._loss(batch)
            self._terms.append(self._count(batch, reduction, value))
            return value.detach()

    def _value(self, batch: Any) -> Tensor:
        with torch.enable_grad():  # which inference inside the loss may need
            return self._loss(batch).detach()

    def _mean(self, value: Callable[[int, Any], Tensor]) -> Tensor:
        device = self._params[0].device
        wide = torch.float32 if device.type == "mps" else torch.float64
        mean = WeightedMean([torch.zeros((), dtype=wide, device=device)])
        with torch.inference_mode(False), closing(self._batches.passes("losses")) as batches:
            for index, batch in batches:
                mean.add([value(index, batch).to(wide)], self._terms[index])
        return mean.result()[0]

    def _count(self, batch: Any, reduction: Reduction, value: Tensor) -> Found:
        if self._num_terms is None:
            try:
                return reduction.terms(value)
            except UnknownReductionError as error:  # of no consequence for a single batch
                return error.with_traceback(None)
        if self._num_terms == "sum":
            return TermCount("sum", 1.0)
        return TermCount("mean", float(self._num_terms(batch)))
