"""What an energy makes of what is known of an image; a Gaussian as the energy to start from."""

import torch
from torch import Tensor, nn

from hvpopt.nested import Box, HeavyBall, Method, minimize_energy
from hvpopt.nested.energies.base import EncodedEnergy
from hvpopt.nested.energies.known import KnownEntries, KnownMeasurements
from hvpopt.nested.losses import Minimizer

from .networks import View
from .questions import Question

SMALL_STEPS = HeavyBall(0.1, 150, momentum=0.8)
"""For measurements, whose term of weight 10 asks for them."""


@torch.no_grad()
def completed(
    energy: EncodedEnergy,
    minimizer: Minimizer | None,
    question: Question,
    images: Tensor,
    view: Tensor,
    *,
    method: Method = SMALL_STEPS,
) -> Tensor:
    """The images (count, 1, 8, 8) that an energy takes for the right ones, given what is known.

    Known pixels are put in their places. Measurements add a term to the energy, so that a
    feed-forward network, whose energy is the distance from its output, answers with the image
    nearest to that.

    Args:
        energy: With `KnownEntries` as its head.
        minimizer: For known pixels; None takes the energy's first guess, a feed-forward network's
            answer.
        question: What is known.
        images: The whole images, (count, 1, 8, 8), of which only that is used.
        view: What the question shows of them.
        method: For measurements.
    """
    energy.eval()
    encoding = energy.encoder(view)
    if question.matrix is None:
        initial = energy.initial(encoding)
        return initial if minimizer is None else minimizer(energy.head, encoding, initial).y
    matrix = question.matrix.to(images)
    encoding["measured"] = images.flatten(1) @ matrix.T
    assert isinstance(energy.head, KnownEntries)
    head = KnownMeasurements(energy.head.head, matrix)
    grey = torch.full_like(images, 0.5)
    start = (grey - head.excess(encoding, grey)).clamp(0, 1)
    return minimize_energy(head, encoding, start, method=method, domain=Box()).y


class Gaussian(nn.Module):
    """E(y) = ½ ε (y − m)ᵀ (C + ε I)⁻¹ (y − m), with mean and covariance of images: quadratic, and
    convex. Its curvature lies between 0 and 1.

    Args:
        images: (count, 1, 8, 8).
        noise: ε.
    """

    mean: Tensor
    precision: Tensor

    def __init__(self, images: Tensor, noise: float) -> None:
        super().__init__()
        flat = images.flatten(1)
        covariance = torch.cov(flat.T, correction=0)
        unit = torch.eye(len(covariance), dtype=flat.dtype, device=flat.device)
        self.register_buffer("mean", flat.mean(0))
        self.register_buffer("precision", noise * torch.linalg.inv(covariance + noise * unit))

    def forward(self, encoding: dict[str, Tensor], y: Tensor) -> Tensor:
        """Energies `[B]` of images `[B, 1, 8, 8]`; the encoding is not used."""
        deviation = y.flatten(1) - self.mean
        return 0.5 * torch.linalg.vecdot(deviation @ self.precision, deviation)

    def completed(self, question: Question, images: Tensor, view: Tensor) -> Tensor:
        """Its answer to a question, by as many steps as its narrow valleys ask for."""
        minimizer = Minimizer(HeavyBall(1.0, 600, momentum=0.9), Box(), start="initial")
        method = HeavyBall(0.3, 1500, momentum=0.95)
        energy = EncodedEnergy(View(), KnownEntries(self))
        return completed(energy, minimizer, question, images, view, method=method)
