"""The check of products in float64, where rounding hides it in the module's own precision."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hvpopt.engines.choice import EngineChoice, EngineName
from hvpopt.lightning.attachment import attached
from hvpopt.lightning.doctor.looking import messages, oracle_of
from hvpopt.lightning.doctor.subject import Differences, Subject, differences, distance
from hvpopt.trees import TensorList

_EXACT: tuple[EngineName, ...] = ("graph", "dual")


@dataclass(frozen=True)
class DoubleCheck:
    """Products in float64 beside differences of gradients in float64."""

    reference: Differences
    """H v by the differences, rounded to the parameters' own types."""
    errors: dict[str, float]
    """‖Hv − reference‖ / ‖reference‖ of each engine that has products in float64."""


def check_in_double(
    subject: Subject, of_batch: Callable[[Any], Tensor | None], batch: Any, v: TensorList
) -> DoubleCheck:
    """The check in float64; the module is afterwards what it was.

    Args:
        subject: what is examined, in its own precision.
        of_batch: from a batch to the loss.
        batch: on the module's device.
        v: the direction.

    Raises:
        Exception: whatever a module raises that does not run in float64.
    """
    module, trainer = subject.module, subject.trainer
    dtypes = [p.dtype for p in subject.params]
    with attached(module, trainer), _double_by_default():
        module.double()
        wide = pytree.tree_map_only(Tensor, _double, batch)
        loss = partial(of_batch, wide)
        precise = Subject(module, trainer, subject.params, loss, subject.optimizers)
        w = [x.double() for x in v]
        found = differences(precise, w)
        errors: dict[str, float] = {}
        for engine in _EXACT:
            with messages(), suppress(Exception):  # of which the engines' findings tell
                with oracle_of(precise, EngineChoice(engine)) as oracle:
                    errors[engine] = distance(oracle.trace_along(w)[2], found.product)
    product = [x.to(dtype) for x, dtype in zip(found.product, dtypes, strict=True)]
    return DoubleCheck(Differences(product, found.error), errors)


@contextmanager
def _double_by_default() -> Iterator[None]:
    """While active, new tensors are of float64 where nothing else is said."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x
