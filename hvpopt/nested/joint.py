"""The products that all adjoints are made of: (Hv, Cv) in one pass.

With g = ∂E/∂y at fixed y, Hv = (∂g/∂y)ᵀ v and Cv = (∂g/∂(x, θ))ᵀ v come together: forward over
reverse, as the tangent of ∂E/∂(y, x, θ) along (v, 0, 0) (Pearlmutter 1994; Domke 2012), or reverse
over reverse, as the gradient of ⟨g, v⟩. H is block diagonal, as the examples are independent, and
so one pass serves the whole batch.

Measured on a CPU (torch 2.13, one thread), one product from nothing in gradients by y, forward over
reverse and reverse over reverse: an energy of 159 labels and 16 units, batch 32: 4.2 and 1.8, batch
512: 7.5 and 2.6; with 600 units, batch 128: 5.5 and 3.0; three convolutions on 28 × 28 images: 4.1
and 2.8. torch's forward mode also computes with the tangents that parameters have, which are zeros.
Hence the default.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hvpopt.engines.base import reverse
from hvpopt.engines.dual_level import DualLevel, needs_graph
from hvpopt.nested.energy import Once
from hvpopt.nested.problem import InnerProblem

logger = logging.getLogger("hvpopt")

Products = Literal["reverse_over_reverse", "forward_over_reverse"]
_lacking = Once()


class Joint(NamedTuple):
    """What one pass gives."""

    Hv: Tensor
    """(k, *shape)."""
    Cv: Sequence[Tensor | None]
    """By the inputs of x that require gradients, (k, …) each, and by θ, summed over examples."""


@dataclass
class Tape:
    """The gradient at a point, with its graph."""

    rows: Tensor | None
    """Which examples, (k,); None for all."""
    xs: list[Tensor]
    """The tensors of x, leaves where gradients are wanted."""
    state: tuple[Tensor, ...]
    """What y was computed from, leaves; empty where y is a leaf itself."""
    y: Tensor
    """The point (k, *shape)."""
    g: Tensor
    """∂E/∂y there, attached."""

    def hvp(self, v: Tensor) -> Tensor:
        """Hv alone; the graph is kept."""
        if not self.g.requires_grad:
            return torch.zeros_like(v)
        (hv,) = reverse([self.g], [self.y], [v], retain_graph=True)
        return torch.zeros_like(v) if hv is None else hv

    def joint(self, problem: InnerProblem, v: Tensor) -> Joint:
        """(Hv, Cv); the graph is freed."""
        by = [*problem.leaves_of(self.xs), *problem.theta]
        if not self.g.requires_grad:  # the energy is linear in y, and has no parameters
            return Joint(torch.zeros_like(v), [None] * len(by))
        hv, *cv = reverse([self.g], [self.y, *by], [v], retain_graph=False)
        return Joint(torch.zeros_like(v) if hv is None else hv, cv)


def taped(problem: InnerProblem, y: Tensor, rows: Tensor | None) -> Tape:
    """The gradient at y of some examples, with its graph."""
    xs = problem.select(rows)
    y = y.detach().requires_grad_()
    _, g = problem.gradient(xs, y, rows, create_graph=True)
    return Tape(rows, xs, (), y, g)


def joint_product(
    problem: InnerProblem,
    y: Tensor,
    v: Tensor,
    rows: Tensor | None = None,
    *,
    products: Products = "reverse_over_reverse",
) -> Joint:
    """(Hv, Cv) of some examples at y, in one pass.

    Args:
        problem: Whose energy.
        y: The point, (k, *shape).
        v: The direction, (k, *shape).
        rows: Which examples, (k,); None for all.
        products: "forward_over_reverse" falls to the other where an operation has no forward-mode
            formula, and logs it once.
    """
    if products == "forward_over_reverse" and not _lacking.knows(problem.energy):
        try:
            return _forward_over_reverse(problem, y, v, rows)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
        joint = taped(problem, y, rows).joint(problem, v)
        if _lacking(problem.energy):
            logger.info("Products of the energy by double backward (forward mode: %s).", reason)
        return joint
    return taped(problem, y, rows).joint(problem, v)


def _forward_over_reverse(
    problem: InnerProblem, y: Tensor, v: Tensor, rows: Tensor | None
) -> Joint:
    xs = problem.select(rows)
    y = y.detach().requires_grad_()
    leaves = [y, *problem.leaves_of(xs), *problem.theta]
    tangents = [v, *(torch.zeros_like(p, requires_grad=False) for p in leaves[1:])]
    _, found = gradient_tangents(problem, xs, leaves, tangents, rows, of=leaves)
    hv, *cv = found
    return Joint(torch.zeros_like(v) if hv is None else hv, cv)


def gradient_tangents(
    problem: InnerProblem,
    xs: Sequence[Tensor],
    leaves: Sequence[Tensor],
    tangents: Sequence[Tensor],
    rows: Tensor | None,
    *,
    of: Sequence[Tensor],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """∂E/∂(of) and its tangents, where the leaves (y first) carry tangents: forward over reverse.

    Raises:
        RuntimeError: If an operation has no forward-mode formula.
    """
    problem.num_gradients += 1
    problem.num_rows += len(leaves[0])
    with DualLevel(leaves, tangents):
        energies = problem.energies(xs, leaves[0], rows)
        # with tangents of zeros, which formulas may write to
        one = forward_ad.make_dual(torch.ones_like(energies), torch.zeros_like(energies))
        grads = torch.autograd.grad(
            energies, list(of), one, create_graph=needs_graph(energies), allow_unused=True
        )
        pairs = [(None, None) if g is None else forward_ad.unpack_dual(g) for g in grads]
        primals = [None if g is None else g.detach().clone() for g, _ in pairs]
        found = [None if t is None else t.detach().clone() for _, t in pairs]
    return primals, found


def check_products(products: str) -> None:
    """Lets a known way pass.

    Raises:
        ValueError: For another.
    """
    if products not in get_args(Products):
        known = ", ".join(map(repr, get_args(Products)))
        raise ValueError(f"products={products!r} is unknown: choose one of {known}.")
