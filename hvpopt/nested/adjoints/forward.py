"""Forward mode: the derivative of y by a few numbers, carried along with the steps."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hvpopt.nested.adjoints.base import Adjoint, AdjointReport, Gradients, attached
from hvpopt.nested.adjoints.reverse import at
from hvpopt.nested.book import Descent
from hvpopt.nested.descent import Run
from hvpopt.nested.energy import Once
from hvpopt.nested.joint import gradient_tangents, logger, taped
from hvpopt.nested.points import Step
from hvpopt.options import check_count

_lacking = Once()


@dataclass(frozen=True)
class ForwardMode(Adjoint):
    """The unrolled gradient by forward mode: memory O(n) a direction, whatever the number of steps.

    There is a direction for each entry of θ and of a shared step size, and for each column of x, y0
    and a step size per example, as the examples are independent. Each costs a product a step, so
    that this is for a few numbers, such as penalties and step sizes.

    Args:
        max_directions: Refuses more than so many.

    Raises:
        ValueError: For ``max_directions`` < 1, and by the inference for more directions.

    Source: Franceschi et al. (ICML 2017).
    """

    name: ClassVar[str] = "forward"

    max_directions: int = 64

    def __post_init__(self) -> None:
        check_count("max_directions", self.max_directions)

    def solve(self, run: Run, report: AdjointReport) -> Descent:
        """The descent, with the tangents of its state in every direction."""
        sources = _sources(run)
        count = sum(source.count for source in sources)
        if count > self.max_directions:
            raise ValueError(
                f"ForwardMode would carry {count} directions (entries of the parameters and "
                f"columns of x, y0 and step_size that require gradients), more than max_directions="
                f"{self.max_directions}: choose adjoint='back_optimization', or freeze what needs "
                "no gradient."
            )
        tangents = _Tangents(run, sources, report)
        descent = run.descend(lambda number: "values", on_step=tangents.step)
        jacobian = tangents.of_y(descent)

        def pullback(ybar: Tensor, path: Tensor | None) -> Gradients:
            grads: list[Tensor | None] = []
            columns = iter(jacobian)
            for source in sources:
                terms = [(next(columns) * ybar).flatten(1).sum(1) for _ in range(source.count)]
                grads.append(source.gathered(terms))
            places = {id(s.given): g for s, g in zip(sources, grads, strict=True)}
            size = places.get(id(run.step_size))
            return Gradients(
                places.get(id(run.y0)),
                [places.get(id(v)) for v in run.problem.inputs],
                [places.get(id(t)) for t in run.problem.theta],
                size,
            )

        return attached(run, descent, self.name, pullback)


@dataclass(frozen=True)
class _Source:
    """A tensor that y is to be differentiated by."""

    given: Tensor
    is_per_example: bool

    @property
    def count(self) -> int:
        """How many directions it has."""
        return self.given[0].numel() if self.is_per_example else self.given.numel()

    def tangents(self) -> Iterator[Tensor]:
        """A one in each entry, or in each column for all examples at once."""
        for i in range(self.count):
            tangent = torch.zeros_like(self.given, requires_grad=False)
            if self.is_per_example:
                tangent.view(len(tangent), -1)[:, i] = 1
            else:
                tangent.view(-1)[i] = 1
            yield tangent

    def gathered(self, terms: list[Tensor]) -> Tensor:
        """The gradient, of its directions' derivatives of each example's part of the loss."""
        stacked = torch.stack(terms, 1)
        if not self.is_per_example:
            stacked = stacked.sum(0)
        return stacked.reshape(self.given.shape).to(self.given.dtype)


def _sources(run: Run) -> list[_Source]:
    found = [_Source(v, True) for v in (run.y0, *run.problem.inputs) if v.requires_grad]
    found += [_Source(t, False) for t in run.problem.theta]
    size = run.step_size
    if isinstance(size, Tensor) and size.requires_grad:
        found.append(_Source(size, size.dim() == 1))
    return found


class _Tangents:
    """The tangents of the state, one list for each direction, moved with each step.

    Attributes:
        states: (batch, *shape) each, a tuple for each direction.
    """

    def __init__(self, run: Run, sources: Sequence[_Source], report: AdjointReport) -> None:
        self._run, self._report = run, report
        self._directions = [(s.given, t) for s in sources for t in s.tangents()]
        with torch.no_grad():
            zeros = [torch.zeros_like(s) for s in run.method.start(run.y0.detach())]
        self.states = []
        for given, tangent in self._directions:
            state = list(zeros)
            if given is run.y0:
                state[0] = _along(run.domain.coordinates, run.y0, tangent)
            self.states.append(state)

    def step(self, step: Step) -> None:
        """Takes all tangents through a step."""
        run, rows = self._run, step.rows
        xs = run.problem.select(rows)
        for state, (given, tangent) in zip(self.states, self._directions, strict=True):
            here = [at(s, rows) for s in state]
            with torch.no_grad():
                y = run.domain.point(step.state[0])
            ydot = _along(run.domain.point, step.state[0], here[0])
            gdot = self._gradient(xs, y, ydot, given, tangent, rows)
            with forward_ad.dual_level(), torch.no_grad():
                duals = tuple(
                    forward_ad.make_dual(s, t) for s, t in zip(step.state, here, strict=True)
                )
                sizes = run.step_size
                if given is sizes:
                    sizes = forward_ad.make_dual(given.detach(), tangent)
                alpha = run.method.lengths(sizes, step.number, rows)
                alpha = alpha if step.factors is None else alpha * step.factors
                after = run.method.advance(
                    run.domain, duals, run.domain.point(duals[0]),
                    forward_ad.make_dual(step.g, gdot), alpha,
                )  # fmt: skip
                for i, s in enumerate(after):
                    moved = _tangent(s)
                    state[i] = moved if rows is None else state[i].index_copy(0, rows, moved)

    def _gradient(
        self,
        xs: list[Tensor],
        y: Tensor,
        ydot: Tensor,
        given: Tensor,
        tangent: Tensor,
        rows: Tensor | None,
    ) -> Tensor:
        """The tangent of ∂E/∂y along ẏ and one of x and θ."""
        problem = self._run.problem
        self._report.num_products += 1
        leaves = [y.detach().requires_grad_(), *problem.leaves_of(xs), *problem.theta]
        tangents = [ydot, *(torch.zeros_like(v, requires_grad=False) for v in leaves[1:])]
        for i, v in enumerate((*problem.inputs, *problem.theta), start=1):
            if v is given:
                is_input = i <= len(problem.inputs)
                tangents[i] = problem.rows_of(tangent, rows) if is_input else tangent
        with torch.enable_grad():
            if not _lacking.knows(problem.energy):
                try:
                    _, (gdot,) = gradient_tangents(
                        problem, xs, leaves, tangents, rows, of=leaves[:1]
                    )
                    return torch.zeros_like(y) if gdot is None else gdot
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    reason = str(error).strip().partition("\n")[0]
                _lacking(problem.energy)
                logger.info("Tangents of the energy by double backward (%s).", reason)
            return self._by_double_backward(y, tangents, rows)

    def _by_double_backward(self, y: Tensor, tangents: list[Tensor], rows: Tensor | None) -> Tensor:
        """The tangent of g as ∂⟨(∂g/∂·)ᵀ w, tangents⟩/∂w, for which w may be anything."""
        problem = self._run.problem
        tape = taped(problem, y, rows)
        by = [tape.y, *problem.leaves_of(tape.xs), *problem.theta]
        w = torch.zeros_like(y).requires_grad_()
        pulled = torch.autograd.grad(tape.g, by, w, create_graph=True, allow_unused=True)
        inner = sum(
            ((p * t).sum() for p, t in zip(pulled, tangents, strict=True) if p is not None),
            start=torch.zeros((), dtype=y.dtype, device=y.device),
        )
        (gdot,) = torch.autograd.grad(inner, w, allow_unused=True)
        return torch.zeros_like(y) if gdot is None else gdot

    def of_y(self, descent: Descent) -> list[Tensor]:
        """The tangents of the last iterates, (batch, *shape), one for each direction."""
        point, u = self._run.domain.point, descent.state[0]
        return [_along(point, u, state[0]) for state in self.states]


def _along(f: Callable[[Tensor], Tensor], u: Tensor, tangent: Tensor) -> Tensor:
    """The derivative of an element-wise map along a tangent."""
    with forward_ad.dual_level(), torch.no_grad():
        return _tangent(f(forward_ad.make_dual(u.detach(), tangent)))


def _tangent(x: Tensor) -> Tensor:
    primal, tangent = forward_ad.unpack_dual(x)
    return torch.zeros_like(primal) if tangent is None else tangent.clone()
