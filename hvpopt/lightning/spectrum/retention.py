"""Whether the graphs of all batches can be kept from product to product."""

from collections.abc import Callable, Iterable, Sized
from contextlib import closing
from typing import Any

from hvpopt import trees
from hvpopt.lightning.cost import peak_bytes
from hvpopt.operators import CurvatureOperator
from hvpopt.operators.data import Batches
from hvpopt.trees import TensorList

MOST_BYTES = 2**30
"""What graphs may take that nobody asked for."""


def fits(
    operator_of: Callable[[list[Any]], CurvatureOperator], params: TensorList, data: Iterable[Any]
) -> bool:
    """Whether the graphs of all batches take at most 1 GiB, as a product on the first one tells.

    Args:
        operator_of: makes the operator over some batches.
        params: of the loss.
        data: all batches.
    """
    device = params[0].device
    if not isinstance(data, Sized) or device.type not in ("cpu", "cuda"):
        return False
    if len(data) == 1:
        return True
    if sum(p.nbytes for p in params) * len(data) > MOST_BYTES:
        return False
    with closing(Batches(data, params).passes("graphs")) as batches:
        batch = next(batches, None)
    if batch is None:
        return False
    with operator_of([batch[1]]) as first:
        v = trees.zeros_like(params)
        return peak_bytes(lambda: first.matvec(v), device) * len(data) <= MOST_BYTES
