"""A loss over a dataset: its mean, its gradient, and its products, batch by batch."""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hvpopt.engines.choice import EngineChoice
from hvpopt.engines.split import Curvature, curvature_name
from hvpopt.likelihoods import MonteCarlo
from hvpopt.operators.data import Batches
from hvpopt.operators.means import WeightedMean, num_ranks
from hvpopt.operators.points import BatchLoss, BatchPoint, NumTerms
from hvpopt.trees import TensorList

_APART = 1_000_000_007  # between the seeds of batches


class DatasetLoss:
    """The loss over all batches, of all ranks, as a function of some parameters.

    Args:
        loss: from a batch to a scalar.
        params: what to differentiate by.
        batches: the data.
        curvature: of what the products are.
        choice: of the engine, one for all batches.
        num_terms: as in `CurvatureOperator`.
        keep: whether the graphs of all batches are kept from one product to the next.
        over_ranks: whether to sum over the processes of ``torch.distributed``.
    """

    def __init__(
        self,
        loss: Callable[[Any], Any],
        params: TensorList,
        batches: Batches,
        *,
        curvature: Curvature,
        choice: EngineChoice,
        num_terms: NumTerms,
        keep: bool,
        over_ranks: bool,
    ) -> None:
        self.params, self.curvature = params, curvature
        self._loss, self._batches = loss, batches
        self._choice, self._num_terms = choice, num_terms
        self._keep, self._over_ranks = keep, over_ranks
        self._kept: list[BatchPoint] = []
        self._stamp: tuple[object, ...] = ()

    def restricted(self, params: TensorList) -> "DatasetLoss":
        """The same loss as a function of some of the parameters."""
        return DatasetLoss(
            self._loss,
            params,
            self._batches,
            curvature=self.curvature,
            choice=self._choice,
            num_terms=self._num_terms,
            keep=self._keep,
            over_ranks=self._over_ranks,
        )

    def close(self) -> None:
        """Releases the graphs that were kept."""
        for point in self._kept:
            point.close()
        self._kept.clear()

    def loss(self) -> Tensor:
        """The mean loss, a scalar of the widest of its dtype, the parameters' and float32."""
        dtype = torch.promote_types(self.params[0].dtype, torch.float32)

        def visit(point: BatchPoint) -> TensorList:
            nonlocal dtype
            value = point.loss()
            dtype = torch.promote_types(dtype, value.dtype)
            return [value]

        # one dtype on all ranks, whatever the losses have
        wide = torch.float32 if self.params[0].device.type == "mps" else torch.float64
        like = [self.params[0].new_zeros((), dtype=wide)]
        return self._mean(visit, like, "loss")[0].to(dtype)

    def gradient(self) -> TensorList:
        """Its gradient."""
        return self._mean(BatchPoint.gradient, self.params, "gradient")

    def product(self, v: TensorList) -> TensorList:
        """The curvature's product with a vector."""
        return self._mean(lambda point: point.products([v])[0], self.params, self._title)

    def products(self, vs: TensorList) -> TensorList:
        """The products with k vectors along a leading axis, each batch traced once."""

        def visit(point: BatchPoint) -> TensorList:
            results = point.products([[x[i] for x in vs] for i in range(len(vs[0]))])
            return [torch.stack(xs) for xs in zip(*results, strict=True)]

        return self._mean(visit, vs, self._title)

    @property
    def _title(self) -> str:
        return f"{curvature_name(self.curvature)} products"

    def _mean(
        self, visit: Callable[[BatchPoint], TensorList], like: TensorList, what: str
    ) -> TensorList:
        mean = WeightedMean(like)
        error: Exception | None = None
        across = self._over_ranks and num_ranks() > 1
        with torch.inference_mode(False):
            try:
                with closing(self._points(what)) as points:
                    for point in points:
                        mean.add(visit(point), point.terms)
            except Exception as raised:
                if not across:
                    raise
                error = raised
            return mean.over_ranks(error) if across else mean.result()

    def _points(self, what: str) -> Generator[BatchPoint, None, None]:
        """Each batch at the current parameters."""
        if self._kept and not self._is_fresh():
            self.close()
        if self._kept:
            yield from self._kept
            return
        self._stamp = self._batches.stamp() if self._keep else ()
        try:
            with closing(self._batches.passes(what)) as batches:
                for index, batch in batches:
                    point = self._point(index, batch)
                    self._kept.append(point)
                    yield point
                    if not self._keep:
                        self.close()
        except BaseException:  # also where the consumer stops halfway
            self.close()
            raise

    def _point(self, index: int, batch: Any) -> BatchPoint:
        closure = BatchLoss(self._loss, batch, self._num_terms)
        curvature = self.curvature
        if isinstance(curvature, MonteCarlo):  # the batches' labels are sampled independently
            # far apart, as neighbouring seeds are taken for independent matrices
            curvature = replace(curvature, seed=curvature.seed + _APART * index)
        with self._batches.seeded(index):  # the point starts every run from this state
            return BatchPoint(closure, self.params, curvature, self._choice, keep=self._keep)

    def _is_fresh(self) -> bool:
        return self._stamp == self._batches.stamp() and all(p.is_fresh for p in self._kept)
