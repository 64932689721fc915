"""Batches of a data set that fits in memory, without worker processes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from torch.utils.data.distributed import DistributedSampler

__all__ = ["Batches"]

# DistributedSampler shuffles with seed + epoch; a stride keeps neighbouring seeds from
# sharing their orders (epoch 1 of seed 0 is not epoch 0 of seed 1).
_SEED_STRIDE = 1_000_003


class Batches:
    """An iterable of batches `(inputs[B, ...], targets[B, ...])`, one indexing operation each.

    The order is a pure function of the seed and the epoch (`set_epoch`, which Lightning calls), so
    that a resumed run sees the batches of the uninterrupted one, and iterating leaves the global
    random state alone. Under data parallelism each rank gets its own part of every epoch; the
    parts are of equal size, filled up with samples from the start (as in `DistributedSampler`).

    Args:
        inputs: `[N, ...]`.
        targets: `[N, ...]`.
        batch_size: samples a batch and rank; the last batch of an epoch may be smaller.
        shuffle: a new order every epoch; otherwise the order of the data.
        seed: what the orders derive from.
        num_replicas, rank: the data-parallel world.

    Raises:
        ValueError: if inputs and targets differ in length, or there are none.

    Example:
        >>> batches = Batches(torch.arange(5.0), torch.arange(5), batch_size=2)
        >>> [targets.tolist() for _, targets in batches]
        [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        if len(inputs) != len(targets) or len(inputs) == 0:
            raise ValueError(
                f"Batches needs as many inputs as targets and at least one, "
                f"got {len(inputs)} and {len(targets)}."
            )
        self.inputs = inputs
        self.targets = targets
        self.batch_size = batch_size
        # `sampler` and `batch_sampler` are where Lightning looks for `set_epoch`.
        self.batch_sampler = None
        self.sampler: DistributedSampler[int] | SequentialSampler
        if shuffle or num_replicas > 1:
            self.sampler = DistributedSampler(
                range(len(inputs)),  # type: ignore[arg-type]  # only its length is used
                num_replicas=num_replicas,
                rank=rank,
                shuffle=shuffle,
                seed=seed * _SEED_STRIDE,
            )
        else:
            self.sampler = SequentialSampler(range(len(inputs)))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in torch.tensor(list(self.sampler)).split(self.batch_size):
            yield self.inputs[indices], self.targets[indices]

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch_size)
