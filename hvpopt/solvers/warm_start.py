"""Eigenpairs, and the vectors that they give to start from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from hvpopt import trees
from hvpopt.solvers.checks import checked_like
from hvpopt.solvers.result import Status
from hvpopt.trees import TensorList


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues at one end of the spectrum and their vectors, the extreme one first."""

    values: tuple[float, ...]
    """(k,) the largest, λ₁ ≥ λ₂ ≥ …, or the smallest, λ₁ ≤ λ₂ ≤ …; NaN after an early breakdown."""
    vectors: tuple[TensorList, ...]
    """(k,) lists of unit Euclidean norm in the shapes and dtypes of ``like``."""
    residual_bounds: tuple[float, ...]
    """(k,) ‖A v − λ v‖ by the recurrence; an eigenvalue of A lies within that of λ."""
    value_errors: tuple[float, ...]
    """(k,) what λ is expected to be off by: the bound, or where that is less its square over the
    gap to the next value found, less that one's bound, at most |λ|/8. No such number sees an
    eigenvalue further out that has not yet shown."""
    num_products: int
    """Products with A, of the whole call."""
    status: Status
    """CONVERGED, STEP_LIMIT or BREAKDOWN, of the whole call."""


Start = Sequence[Tensor] | Sequence[Sequence[Tensor]] | Eigenpairs | tuple[Eigenpairs, Eigenpairs]
"""One vector, several, or the results of an earlier call."""


def starting_vectors(
    start: Start | None, like: TensorList, *, most: int, count: int
) -> list[TensorList]:
    """The first ``most`` vectors of a start, or ``count`` sums of them where they are more.

    Raises:
        ValueError: If shapes differ from those of ``like``.
        TypeError: If the start mixes vectors, tensors and results.
    """
    vectors = _guesses(start, like)[:most]
    return [
        [torch.stack(xs).sum(0) for xs in zip(*vectors[i::count], strict=True)]
        for i in range(min(count, len(vectors)))
    ]


def _guesses(start: Start | None, like: TensorList) -> list[TensorList]:
    """The vectors of a start; of results from both ends the sums of a top and a bottom one."""
    if start is None:
        return []
    if isinstance(start, Eigenpairs):
        return [checked_like(v, like, "start") for v in start.vectors]
    if len(start) > 0 and all(isinstance(x, Eigenpairs) for x in start):
        sides = [_guesses(pairs, like) for pairs in start if isinstance(pairs, Eigenpairs)]
        together = [[v for v in vs if v is not None] for vs in zip_longest(*sides)]
        return [[torch.stack(xs).sum(0) for xs in zip(*vs, strict=True)] for vs in together]
    if len(start) > 0 and all(isinstance(x, Tensor) for x in start):
        return [checked_like([x for x in start if isinstance(x, Tensor)], like, "start")]
    vectors = [x for x in start if not isinstance(x, (Tensor, Eigenpairs))]
    if len(vectors) < len(start):
        raise TypeError(
            "start mixes vectors, tensors and results; expected one list of tensors, a list of "
            "such lists, or the results of an earlier call."
        )
    return [checked_like(v, like, "start") for v in vectors]


def mixed(guess: TensorList, random: TensorList) -> TensorList:
    """The guess with a tenth of a random direction; the latter alone if the guess is no use."""
    length = float(trees.norm(guess))
    if not 0 < length < math.inf:
        return random
    noise = trees.scale(random, 0.1 / float(trees.norm(random)))
    return trees.add(noise, guess, 1.0 / length)
