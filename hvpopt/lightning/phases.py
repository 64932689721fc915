"""Training in phases: which loss trains which part of an energy, how long and how fast."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from hvpopt.nested.energies import EncodedEnergy
from hvpopt.nested.losses import Loss
from hvpopt.options import check_count, check_range

__all__ = [
    "Phase",
    "active_phase",
    "checked_phases",
    "freeze_others",
    "has_unused",
    "parameter_groups",
    "set_modes",
    "trained_parameters",
]


@dataclass(frozen=True)
class Phase:
    """A stretch of training.

    Args:
        loss: what is minimised.
        epochs: how many; None, in the last phase only, until training ends.
        trains: "all" parameters, or those of the "encoder" or the "head" only. A part that is not
            trained is frozen and in evaluation mode, without dropout.
        lr: the optimizer's learning rate; None for its own.
        weight_decay: of the optimizer; None for its own.

    Raises:
        ValueError: for an argument out of range.
        TypeError: for a loss that is none.
    """

    loss: Loss
    epochs: int | None = None
    trains: Literal["all", "encoder", "head"] = "all"
    lr: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.loss) or not hasattr(self.loss, "needs_inference"):
            raise TypeError(
                f"loss={self.loss!r}; expected a loss of hvpopt.nested.losses, such as EndToEnd()."
            )
        if self.epochs is not None:
            check_count("epochs", self.epochs)
        if self.trains not in ("all", "encoder", "head"):
            raise ValueError(
                f"trains={self.trains!r} is unknown; expected 'all', 'encoder' or 'head'."
            )
        if self.lr is not None:
            check_range("lr", self.lr, 0.0)
        if self.weight_decay is not None:
            check_range("weight_decay", self.weight_decay, 0.0)


def checked_phases(phases: Mapping[str, Phase | None]) -> dict[str, Phase]:
    """The phases that are not None, in order.

    Raises:
        TypeError: if one is no Phase.
        ValueError: if there is none, or one before the last has no number of epochs.
    """
    chosen = {name: phase for name, phase in phases.items() if phase is not None}
    if not chosen:
        raise ValueError("phases is empty; expected at least one phase of training.")
    for name, phase in chosen.items():
        if not isinstance(phase, Phase):
            raise TypeError(f"phases.{name} is a {type(phase).__name__}; expected a Phase.")
    for name in list(chosen)[:-1]:
        if chosen[name].epochs is None:
            raise ValueError(
                f"phases.{name} has no number of epochs; only the last phase goes on until "
                "training ends."
            )
    return chosen


def active_phase(phases: Sequence[Phase], epoch: int) -> int:
    """The index of the phase that an epoch, counted from zero, belongs to; past the end, the
    last."""
    for index, phase in enumerate(phases):
        if phase.epochs is None or epoch < phase.epochs:
            return index
        epoch -= phase.epochs
    return len(phases) - 1


def trained_parameters(
    energy: EncodedEnergy, phase: Phase, trainable: Collection[str]
) -> list[nn.Parameter]:
    """The parameters that the phase trains, among those of the given names.

    Raises:
        ValueError: if there is none.
    """
    prefix = "" if phase.trains == "all" else f"{phase.trains}."
    chosen = [
        p for name, p in energy.named_parameters() if name in trainable and name.startswith(prefix)
    ]
    if not chosen:
        raise ValueError(
            f"The phase trains {phase.trains!r} of the energy, where no parameter requires "
            "gradients."
        )
    return chosen


def has_unused(phase: Phase, trainable: Iterable[str]) -> bool:
    """Whether the phase gives no gradient to some of the parameters of the given names: those of
    a part that it does not train, or of the head where its loss never evaluates the energy."""
    parts = {"encoder", "head"} if phase.trains == "all" else {phase.trains}
    if not phase.loss.needs_inference:
        parts.discard("head")
    return any(name.partition(".")[0] not in parts for name in trainable)


def freeze_others(energy: EncodedEnergy, trained: Iterable[nn.Parameter]) -> None:
    """Lets gradients be computed for the trained parameters only."""
    energy.requires_grad_(False)
    for p in trained:
        p.requires_grad_(True)


def set_modes(energy: EncodedEnergy, phase: Phase) -> None:
    """Puts what the phase trains in training mode, the rest in evaluation mode."""
    for name in ("encoder", "head"):
        getattr(energy, name).train(phase.trains in ("all", name))


def parameter_groups(trained: list[nn.Parameter], phase: Phase) -> list[dict[str, Any]]:
    """The optimizer's argument: the trained parameters, with the phase's options."""
    options = {"lr": phase.lr, "weight_decay": phase.weight_decay}
    return [
        {"params": trained, **{name: value for name, value in options.items() if value is not None}}
    ]
