"""Prediction by minimisation: y* = argmin_y E(x, y; θ), differentiable."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hvpopt.nested.adjoints import Adjoint, AdjointReport, BackOptimization, Unrolled, adjoint_named
from hvpopt.nested.adjoints.base import FORWARD
from hvpopt.nested.descent import Run
from hvpopt.nested.domains import Domain, Unconstrained
from hvpopt.nested.energy import Energy
from hvpopt.nested.methods import GradientDescent, Method
from hvpopt.nested.problem import InnerProblem
from hvpopt.nested.status import STATUSES, InferenceStatus
from hvpopt.options import check_range
from hvpopt.products.surroundings import in_transform

AdjointName = Literal[
    "unrolled",
    "checkpointed",
    "back_optimization",
    "truncated",
    "implicit",
    "neumann",
    "forward",
]


@dataclass(frozen=True)
class Inference:
    """What an inner minimisation found, example by example."""

    y: Tensor
    """(batch, *shape), in autograd's graph."""
    energies: Tensor
    """(batch,), E(x, y) without the entropy term, detached."""
    residuals: Tensor
    """(batch,), the norm of the projected or reparametrised gradient at y, detached."""
    steps: Tensor
    """(batch,), int64: steps taken."""
    status: Tensor
    """(batch,), int64: the codes of `InferenceStatus`."""
    iterates: Tensor | None
    """(steps run + 1, batch, *shape) from y0 to y, in the graph; finished examples repeat
    themselves. None unless ``keep_iterates``."""
    energy_path: Tensor
    """(steps run + 1, batch), the energies of the iterates, detached."""
    num_gradients: int
    """Gradients of the energy by y, each of what was left of the batch."""
    num_rows: int
    """The examples that these were of, summed."""
    report: AdjointReport
    """What the backward pass took; empty until it has run."""

    @property
    def statuses(self) -> list[InferenceStatus]:
        """How each example ended, in sentences."""
        return [STATUSES[code] for code in self.status.tolist()]

    def count(self, status: InferenceStatus) -> int:
        """How many examples ended so."""
        return int((self.status == status.code).sum())

    def fraction(self, status: InferenceStatus) -> float:
        """Which part of the examples ended so."""
        return self.count(status) / len(self.status)


