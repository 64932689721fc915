"""Lists of tensors as flat vectors that are wide enough for inner products."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hvpopt.trees import TensorList


class Flat:
    """How lists shaped like one of them become flat vectors, and back.

    Flat vectors are float64 where any tensor is, else float32, on the first tensor's device.
    Bases of many vectors are matrices of them, so that an orthogonalisation is a few
    matrix-vector products instead of dozens of small operations for each vector.

    Args:
        like: gives shapes, dtypes and devices.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        self.like = list(like)
        wide = any(x.dtype == torch.float64 for x in self.like)
        self.dtype = torch.float64 if wide else torch.float32
        self.device = self.like[0].device
        self._sizes = [x.numel() for x in self.like]
        self.n = sum(self._sizes)

    def flat(self, xs: Sequence[Tensor]) -> Tensor:
        """A list as a new vector (n,)."""
        return torch.cat([x.reshape(-1).to(self.device, self.dtype) for x in xs])

    def listed(self, flat: Tensor) -> TensorList:
        """A vector (n,) as a new list of the shapes, dtypes and devices of ``like``."""
        return [
            part.reshape(x.shape).to(x.device, x.dtype, copy=True)
            for part, x in zip(flat.split(self._sizes), self.like, strict=True)
        ]

    def rows(self, xs: Sequence[Tensor]) -> Tensor:
        """k vectors along the tensors' leading axes as the rows of a matrix (k, n)."""
        parts = [x.reshape(len(x), -1).to(self.device, self.dtype) for x in xs]
        return torch.cat(parts, dim=1)

    def stacked(self, rows: Tensor) -> TensorList:
        """The rows of (k, n) as tensors (k, *shape) of the dtypes and devices of ``like``."""
        return [
            part.reshape(len(rows), *x.shape).to(x.device, x.dtype)
            for part, x in zip(rows.split(self._sizes, dim=1), self.like, strict=True)
        ]
