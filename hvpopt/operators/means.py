"""Means over batches and ranks whose numbers of terms differ."""

from collections.abc import Iterable

import torch
from torch import Tensor, distributed

from hvpopt.engines.reduction import TermCount, UnknownReductionError
from hvpopt.trees import TensorList

Found = TermCount | UnknownReductionError


class WeightedMean:
    """The mean of batches' values, weighted by their numbers of terms; their sum for sums.

    A batch without terms (all its targets ignored) counts for nothing. Sums are accumulated in
    float32 or wider.

    Args:
        like: shapes, dtypes and device of the values.
    """

    def __init__(self, like: TensorList) -> None:
        self._like = like
        self._alone: TensorList = []
        self._total: TensorList = []
        self._first: Found | None = None
        self._count = 0
        self._weight = 0.0

    def add(self, values: TensorList, found: Found) -> None:
        """Adds a batch's values.

        Raises:
            UnknownReductionError: from the second batch on, if it is unknown how they combine.
        """
        self._count += 1
        if self._count == 1:
            self._alone, self._first = values, found
            return
        self._commit()
        self._gather(values, found)

    def result(self) -> TensorList:
        """The mean or sum.

        Raises:
            ValueError: If there was no batch, or none with terms.
        """
        if self._count == 0:
            raise ValueError("The data holds no batch; expected at least one.")
        if self._count == 1:
            return self._alone
        return self._divided(self._total, self._weight)

    def over_ranks(self, error: Exception | None) -> TensorList:
        """The mean or sum over the batches of all ranks, by one collective on one flat buffer.

        Args:
            error: what went wrong on this rank, of which the others then hear.

        Raises:
            Exception: ``error``.
            RuntimeError: If something went wrong on another rank.
            UnknownReductionError: If it is unknown how the ranks' batches combine.
            ValueError: If no rank had a batch with terms.
        """
        if error is None:
            try:
                self._commit()
            except UnknownReductionError as unknown:
                error = unknown
        terms = self._first if isinstance(self._first, TermCount) else None
        factor = 0.0 if terms is None else sum(terms.factors)
        counts = [
            self._weight,
            float(terms is not None and terms.kind == "mean"),
            float(terms is not None and terms.kind == "sum"),
            factor,
            float(error is not None),
        ]
        values = self._total or [torch.zeros_like(x, requires_grad=False) for x in self._like]
        *total, counted = _all_reduced([*values, torch.tensor(counts, dtype=_wide(self._like[0]))])
        weight, num_means, num_sums, factors, num_errors = counted.tolist()
        if error is not None:
            raise error
        if num_errors > 0:
            raise RuntimeError("The loss could not be evaluated on another rank; see its error.")
        if num_means + num_sums == 0:
            raise ValueError("The data of no rank holds a batch; expected at least one.")
        if terms is None:  # this rank had no batch
            terms = TermCount("sum" if num_sums else "mean", 1.0)
        elif num_means and num_sums:
            raise UnknownReductionError("The loss is a mean on some ranks and a sum on others.")
        elif abs(factors / (num_means + num_sums) - factor) > 1e-4 * abs(factor):
            raise UnknownReductionError(
                "The value of torch's loss function enters the loss with different factors on "
                "different ranks, so that the loss is no mean over its terms: give num_terms=."
            )
        self._first = terms
        return self._divided(total, weight)

    def _commit(self) -> None:
        """Counts the first batch with its weight, which matters once there are others."""
        if self._alone:
            alone, self._alone = self._alone, []
            assert self._first is not None
            self._gather(alone, self._first)

    def _gather(self, values: TensorList, found: Found) -> None:
        for terms in (self._first, found):
            if isinstance(terms, UnknownReductionError):
                raise terms
        assert isinstance(self._first, TermCount)
        assert isinstance(found, TermCount)
        self._first.check_joins(found)
        if not self._total:
            self._total = [torch.zeros_like(x, dtype=_wide(x), requires_grad=False) for x in values]
        if found.number > 0:
            wide = [x.to(t.dtype) for x, t in zip(values, self._total, strict=True)]
            torch._foreach_add_(self._total, wide, alpha=found.number)
            self._weight += found.number

    def _divided(self, total: Iterable[Tensor], weight: float) -> TensorList:
        assert isinstance(self._first, TermCount)
        if self._first.kind == "mean":
            if weight == 0:
                raise ValueError("The data holds no term to take the loss's mean over.")
            total = [x / weight for x in total]
        return [x.to(y.dtype) for x, y in zip(total, self._like, strict=True)]


def num_ranks() -> int:
    """How many processes share the data; 1 without ``torch.distributed``."""
    if not distributed.is_available() or not distributed.is_initialized():
        return 1
    return distributed.get_world_size()


def is_first_rank() -> bool:
    """Whether this process is the one that speaks for all."""
    return num_ranks() == 1 or distributed.get_rank() == 0


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _all_reduced(tensors: TensorList) -> TensorList:
    """Sums over the ranks, in the shapes of ``tensors``, on the first one's device."""
    wide = any(x.dtype == torch.float64 for x in tensors)
    dtype, device = torch.float64 if wide else torch.float32, tensors[0].device
    flat = torch.cat([x.detach().reshape(-1).to(device, dtype) for x in tensors])
    distributed.all_reduce(flat)
    parts = flat.split([x.numel() for x in tensors])
    return [part.view_as(x).to(x.device) for part, x in zip(parts, tensors, strict=True)]
