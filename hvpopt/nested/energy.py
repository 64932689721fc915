"""What an energy is, and what of it is not smooth."""

import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hvpopt.engines.support import graph_nodes


class Energy(Protocol):
    """E(x, y; θ), a number for each example; any callable or ``nn.Module`` will do.

    The examples are independent: the energy of one depends on its own rows of x and y and on θ
    alone. θ are the leaf tensors that require gradients and are met on the way, an ``nn.Module``'s
    parameters. What is computed from other parameters, as features of a network are, goes into x.
    """

    def __call__(self, x: Any, y: Tensor) -> Tensor:
        """The energies (batch,).

        Args:
            x: A pytree of tensors with a leading batch axis, or None.
            y: (batch, *shape), floating point.
        """
        ...


_KINKED = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Hardsigmoid,
    nn.Hardswish, nn.Hardshrink, nn.Softshrink, nn.Threshold,
)  # fmt: skip
_KINKED_NODES = (
    "ReluBackward", "LeakyReluBackward", "PreluKernelBackward", "RreluWithNoise",
    "HardtanhBackward", "HardsigmoidBackward", "HardswishBackward", "HardshrinkBackward",
    "SoftshrinkBackward", "ThresholdBackward",
)  # fmt: skip


def relu_like(energy: nn.Module) -> list[str]:
    """The names of the modules inside an energy that are not smooth, with their classes.

    Examples:
        >>> relu_like(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Softplus()))
        ["'1' (ReLU)"]
    """
    return [
        f"{name!r} ({type(module).__name__})"
        for name, module in energy.named_modules()
        if isinstance(module, _KINKED)
    ]


def kinked_nodes(energies: Tensor) -> list[str]:
    """The operations behind energies that are not smooth, by autograd's names, each once."""
    names = {node.name() for node in graph_nodes([energies])}
    return sorted(n for n in names if n.startswith(_KINKED_NODES))


class Once:
    """Remembers for which objects something was said, without keeping them alive."""

    def __init__(self) -> None:
        self._said: dict[int, weakref.ref[Any] | None] = {}

    def __call__(self, about: object) -> bool:
        """Whether this is the first time. Functions are told apart by their code."""
        if self.knows(about):
            return False
        about = getattr(about, "__code__", about)
        try:
            self._said[id(about)] = weakref.ref(about)
        except TypeError:  # it cannot be referred to weakly
            self._said[id(about)] = None
        return True

    def knows(self, about: object) -> bool:
        """Whether it was said before."""
        about = getattr(about, "__code__", about)
        known = self._said.get(id(about), self)
        return known is None or (isinstance(known, weakref.ref) and known() is about)


def batch_size(tensors: Iterable[Tensor]) -> set[int]:
    """The sizes of the first axes."""
    return {t.shape[0] if t.dim() else -1 for t in tensors}


def check_energies(energies: Any, y: Tensor) -> Tensor:
    """Lets an energy for each example pass.

    Raises:
        TypeError: If it is no tensor of floating point.
        ValueError: If its shape is not (batch,).
    """
    if not isinstance(energies, Tensor):
        raise TypeError(
            f"The energy returned a {type(energies).__name__}; expected a tensor of shape "
            f"({len(y)},), one energy for each example."
        )
    if not energies.is_floating_point():
        raise TypeError(f"The energy returned {energies.dtype}; expected floating point.")
    if energies.shape != (len(y),):
        hint = "do not reduce over the batch" if energies.dim() == 0 else "sum over what belongs "
        hint += "" if energies.dim() == 0 else "to one example, as by flatten(1).sum(1)"
        hint += ", nor squeeze a batch of one away" if len(y) == 1 and energies.dim() == 0 else ""
        raise ValueError(
            f"The energy returned shape {tuple(energies.shape)} for y of shape {tuple(y.shape)}; "
            f"expected ({len(y)},), one energy for each example: {hint}."
        )
    return energies


def check_rows(energies: Tensor, y: Tensor) -> None:
    """Lets energies pass of which the first depends on its own row of y alone.

    Raises:
        ValueError: If it depends on other rows.
    """
    (slope,) = torch.autograd.grad(energies[0], y, retain_graph=True, allow_unused=True)
    if slope is not None and bool((slope[1:].abs() > 0).any()):
        raise ValueError(
            "The energy of one example depends on other rows of y: expected energies (batch,) of "
            "examples apart. Take means and norms over the axes after the first alone."
        )


def check_start(energies: Tensor, gradient: Tensor) -> None:
    """Lets an inner problem pass whose energies and gradients are finite where it starts.

    Raises:
        ValueError: If one is not, naming the first example.
    """
    energies, gradient = energies.detach(), gradient.detach()
    finite = torch.isfinite(energies) & torch.isfinite(gradient.flatten(1)).all(1)
    if not bool(finite.all()):
        bad = (~finite).nonzero()[:, 0]
        raise ValueError(
            f"The energy or its gradient is not finite at y0 for {len(bad)} of {len(energies)} "
            f"examples (example {int(bad[0])} has energy {float(energies[bad[0]]):.6g}): check x "
            "and the parameters for NaN, and that y0 lies where the energy is defined."
        )
