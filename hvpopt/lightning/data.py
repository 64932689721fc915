"""Lightning data modules: scikit-learn's digits and Fashion-MNIST, both kept in memory."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

import lightning
import torch
from torch import Tensor

from hvpopt.lightning.batches import Batches
from hvpopt.lightning.fashion_mnist import find_files, load_from_files, load_from_openml

__all__ = ["Digits", "FashionMNIST"]

_Split = tuple[Tensor, Tensor]


class _InMemoryImages(lightning.LightningDataModule):
    """What the data modules share: checked arguments, one load, three loaders.

    Subclasses set `image_shape` and `num_classes` and load the splits in `_load`.
    """

    image_shape: tuple[int, int, int]
    num_classes: int

    def __init__(
        self,
        batch_size: int,
        eval_batch_size: int,
        split_seed: int,
        seed: int,
        num_train: int | None,
    ) -> None:
        super().__init__()
        self.batch_size = _at_least_one("batch_size", batch_size)
        self.eval_batch_size = _at_least_one("eval_batch_size", eval_batch_size)
        self.split_seed = _seed("split_seed", split_seed)
        self.seed = _seed("seed", seed)
        self.num_train = None if num_train is None else _at_least_one("num_train", num_train)
        self._splits: dict[str, _Split] = {}

    @abstractmethod
    def _load(self) -> dict[str, _Split]:
        """The splits train, val and test."""

    def setup(self, stage: str | None = None) -> None:
        """Loads and splits the data, once."""
        if self._splits:
            return
        splits = self._load()
        images, labels = splits["train"]
        if self.num_train is not None:
            if self.num_train > len(images):
                raise ValueError(
                    f"num_train={self.num_train} is more than the {len(images)} training images "
                    f"of {type(self).__name__}."
                )
            splits["train"] = images[: self.num_train], labels[: self.num_train]
        self._splits = splits

    def train_dataloader(self) -> Batches:
        """The training images, in a new order every epoch."""
        # Trainer(overfit_batches=...) means the same batches every epoch.
        shuffle = not getattr(self.trainer, "overfit_batches", 0)
        return self._batches("train", self.batch_size, shuffle)

    def val_dataloader(self) -> Batches:
        """The validation images, in order."""
        return self._batches("val", self.eval_batch_size, shuffle=False)

    def test_dataloader(self) -> Batches:
        """The test images, in order."""
        return self._batches("test", self.eval_batch_size, shuffle=False)

    def _batches(self, split: str, batch_size: int, shuffle: bool) -> Batches:
        self.setup()
        images, labels = self._splits[split]
        return Batches(
            images,
            labels,
            batch_size,
            shuffle=shuffle,
            seed=self.seed,
            num_replicas=1 if self.trainer is None else self.trainer.world_size,
            rank=0 if self.trainer is None else self.trainer.global_rank,
        )


class Digits(_InMemoryImages):
    """Scikit-learn's 1797 handwritten digits, images `[1, 8, 8]` in [0, 1], labels 0 to 9.

    They come inside scikit-learn, nothing is downloaded. The split is random and stratified by
    class with a seed of its own: the file's last rows come from other writers, and runs with
    different seeds share their test images.

    Args:
        batch_size: images a training batch.
        val_fraction, test_fraction: parts of the 1797 images; the rest is for training.
        split_seed: decides who is in which part.
        seed: decides the order of the batches; the data set's part of a run's seed.
        num_train: train on this many images only.
        eval_batch_size: images a batch in validation and test.

    Raises:
        ValueError: if a fraction is not in (0, 1), both leave nothing for training, or a size or
            seed is out of range.
    """

    image_shape = (1, 8, 8)
    num_classes = 10

    def __init__(
        self,
        batch_size: int = 128,
        *,
        val_fraction: float = 0.15,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        seed: int = 0,
        num_train: int | None = None,
        eval_batch_size: int = 512,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, split_seed, seed, num_train)
        self.val_fraction = _fraction("val_fraction", val_fraction)
        self.test_fraction = _fraction("test_fraction", test_fraction)
        if val_fraction + test_fraction >= 1:
            raise ValueError(
                f"val_fraction={val_fraction} and test_fraction={test_fraction} leave nothing for "
                f"training: their sum must be below 1."
            )

    def _load(self) -> dict[str, _Split]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        labels = torch.tensor(digits.target, dtype=torch.long)
        num_test = round(self.test_fraction * len(labels))
        num_val = round(self.val_fraction * len(labels))
        rest, test = _stratified_split(labels, num_test, self.split_seed)
        train, val = _stratified_split(labels[rest], num_val, self.split_seed)
        indices = {"train": rest[train], "val": rest[val], "test": test}
        return {name: (images[index], labels[index]) for name, index in indices.items()}


class FashionMNIST(_InMemoryImages):
    """Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747): 70000 images `[1, 28, 28]` in [0, 1].

    The last 10000 are the test images; of the first 60000, `num_val` are kept for validation,
    stratified by class.

    Args:
        batch_size: images a training batch.
        root: a folder with the four IDX files, gzipped or not. None looks for Debian's package
            dataset-fashion-mnist, then fetches the data from OpenML (cached by scikit-learn).
        num_val: images kept for validation.
        split_seed: decides which.
        seed: decides the order of the batches; the data set's part of a run's seed.
        num_train: train on this many images only.
        eval_batch_size: images a batch in validation and test.

    Raises:
        FileNotFoundError: if `root` lacks one of the files; when the data is prepared, if it is
            nowhere to be had. Names what was looked for and the remedies.
        ValueError: if a size or seed is out of range.
    """

    image_shape = (1, 28, 28)
    num_classes = 10

    def __init__(
        self,
        batch_size: int = 512,
        *,
        root: str | Path | None = None,
        num_val: int = 5000,
        split_seed: int = 0,
        seed: int = 0,
        num_train: int | None = None,
        eval_batch_size: int = 1000,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, split_seed, seed, num_train)
        self.num_val = _at_least_one("num_val", num_val)
        self.files = find_files(root)

    def prepare_data(self) -> None:
        """Fetches the data from OpenML into scikit-learn's cache if there are no files."""
        if self.files is None:
            load_from_openml()

    def _load(self) -> dict[str, _Split]:
        arrays = load_from_openml() if self.files is None else load_from_files(self.files)
        images, labels = arrays["train"]
        if self.num_val >= len(labels):
            raise ValueError(
                f"num_val={self.num_val} leaves nothing for training: there are {len(labels)} "
                f"images for both."
            )
        train, val = _stratified_split(labels, self.num_val, self.split_seed)
        splits = {"train": (images[train], labels[train]), "val": (images[val], labels[val])}
        splits["test"] = arrays["test"]
        return {name: (_pixels(images), labels) for name, (images, labels) in splits.items()}


def _pixels(images: Tensor) -> Tensor:
    return images.unsqueeze(1).float() / 255


def _stratified_split(labels: Tensor, num_second: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of a random split in two that keeps the share of each class."""
    from sklearn.model_selection import train_test_split

    first, second = train_test_split(
        torch.arange(len(labels)).numpy(),
        test_size=num_second,
        stratify=labels.numpy(),
        random_state=seed,
    )
    return torch.from_numpy(first), torch.from_numpy(second)


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
    return value


def _fraction(name: str, value: float) -> float:
    if not 0 < value < 1:
        raise ValueError(f"{name} must be between 0 and 1 (a part of the images), got {value}.")
    return value


def _seed(name: str, value: int) -> int:
    if not 0 <= value < 2**32:
        raise ValueError(f"{name} must be an integer from 0 to 2**32 - 1, got {value}.")
    return value