def minimize_energy(
    energy: Energy,
    x: Any,
    y0: Tensor,
    *,
    method: Method = GradientDescent(),  # noqa: B008 (frozen)
    domain: Domain = Unconstrained(),  # noqa: B008 (frozen)
    adjoint: Adjoint | AdjointName = BackOptimization(),  # noqa: B008 (frozen)
    keep_iterates: bool = False,
    max_diverged: float = 0.5,
) -> Inference:
    """The minimisers y of E(x, y; θ), differentiable by θ, x, y0 and the step size.

    ``loss.backward()`` on what is computed from the result gives the gradients by the energy's
    parameters, by what x was computed from, by y0 and by a step size that is a tensor (the last two
    not where the adjoint looks at the last iterate alone), by the way that ``adjoint`` chooses.
    Each example has its own step length, line search, end and status: one that has converged
    costs nothing more, and one that is hard or diverges does not touch the others.

    Under ``torch.no_grad`` and ``torch.inference_mode`` the values are computed alone.

    Args:
        energy: E(x, y) -> (batch,); see `hvpopt.nested.Energy`. Batch norms inside a module use
            their running statistics; dropout masks are the same at each step.
        x: A pytree of tensors with a leading batch axis, or None.
        y0: The start, (batch, *shape), in the domain.
        method: `GradientDescent`, `HeavyBall`, `MirrorDescent` or `NewtonDescent`.
        domain: `Unconstrained`, `Box`, `Simplex`, `Logits` or `SoftmaxLogits`.
        adjoint: How to differentiate, an object or its word.
        keep_iterates: Also returns all iterates, for a loss on each.
        max_diverged: The fraction of the examples that may diverge.

    Returns:
        The minimisers and what is known of them.

    Raises:
        TypeError: If y0 or the energies are not floating-point tensors, or the method, the domain
            or the adjoint is another thing.
        ValueError: If the energies are not (batch,), not finite at y0, do not depend on y, or one
            depends on another example's y (which is looked at once for each energy); if
            y0 lies outside of the domain (for `MirrorDescent` on its bounds, too), x has another
            batch size, or options do not go together.
        RuntimeError: Inside of a transform of ``torch.func``.
        DivergenceError: If more examples diverge than may.

    Examples:
        >>> center = torch.tensor([[1.0, -2.0]], requires_grad=True)
        >>> found = minimize_energy(
        ...     lambda x, y: ((y - x) ** 2).sum(1), center, torch.zeros(1, 2),
        ...     method=GradientDescent(0.5, num_steps=3),
        ... )
        >>> found.y.sum().backward()
        >>> found.y.detach(), center.grad
        (tensor([[ 1., -2.]]), tensor([[1., 1.]]))
    """
    adjoint = adjoint_named(adjoint) if isinstance(adjoint, str) else adjoint
    _check_kinds(energy, method, domain, adjoint)
    check_range("max_diverged", max_diverged, 0.0, 1.0)
    _check_y(y0)
    domain.check(y0.detach())
    method.check(domain, len(y0))
    coordinates = method.coordinates(domain)
    if coordinates is not domain:  # a start on its bounds has no logits
        coordinates.check(y0.detach())
    records = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    if y0.is_inference():
        with torch.inference_mode(False):
            y0 = y0.clone()
    unrolled = isinstance(adjoint, Unrolled)
    problem = InnerProblem(energy, x, y0, allows_captured=unrolled or not records)
    size = method.step_size
    sources = [y0, *problem.inputs, *problem.theta, *([size] if isinstance(size, Tensor) else [])]
    run = Run(problem, method, coordinates, y0, size, keep_iterates, max_diverged)
    report = AdjointReport(adjoint.name)
    if records and any(t.requires_grad for t in sources):
        adjoint.check(method, keep_iterates=keep_iterates)
        if forward_ad._current_level >= 0 and not unrolled:
            raise RuntimeError(FORWARD.format(name=adjoint.name))
        with problem.active():
            found = adjoint.solve(run, report)
    else:
        with problem.active(), torch.no_grad():
            found = run.descend(lambda number: "values")
    return Inference(
        y=found.y,
        energies=found.energies,
        residuals=found.residuals,
        steps=found.steps,
        status=found.status,
        iterates=found.iterates,
        energy_path=found.energy_path,
        num_gradients=problem.num_gradients,
        num_rows=problem.num_rows,
        report=report,
    )


def _check_kinds(energy: object, method: object, domain: object, adjoint: object) -> None:
    if in_transform():
        raise RuntimeError(
            "minimize_energy was called inside of a transform of torch.func, such as vmap or grad: "
            "give it the whole batch, and differentiate the result with backward or "
            "torch.autograd.grad."
        )
    if not callable(energy):
        raise TypeError(
            f"energy is a {type(energy).__name__}; expected a function E(x, y) -> (batch,)."
        )
    for name, value, kind, example in (
        ("method", method, Method, "GradientDescent(0.1)"),
        ("domain", domain, Domain, "Box()"),
        ("adjoint", adjoint, Adjoint, "Implicit(), or its word, 'implicit'"),
    ):
        if not isinstance(value, kind):
            given = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
            raise TypeError(
                f"{name} is {given}; expected an object of {kind.__name__}, such as {example}."
            )


def _check_y(y0: Any) -> None:
    if not isinstance(y0, Tensor):
        raise TypeError(f"y0 is a {type(y0).__name__}; expected a tensor (batch, *shape).")
    if not y0.is_floating_point():
        raise TypeError(f"y0 is {y0.dtype}; expected floating point, such as y0.float().")
    if y0.dim() < 2 or not y0.numel():
        raise ValueError(
            f"y0 has shape {tuple(y0.shape)}; expected (batch, *shape) with at least one example "
            "and one entry."
        )
