"""How the losses of batches combine to that of all data, where their call does not say it."""

import math
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from hvpopt.lightning.monitors.batches import num_rows
from hvpopt.lightning.spectrum.losses import Losses
from hvpopt.lightning.spectrum.settings import Weights
from hvpopt.operators import UnknownReductionError
from hvpopt.operators.data import Batches, split_batch
from hvpopt.operators.points import NumTerms
from hvpopt.trees import TensorList

Loss = Callable[[Any], Tensor]

_RTOL = 1e-4


@dataclass(frozen=True)
class Weighing:
    """How the losses of batches combine."""

    num_terms: NumTerms
    """As for `hvpopt.operators.CurvatureOperator`."""
    text: str
    """The same for readers."""


def weighing(kind: Weights, loss: Loss, params: TensorList, data: Iterable[Any]) -> Weighing:
    """How the losses of the data's batches combine.

    With "auto" as the call of torch's loss function says; where it does not say it, as the loss of
    a batch stands to those of its two parts: a mean over the examples, or a sum. Where it is
    neither, batches count by their examples, as Lightning weighs what modules log.

    Args:
        kind: "auto", "examples" or "sum".
        loss: from a batch to a scalar.
        params: of the loss.
        data: batches.

    Raises:
        UnknownReductionError: where batches have no rows by which to count.
    """
    if kind == "sum":
        return _SUM
    if kind == "examples":
        return _EXAMPLES
    try:
        Losses(loss, params, data, None)()
    except UnknownReductionError as error:
        return _found_by_parts(loss, params, data, error)
    return _BY_CALL


def _examples(batch: Any) -> float:
    rows = num_rows(batch)
    if rows is None:
        raise UnknownReductionError(
            f"The batch, a {type(batch).__name__}, holds no tensor whose rows are its examples: "
            "choose weights='sum' (task.weights=sum), or a loss function of torch.nn.functional."
        )
    return float(rows)


_BY_CALL = Weighing(None, "weighed by the terms that torch's loss function averages")
_EXAMPLES = Weighing(_examples, "weighed by their examples")
_SUM = Weighing("sum", "added up")


def _found_by_parts(
    loss: Loss, params: TensorList, data: Iterable[Any], error: UnknownReductionError
) -> Weighing:
    """What the first batch says, in comparison with its parts."""
    with closing(Batches(data, params).passes("weights")) as batches:
        batch = next(batches)[1]
    if num_rows(batch) is None:
        raise error
    whole, parts = _values(loss, params, batch)
    if not parts:
        return _EXAMPLES
    bound = _RTOL * (abs(whole) + sum(abs(value) for _, value in parts))
    mean = sum(n * value for n, value in parts) / sum(n for n, _ in parts)
    if abs(whole - mean) <= bound:
        return replace(_EXAMPLES, text=f"{_EXAMPLES.text}, over which they are means")
    if abs(whole - sum(value for _, value in parts)) <= bound:
        return replace(_SUM, text=f"{_SUM.text}, as they are sums over examples")
    return replace(_EXAMPLES, text=f"{_EXAMPLES.text}, though they are no plain means over them")


def _values(loss: Loss, params: TensorList, batch: Any) -> tuple[float, list[tuple[float, float]]]:
    """The loss of a batch; rows and loss of two parts, none where it cannot be taken apart."""

    def value(batch: Any) -> float:
        return float(Losses(loss, params, [batch], None)())

    whole = value(batch)
    try:
        parts = split_batch(batch, math.ceil(2 * _examples(batch) / 3))  # of different sizes
        return whole, [(_examples(part), value(part)) for part in parts if len(parts) == 2]
    except Exception:  # batches of other kinds, losses that want theirs whole
        return whole, []
