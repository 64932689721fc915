"""The ranks that train one module together, and averages over them."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hvpopt.trees import TensorList

FSDP = (
    "The module is sharded by FSDP, whose parameters support neither forward-mode tangents nor "
    "double backward: train with strategy='ddp', or on one device."
)


class ShardedModuleError(RuntimeError):
    """Raised where parameters are sharded over ranks."""


def check_not_sharded(things: Iterable[object]) -> None:
    """Raises `ShardedModuleError` where a module or parameter is FSDP's.

    Args:
        things: modules and parameters.
    """
    for thing in things:
        names = {c.__name__ for c in type(thing).__mro__}
        if names & {"FullyShardedDataParallel", "FSDPModule", "FlatParameter", "DTensor"}:
            raise ShardedModuleError(FSDP)


class Ranks:
    """The process group of a module under ``DistributedDataParallel``; of one rank else."""

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self._group: Any = None
        self._size = 1
        for module in modules:
            if isinstance(module, DistributedDataParallel):
                self._group = module.process_group
                self._size = torch.distributed.get_world_size(self._group)

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self._size

    def average(self, tensors: Sequence[Tensor]) -> TensorList:
        """The mean of each tensor over the ranks, by one collective on one flat buffer."""
        if self._size == 1:
            return list(tensors)
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        flat = torch.cat([t.detach().reshape(-1).to(dtype) for t in tensors])
        torch.distributed.all_reduce(flat, group=self._group)
        parts = flat.div_(self._size).split([t.numel() for t in tensors])
        return [part.view_as(t).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]
