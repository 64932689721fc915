"""Digits of which a part is known, as a Lightning data module."""

from collections.abc import Iterator

import torch
from torch import Tensor

from hvpopt.lightning.batches import Batches
from hvpopt.lightning.data import Digits
from hvpopt.options import check_count

from .questions import QUESTIONS, QuestionName

_SEED_STRIDE = 1_000_003


class KnownParts(Batches):
    """Batches `(view[B, 2, 8, 8], images[B, 1, 8, 8])` of a question about each image.

    What is known of an image is a function of the seed, the epoch (`set_epoch`) and the image's
    place in the data, and does not depend on the batches nor on the rank.

    Args:
        images: `[N, 1, 8, 8]`.
        question: what is known.
        batch_size: images a batch.
        times: how often an epoch asks about each image.
        shuffle: a new order every epoch, and other pixels known.
        seed: of orders and questions.
        num_replicas, rank: the data-parallel world.
    """

    def __init__(
        self,
        images: Tensor,
        question: QuestionName,
        batch_size: int,
        *,
        times: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(
            torch.arange(times * len(images)),
            images.repeat(times, 1, 1, 1),
            batch_size,
            shuffle=shuffle,
            seed=seed,
            num_replicas=num_replicas,
            rank=rank,
        )
        self.question = QUESTIONS[question]
        self.seed = seed
        self.is_renewed = shuffle

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = getattr(self.sampler, "epoch", 0) if self.is_renewed else 0
        generator = torch.Generator().manual_seed(self.seed * _SEED_STRIDE + epoch)
        views = self.question.view(self.targets, generator)
        for indices, images in super().__iter__():
            yield views[indices], images


class PartlyKnownDigits(Digits):
    """Scikit-learn's digits, of which the images are the targets and a part of each is known.

    The inputs are what `Question.view` shows, two images: the pixels known, with zeros elsewhere,
    and which they are. Training asks anew every epoch; validation and test ask once, the same
    questions whatever the seed.

    Args:
        question: what is known.
        times: how often an epoch of training asks about each image.
        batch_size, eval_batch_size, split_seed, seed, num_train: as of
            `hvpopt.lightning.data.Digits`.

    Raises:
        ValueError: for an unknown question, or a size or seed out of range.
    """

    image_shape = (2, 8, 8)

    def __init__(
        self,
        question: QuestionName = "pixels",
        *,
        times: int = 10,
        batch_size: int = 128,
        eval_batch_size: int = 512,
        split_seed: int = 0,
        seed: int = 0,
        num_train: int | None = None,
    ) -> None:
        super().__init__(
            batch_size,
            split_seed=split_seed,
            seed=seed,
            num_train=num_train,
            eval_batch_size=eval_batch_size,
        )
        if question not in QUESTIONS:
            raise ValueError(
                f"question={question!r} is unknown; expected one of {', '.join(QUESTIONS)}."
            )
        self.question: QuestionName = question
        self.times = check_count("times", times)

    def images(self, split: str) -> Tensor:
        """The images `[N, 1, 8, 8]` of "train", "val" or "test", in order."""
        self.setup()
        return self._splits[split][0]

    def labels(self, split: str) -> Tensor:
        """Their classes `[N]`."""
        self.setup()
        return self._splits[split][1]

    def _batches(self, split: str, batch_size: int, shuffle: bool) -> KnownParts:
        return KnownParts(
            self.images(split),
            self.question,
            batch_size,
            times=self.times if split == "train" else 1,
            shuffle=shuffle,
            seed=self.seed if split == "train" else 0,
            num_replicas=1 if self.trainer is None else self.trainer.world_size,
            rank=0 if self.trainer is None else self.trainer.global_rank,
        )
