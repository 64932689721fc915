"""What the losses share: their result, the inner problem, and seeded random numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hvpopt.nested.adjoints import Adjoint
from hvpopt.nested.domains import Box, Domain, Interval
from hvpopt.nested.energies.base import EncodedEnergy
from hvpopt.nested.energy import Energy
from hvpopt.nested.inference import AdjointName, Inference, minimize_energy
from hvpopt.nested.methods import Method, MirrorDescent

__all__ = ["Loss", "LossValue", "Minimizer", "check_choice", "generator_of"]

# Neighbouring seeds share no step's draws, however long they train.
_SEED_STRIDE = 1_000_003


@dataclass(frozen=True)
class LossValue:
    """A loss and what it cost."""

    loss: Tensor
    """Scalar, the mean over the batch; with gradients."""
    inference: Inference | None = None
    """The minimisation inside, where there was one."""
    figures: dict[str, Tensor] = field(default_factory=dict)
    """Scalars worth a curve, detached, by name."""


class Loss(Protocol):
    """What trains an energy on a batch."""

    needs_inference: bool
    """Whether the energy is trained for prediction by inference (else by its first guess)."""

    def __call__(
        self, energy: EncodedEnergy, x: Any, target: Tensor, minimizer: Minimizer, *, step: int = 0
    ) -> LossValue:
        """The loss of inputs x with the right outputs `target[B, *shape]`.

        Args:
            energy: what is trained.
            x: inputs, as the energy's encoder takes them.
            target: right outputs.
            minimizer: the inference that prediction will use.
            step: of training; random numbers are a function of the loss's seed and this number.
        """


@dataclass(frozen=True)
class Minimizer:
    """The settings of inference: `minimizer(head, encoding, initial)` minimises an energy over y.

    By default mirror descent with the entropy of y, for which the local term alone, −⟨y, s⟩, gives
    the classifier's σ(s).

    Args:
        method: how to descend.
        domain: where y lives, and as what it is varied.
        adjoint: how gradients pass through, an adjoint or its name.
        start: "center" of the domain, "initial", the energy's own first guess, or a number for
            every entry of y. A first guess that rounding has put on a bound is moved off it where
            y is varied as logits, as in mirror descent.
        max_diverged: the fraction of a batch that may diverge before that is an error.

    Raises:
        ValueError: for an unknown `start`, or one outside of a domain with bounds.
    """

    method: Method = field(default_factory=lambda: MirrorDescent(step_size=0.3))
    domain: Domain = field(default_factory=lambda: Box(entropy=1.0))
    adjoint: Adjoint | AdjointName = "back_optimization"
    start: Literal["center", "initial"] | float = "center"
    max_diverged: float = 0.5

    def __post_init__(self) -> None:
        is_number = isinstance(self.start, int | float) and not isinstance(self.start, bool)
        if not is_number and self.start not in ("center", "initial"):
            raise ValueError(
                f"start={self.start!r} is unknown; expected 'center', 'initial' or a number."
            )
        if is_number and isinstance(self.domain, Interval):
            entry = torch.full((1, 1), float(self.start), dtype=torch.float64)
            self.method.coordinates(self.domain).check(entry)

    def __call__(
        self,
        head: Energy,
        encoding: Any,
        initial: Tensor,
        *,
        keep_iterates: bool = False,
    ) -> Inference:
        """The minimisation of `head(encoding, y)`.

        Args:
            head: the energy of an encoding and y, `[B]`.
            encoding: a pytree of tensors `[B, ...]`.
            initial: `[B, *shape]`, the first guess, for its shape and for `start="initial"`.
            keep_iterates: see `hvpopt.nested.minimize_energy`.
        """
        return minimize_energy(
            head,
            encoding,
            self.start_from(initial),
            method=self.method,
            domain=self.domain,
            adjoint=self.adjoint,
            keep_iterates=keep_iterates,
            max_diverged=self.max_diverged,
        )

    def check_target(self, target: Tensor) -> None:
        """Lets right outputs pass that inference may find.

        Raises:
            TypeError: for outputs that are not floating point.
            ValueError: for entries beyond the domain's bounds.
        """
        if not target.is_floating_point():
            raise TypeError(
                f"target is {target.dtype}; expected floating point, such as target.float()."
            )
        domain = self.domain
        if not isinstance(domain, Interval):
            return
        outside = int((~((target >= domain.low) & (target <= domain.high))).sum())
        if outside:
            raise ValueError(
                f"target lies outside of the minimizer's domain {domain}: {outside} of "
                f"{target.numel()} entries, which range from {float(target.min()):.6g} to "
                f"{float(target.max()):.6g}; scale the targets, or choose another domain."
            )

    def start_from(self, initial: Tensor) -> Tensor:
        """Where inference starts, given the energy's first guess."""
        if self.start == "initial":
            return self.method.coordinates(self.domain).inside(initial)
        if self.start == "center":
            return self.domain.center(initial.shape, dtype=initial.dtype, device=initial.device)
        return torch.full_like(initial, float(self.start))


def generator_of(seed: int, step: int) -> torch.Generator:
    """A generator on the CPU that depends on the seed and the step only, so that a loss evaluated
    again within a step, or after a resumption, draws the same numbers."""
    return torch.Generator().manual_seed(seed * _SEED_STRIDE + step)


def check_choice(name: str, value: str, options: tuple[str, ...]) -> str:
    """`value`, if it is among the options.

    Raises:
        ValueError: if it is not.
    """
    if value not in options:
        raise ValueError(f"{name}={value!r} is unknown; expected one of {', '.join(options)}.")
    return value
