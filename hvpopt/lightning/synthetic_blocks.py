"""Synthetic multi-label data whose labels exclude each other in blocks."""

from __future__ import annotations

import torch

from hvpopt.lightning.multilabel import MultiLabelData, Rows, check_seed
from hvpopt.options import check_count

__all__ = ["SyntheticBlocks"]


class SyntheticBlocks(MultiLabelData):
    """The synthetic data of Belanger and McCallum (2016, "Structured prediction energy networks",
    ICML): one label of each block is on.

    Features x are standard normal, scores z = A x with a standard normal matrix A, and label i is
    one where z_i is the largest of its block. What decides a label is so linear in x, but is a
    comparison with the rest of its block: a network that predicts the labels one by one needs many
    rows to learn it, an energy of the labels few.

    Args:
        batch_size: rows a training batch.
        num_features: of a row.
        num_blocks, block_size: there are `num_blocks * block_size` labels.
        num_train, num_val, num_test: rows of the splits.
        data_seed: decides A and the rows of every split; a smaller `num_train` takes the first of
            a larger one's.
        seed: decides the order of the batches; the data set's part of a run's seed.
        eval_batch_size: rows a batch in validation and test.

    Raises:
        ValueError: if a size or seed is out of range.
    """

    def __init__(
        self,
        batch_size: int = 32,
        *,
        num_features: int = 64,
        num_blocks: int = 4,
        block_size: int = 4,
        num_train: int = 1500,
        num_val: int = 500,
        num_test: int = 5000,
        data_seed: int = 0,
        seed: int = 0,
        eval_batch_size: int = 1000,
    ) -> None:
        super().__init__(batch_size, eval_batch_size=eval_batch_size, seed=seed)
        self.num_features = check_count("num_features", num_features)
        self.num_blocks = check_count("num_blocks", num_blocks)
        self.block_size = check_count("block_size", block_size)
        self.sizes = {
            "train": check_count("num_train", num_train),
            "val": check_count("num_val", num_val),
            "test": check_count("num_test", num_test),
        }
        self.data_seed = check_seed("data_seed", data_seed)
        self.label_names = tuple(
            f"block {block} label {label}"
            for block in range(num_blocks)
            for label in range(block_size)
        )

    def _load(self) -> dict[str, Rows]:
        num_labels = self.num_blocks * self.block_size
        generator = torch.Generator().manual_seed(self.data_seed)
        weights = torch.randn(self.num_features, num_labels, generator=generator)
        splits = {}
        for name in ("test", "val", "train"):  # so that a larger training set changes no other
            features = torch.randn(self.sizes[name], self.num_features, generator=generator)
            scores = (features @ weights).unflatten(1, (self.num_blocks, self.block_size))
            labels = torch.zeros_like(scores).scatter_(2, scores.argmax(2, keepdim=True), 1.0)
            splits[name] = Rows(features, labels.flatten(1))
        return splits
