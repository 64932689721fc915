"""Pairs of noisy and clean images, to learn denoising from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

from hvpopt.lightning.batches import Batches
from hvpopt.lightning.data import FashionMNIST
from hvpopt.lightning.multilabel import check_seed
from hvpopt.options import check_count, check_range

__all__ = ["NoisyBatches", "NoisyFashionMNIST"]


class NoisyBatches(Batches):
    """Batches `(noisy, clean)` of another's inputs, with Gaussian noise of their own each epoch.

    The noise is a pure function of seed, epoch, rank and batch size; where the order is the same
    every epoch, so is the noise. The global generators stay as they were.

    Args:
        clean: batches whose inputs `[B, ...]` are the clean ones; their targets are not used.
        noise: standard deviation of the noise, in the inputs' units.
        seed: what the noise derives from.

    Example:
        >>> clean = Batches(torch.zeros(3, 2), torch.zeros(3), batch_size=2)
        >>> [noisy.shape for noisy, _ in NoisyBatches(clean, noise=0.1)]
        [torch.Size([2, 2]), torch.Size([1, 2])]
    """

    def __init__(self, clean: Batches, *, noise: float, seed: int = 0) -> None:
        super().__init__(clean.inputs, clean.inputs, clean.batch_size)
        self.sampler = clean.sampler
        self.noise = noise
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, rank = 0, 0
        if isinstance(self.sampler, DistributedSampler):
            epoch = self.sampler.epoch if self.sampler.shuffle else 0
            rank = self.sampler.rank
        generator = _generator(self.seed, epoch, rank)
        for clean, _ in super().__iter__():
            yield _with_noise(clean, self.noise, generator), clean


class NoisyFashionMNIST(FashionMNIST):
    """Pairs `(noisy, clean)` of Fashion-MNIST's images `[1, 28, 28]`: clean pixels are in [0, 1],
    noisy ones have Gaussian noise added, which takes some of them out of it.

    The noise of the validation and test images is always the same; training images get another
    one every epoch.

    Args:
        batch_size: images a training batch.
        noise: standard deviation of the noise, above zero.
        root: a folder with the four IDX files, as of `FashionMNIST`.
        num_val: training images kept for validation.
        num_test: how many test images are used, the first ones; None for all 10000.
        noise_seed: decides the noise of validation and test.
        split_seed: decides which images are kept for validation.
        seed: decides the order of the training batches and their noise; the data set's part of a
            run's seed.
        num_train: train on this many images only.
        eval_batch_size: images a batch in validation and test.

    Raises:
        FileNotFoundError: as `FashionMNIST`.
        ValueError: if an argument is out of range; when the data are set up, if there are fewer
            images than are asked for.
    """

    def __init__(
        self,
        batch_size: int = 4,
        *,
        noise: float = 0.2,
        root: str | Path | None = None,
        num_val: int = 500,
        num_test: int | None = 1000,
        noise_seed: int = 0,
        split_seed: int = 0,
        seed: int = 0,
        num_train: int | None = None,
        eval_batch_size: int = 100,
    ) -> None:
        super().__init__(
            batch_size,
            root=root,
            num_val=num_val,
            split_seed=split_seed,
            seed=seed,
            num_train=num_train,
            eval_batch_size=eval_batch_size,
        )
        self.noise = check_range("noise", noise, 0.0)
        if noise == 0:
            raise ValueError("noise=0 leaves nothing to remove; expected a number above 0.")
        self.num_test = None if num_test is None else check_count("num_test", num_test)
        self.noise_seed = check_seed("noise_seed", noise_seed)

    def _load(self) -> dict[str, tuple[Tensor, Tensor]]:
        clean = {name: images for name, (images, _) in super()._load().items()}
        num_test = len(clean["test"]) if self.num_test is None else self.num_test
        if num_test > len(clean["test"]):
            raise ValueError(
                f"num_test={num_test} is more than the {len(clean['test'])} test images of "
                f"Fashion-MNIST."
            )
        clean["test"] = clean["test"][:num_test]
        pairs = {"train": (clean["train"], clean["train"])}
        for number, name in enumerate(("val", "test")):
            generator = _generator(self.noise_seed, number)
            pairs[name] = _with_noise(clean[name], self.noise, generator), clean[name]
        return pairs

    def train_dataloader(self) -> NoisyBatches:
        """The training images, in a new order and with new noise every epoch."""
        return NoisyBatches(super().train_dataloader(), noise=self.noise, seed=self.seed)


def _generator(*numbers: int) -> torch.Generator:
    """A generator on the CPU whose stream no other numbers have, nor any other use of a seed."""
    (seed,) = np.random.SeedSequence(numbers).generate_state(1)
    return torch.Generator().manual_seed(int(seed))


def _with_noise(clean: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    return clean + noise * torch.randn(clean.shape, generator=generator, dtype=clean.dtype)
