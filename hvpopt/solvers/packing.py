"""Lists of tensors as one vector, so that a solver's arithmetic is a few calls."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from hvpopt.solvers.result import Iterate, Solution
from hvpopt.trees import TensorList

Map = Callable[[TensorList], TensorList]
S = TypeVar("S", bound=Solution)


class Packing:
    """How lists shaped like one of them become lists of one vector, and back.

    A list whose tensors differ in dtype or device stays as it is.

    Args:
        like: gives shapes, dtypes and devices.
    """

    def __init__(self, like: TensorList) -> None:
        self._shapes = [x.shape for x in like]
        self._sizes = [x.numel() for x in like]
        self._is_used = len(like) > 1 and len({(x.dtype, x.device) for x in like}) == 1

    def pack(self, xs: Sequence[Tensor]) -> TensorList:
        """The list as one vector, copied."""
        return [torch.cat([x.reshape(-1) for x in xs])] if self._is_used else list(xs)

    def unpack(self, packed: TensorList) -> TensorList:
        """The list whose tensors are views of the vector."""
        if not self._is_used:
            return packed
        parts = packed[0].split(self._sizes)
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def map(self, f: Map) -> Map:
        """``f`` on packed lists."""
        return lambda v: self.pack(f(self.unpack(v)))

    def solution(self, packed: S) -> S:
        """A solution with its vectors unpacked."""
        direction = packed.direction
        return replace(
            packed,
            value=self.unpack(packed.value),
            direction=None if direction is None else self.unpack(direction),
            iterates=tuple(
                Iterate(i.num_steps, i.model_value, self.unpack(i.value)) for i in packed.iterates
            ),
        )
