"""How good completed images are."""

from typing import NamedTuple

import torch
from torch import Tensor


class Score(NamedTuple):
    """How a method answers a question about the images of a split."""

    error: float
    """Root mean square over the pixels, in [0, 1], that are not known."""
    accuracy: float
    """Percent of the completed images that a `Reader` reads rightly."""


class Reader:
    """A classifier of whole images, a support vector machine, which reads completed ones.

    Args:
        images: To learn from, (count, 1, 8, 8).
        labels: Their classes, (count,).
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        from sklearn.svm import SVC

        self._machine = SVC(gamma=0.35, C=10).fit(images.flatten(1).numpy(), labels.numpy())

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share of the images whose class is read rightly, in percent."""
        read = torch.from_numpy(self._machine.predict(images.flatten(1).numpy()))
        return 100 * float((read == labels).double().mean())

    def score(self, answer: Tensor, images: Tensor, view: Tensor, labels: Tensor) -> Score:
        """The score of completed images.

        Args:
            answer: (count, 1, 8, 8); pixels beyond [0, 1] are clamped.
            images: The right ones.
            view: What was known, (count, 2, 8, 8), of `Question.view`.
            labels: The right classes.
        """
        answer, hidden = answer.clamp(0, 1), view[:, 1:] != 1
        error = (answer - images)[hidden].square().mean().sqrt()
        return Score(float(error), self.accuracy(answer, labels))
