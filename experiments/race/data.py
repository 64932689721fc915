"""The data of the tasks, through hvpopt's data modules, loaded once for all contestants."""

import functools
from pathlib import Path

import lightning
import torch
from torch import Tensor

from hvpopt.lightning.data import Digits, FashionMNIST


@functools.cache
def digits(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images ``[N, 1, 8, 8]`` and labels ``[N]`` of scikit-learn's digits: training, then test."""
    module = Digits(batch_size=10_000, eval_batch_size=10_000)
    train, test = next(iter(module.train_dataloader())), next(iter(module.test_dataloader()))
    images, labels, test_images, test_labels = (x.to(device) for x in (*train, *test))
    return images, labels, test_images, test_labels


@functools.cache
def fashion_mnist(
    num_images: int, root: str | Path | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Images ``[N, 1, 28, 28]`` in [0, 1] and labels ``[N]`` of Fashion-MNIST's training part.

    Raises:
        ValueError: for more images than there are.
        FileNotFoundError: where the data are neither on this machine nor to be had.
    """
    try:
        module = FashionMNIST(batch_size=num_images, root=root, num_val=10, num_train=num_images)
        images, labels = next(iter(_loader(module)))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The race needs Fashion-MNIST: {error} In a race the folder is race.task.root=DIR."
        ) from error
    return images.to(device), labels.to(device)


def _loader(module: lightning.LightningDataModule) -> torch.utils.data.DataLoader:
    return module.train_dataloader()
