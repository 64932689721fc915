"""What may be known of an image: some of its pixels, or sums and means of pixels.

Either way it is a set of linear measurements A y = b, and a network sees two images of it: the one
of least norm that agrees, A⁺b, and how far each pixel is determined, the diagonal of A⁺A. For
pixels these are the image with zeros in place of what is hidden, and the mask of what is known.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SIDE = 8
"""Pixels of an image's side."""

QuestionName = Literal["pixels", "rectangle", "half", "means", "sums"]
Masks = Callable[[int, torch.Generator], Tensor]
"""(count, generator) ↦ which pixels are known, bool (count, 1, 8, 8)."""


def scattered(count: int, generator: torch.Generator) -> Tensor:
    """Known are pixels here and there: of each image a share between 5% and 80%."""
    shares = 0.05 + 0.75 * torch.rand(count, 1, 1, 1, generator=generator)
    return torch.rand(count, 1, SIDE, SIDE, generator=generator) < shares


def outside_rectangle(count: int, generator: torch.Generator) -> Tensor:
    """Hidden is a rectangle with sides of 4 to 7 pixels, anywhere."""
    (top, bottom), (left, right) = _intervals(count, generator), _intervals(count, generator)
    at = torch.arange(SIDE)
    rows = (at >= top) & (at < bottom)
    columns = (at >= left) & (at < right)
    return ~(rows[:, :, None] & columns[:, None, :]).unsqueeze(1)


def _intervals(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Begins and ends, (count, 1) each."""
    lengths = torch.randint(4, SIDE, (count, 1), generator=generator)
    starts = torch.rand(count, 1, generator=generator) * (SIDE + 1 - lengths)
    return starts.long(), starts.long() + lengths


def one_half(count: int, generator: torch.Generator) -> Tensor:
    """Known is the upper, lower, left or right half."""
    halves = torch.zeros(4, 1, SIDE, SIDE, dtype=torch.bool)
    halves[0, :, : SIDE // 2] = True
    halves[1, :, SIDE // 2 :] = True
    halves[2, :, :, : SIDE // 2] = True
    halves[3, :, :, SIDE // 2 :] = True
    return halves[torch.randint(4, (count,), generator=generator)]


def means() -> Tensor:
    """The matrix (16, 64) of the means of blocks of 2 × 2 pixels, row by row."""
    pairs = torch.eye(SIDE // 2).repeat_interleave(2, 1) / 2
    return torch.kron(pairs, pairs)


def sums() -> Tensor:
    """The matrix (16, 64) of the sums of the eight rows, then of the eight columns."""
    ones = torch.ones(1, SIDE)
    return torch.cat([torch.kron(torch.eye(SIDE), ones), torch.kron(ones, torch.eye(SIDE))])


@dataclass(frozen=True)
class Question:
    """A kind of knowledge about an image; either ``masks`` or ``matrix`` is there."""

    title: str
    """For a figure."""
    masks: Masks | None = None
    """Which pixels are known."""
    matrix: Tensor | None = None
    """A, (measurements, 64)."""

    def view(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """What a network is shown of images (count, 1, 8, 8): A⁺b and the diagonal of A⁺A,
        (count, 2, 8, 8)."""
        if self.masks is not None:
            known = self.masks(len(images), generator).to(images.device)
            return torch.cat([torch.where(known, images, 0.0), known.to(images.dtype)], 1)
        assert self.matrix is not None
        matrix = self.matrix.to(images)
        onto = torch.linalg.pinv(matrix) @ matrix
        seen = (images.flatten(1) @ onto.T).view_as(images)
        determined = onto.diagonal().view(1, 1, SIDE, SIDE).expand_as(images)
        return torch.cat([seen, determined], 1)


QUESTIONS: dict[QuestionName, Question] = {
    "pixels": Question("scattered pixels", scattered),
    "rectangle": Question("all but a rectangle", outside_rectangle),
    "half": Question("one half", one_half),
    "means": Question("means of 2 × 2 pixels", matrix=means()),
    "sums": Question("row and column sums", matrix=sums()),
}
