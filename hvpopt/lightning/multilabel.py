"""What multi-label data modules share: splits in memory, standardised features, loaders."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from dataclasses import dataclass

import lightning
import torch
from torch import Tensor

from hvpopt.lightning.batches import Batches
from hvpopt.options import check_count

__all__ = ["MultiLabelData", "Rows"]


@dataclass(frozen=True)
class Rows:
    """Examples with several labels each."""

    features: Tensor
    """`float32[N, D]`."""
    labels: Tensor
    """`float32[N, L]`, zeros and ones."""

    def __getitem__(self, index: Tensor | slice) -> Rows:
        return Rows(self.features[index], self.labels[index])

    def __len__(self) -> int:
        return len(self.features)


class MultiLabelData(lightning.LightningDataModule):
    """Features `float32[B, D]` and labels `float32[B, L]` of zeros and ones, kept in memory.

    Subclasses load the splits in `_load` and set `label_names`. Labels that no training row has
    are warned of by name, once: no method can learn them.

    Args:
        batch_size: rows a training batch.
        eval_batch_size: rows a batch in validation and test.
        seed: decides the order of the training batches.
        num_train: train on this many rows only.
        standardize: shift and scale each feature to mean 0 and standard deviation 1 on the
            training rows (features that do not vary there are only shifted).

    Raises:
        ValueError: if a size or the seed is out of range.
    """

    label_names: tuple[str, ...]

    def __init__(
        self,
        batch_size: int,
        *,
        eval_batch_size: int,
        seed: int,
        num_train: int | None = None,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        self.batch_size = check_count("batch_size", batch_size)
        self.eval_batch_size = check_count("eval_batch_size", eval_batch_size)
        self.num_train = None if num_train is None else check_count("num_train", num_train)
        self.seed = check_seed("seed", seed)
        self.standardize = standardize
        self._splits: dict[str, Rows] = {}

    @abstractmethod
    def _load(self) -> dict[str, Rows]:
        """The splits train, val and test."""

    def setup(self, stage: str | None = None) -> None:
        """Loads and splits the data, once."""
        if self._splits:
            return
        splits = self._load()
        if self.num_train is not None:
            if self.num_train > len(splits["train"]):
                raise ValueError(
                    f"num_train={self.num_train} is more than the {len(splits['train'])} training "
                    f"rows of {type(self).__name__}."
                )
            splits["train"] = splits["train"][: self.num_train]
        _warn_of_absent_labels(splits["train"].labels, self.label_names)
        self._splits = _standardized(splits) if self.standardize else splits

    def train_dataloader(self) -> Batches:
        """The training rows, in a new order every epoch."""
        # Trainer(overfit_batches=...) means the same batches every epoch.
        return self._batches("train", not getattr(self.trainer, "overfit_batches", 0))

    def val_dataloader(self) -> Batches:
        """The validation rows, in order."""
        return self._batches("val", False)

    def test_dataloader(self) -> Batches:
        """The test rows, in order."""
        return self._batches("test", False)

    def predict_dataloader(self) -> Batches:
        """The test rows, in order."""
        return self._batches("test", False)

    def _batches(self, split: str, shuffle: bool) -> Batches:
        self.setup()
        rows = self._splits[split]
        return Batches(
            rows.features,
            rows.labels,
            self.batch_size if split == "train" else self.eval_batch_size,
            shuffle=shuffle,
            seed=self.seed,
            num_replicas=1 if self.trainer is None else self.trainer.world_size,
            rank=0 if self.trainer is None else self.trainer.global_rank,
        )


def split_rows(rows: Rows, num_val: int, seed: int) -> tuple[Rows, Rows]:
    """Training and validation rows of a random split that depends on its seed only.

    Raises:
        ValueError: if nothing is left for training.
    """
    if num_val >= len(rows):
        raise ValueError(
            f"num_val={num_val} leaves nothing for training: there are {len(rows)} rows for both."
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[num_val:]], rows[order[:num_val]]


def check_seed(name: str, value: int) -> int:
    """`value`, if it is an integer that seeds a generator.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32:
        raise ValueError(f"{name}={value!r} is no seed: expected an integer from 0 to 2**32 - 1.")
    return value


def _standardized(splits: dict[str, Rows]) -> dict[str, Rows]:
    train = splits["train"].features
    mean, deviation = train.mean(0), train.std(0, correction=0)
    deviation = torch.where(deviation > 0, deviation, 1.0)
    return {
        name: Rows((rows.features - mean) / deviation, rows.labels) for name, rows in splits.items()
    }


def _warn_of_absent_labels(labels: Tensor, names: tuple[str, ...]) -> None:
    absent = [names[i] for i in (labels.sum(0) == 0).nonzero().flatten().tolist()]
    if absent:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        warnings.warn(
            f"No training row has the label {', '.join(map(repr, absent[:5]))}{more}: nothing can "
            f"be learned of it. Train on more rows, or take another split.",
            stacklevel=2,
        )
