"""The descent on y: one loop for all methods, domains and ways to differentiate.

Examples that have finished leave the batch. A step is taken for all that are left, and is undone
for those that it leads to NaN or infinity, which end as diverged with their last finite iterate.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hvpopt.nested.book import Book, Descent
from hvpopt.nested.domains import Domain
from hvpopt.nested.energy import check_start
from hvpopt.nested.joint import Tape, taped
from hvpopt.nested.methods import Method, State
from hvpopt.nested.newton import NewtonDescent
from hvpopt.nested.points import Point, Recording, Step, chosen
from hvpopt.nested.problem import InnerProblem, Kind
from hvpopt.nested.rows import all_finite, are_finite, row_dots, row_norms
from hvpopt.nested.status import InferenceStatus

_KINDS: dict[Recording, Kind] = {
    "values": "values",
    "tape": "leaves",
    "chain": "chain",
    "attached": "attached",
}


def _nothing(*_: Any) -> None: ...


@dataclass(frozen=True)
class Run:
    """An inner minimisation, ready to go.

    Args:
        problem: The energy.
        method: How to move.
        domain: The coordinates that the method moves in.
        y0: The start, (batch, *shape).
        step_size: The method's; what the gradient by it is to flow to.
        keep_iterates: Whether all iterates are wanted.
        max_diverged: The fraction of the examples that may diverge.
    """

    problem: InnerProblem
    method: Method
    domain: Domain
    y0: Tensor
    step_size: float | Tensor
    keep_iterates: bool
    max_diverged: float

    def look(
        self,
        state: State,
        rows: Tensor | None,
        recording: Recording,
        xs: list[Tensor] | None = None,
    ) -> Point:
        """The point at a state; ``xs`` are what the problem selects, where that is at hand."""
        xs = self.problem.select(rows, _KINDS[recording]) if xs is None else xs
        starts_chain = recording == "chain" and not state[0].requires_grad
        if starts_chain or recording in ("values", "tape"):
            state = tuple(s.detach() for s in state)
        if recording == "values":
            y = self.domain.point(state[0]).detach()
            energies, g = self.problem.gradient(
                xs, y.detach().requires_grad_(), rows, create_graph=False
            )
            return Point(rows, xs, state, y, energies.detach(), g, recording)
        if starts_chain or recording == "tape":
            state = tuple(s.requires_grad_() for s in state)
        y = self.domain.point(state[0])
        y = y if y.requires_grad else y.detach().requires_grad_()
        energies, g = self.problem.gradient(xs, y, rows, create_graph=True)
        if recording != "tape":
            return Point(rows, xs, state, y, energies, g, recording)
        tape = Tape(rows, xs, state, y, g)
        state = tuple(s.detach() for s in state)
        return Point(rows, xs, state, y.detach(), energies.detach(), g.detach(), recording, tape)

    def advance(self, point: Point, number: int, factors: Tensor | None, g: Tensor) -> State:
        """The state after a step from a point."""
        alpha = self.lengths(number, point.rows, factors)
        return self.method.advance(self.domain, point.state, point.y, g, alpha)

    def taken(self, tape: Tape, number: int, factors: Tensor | None) -> State:
        """The state after a step, in the graph of a tape and of the step size."""
        with torch.enable_grad():
            alpha = self.lengths(number, tape.rows, factors)
            return self.method.advance(self.domain, tape.state, tape.y, tape.g, alpha)

    def lengths(self, number: int, rows: Tensor | None, factors: Tensor | None) -> float | Tensor:
        """The step lengths that a step has, in the graph of the step size."""
        alpha = self.method.lengths(self.step_size, number, rows)
        return alpha if factors is None else alpha * factors

    def search(self, point: Point, number: int, g: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of the step lengths that a line search finds, and for which it found one."""
        assert self.method.search is not None
        whole = replace(
            point,
            state=tuple(s.detach() for s in point.state),
            y=point.y.detach(),
            energies=self.objective(point, point.energies),
            g=point.g.detach(),
        )
        direction = g.detach()

        def trial(factors: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            here = whole if places is None else chosen(self.problem, whole, places)
            step = direction if places is None else direction[places]
            u, y = here.state[0], here.y
            state = self.advance(here, number, factors, step)
            moved = replace(here, state=state, y=self.domain.point(state[0]))
            energies = self.problem.energies(here.xs, moved.y, here.rows)
            slope = row_dots(self.domain.pull(u, y, here.g), state[0] - u)
            rounding = 4 * torch.finfo(energies.dtype).eps * here.energies.abs()
            return here.energies - self.objective(moved, energies), -slope, rounding

        with torch.no_grad():
            return self.method.search.factors(trial, whole.energies)

    def objective(self, point: Point, energies: Tensor) -> Tensor:
        """F of a point, detached."""
        with torch.no_grad():
            penalty = self.domain.penalty(point.state[0].detach(), point.y.detach())
            return energies.detach() if penalty is None else energies.detach() + penalty

    def descend(
        self,
        recording: Callable[[int], Recording],
        *,
        on_step: Callable[[Step], None] | None = None,
        on_finish: Callable[[Tensor | None], None] = _nothing,
    ) -> Descent:
        """The descent from y0.

        Args:
            recording: How the point is computed that step number i starts from.
            on_step: Called with each step that was taken.
            on_finish: Called with the examples that have finished, after their last step.

        Raises:
            ValueError: If the energy is not finite at y0.
            DivergenceError: If too many examples diverge.
        """
        attached = recording(0) == "attached"
        with torch.set_grad_enabled(attached):
            y0 = self.y0 if attached else self.y0.detach()
            state = self.method.start(self.domain.coordinates(y0))
        with torch.enable_grad():
            point = self.look(state, None, self._how(recording, 0))
        check_start(point.energies, point.g)
        book = Book(
            self.problem, self.residuals, point, on_finish, self.keep_iterates, self.max_diverged
        )
        point = book.retire(point, self._has_arrived(None, point), InferenceStatus.CONVERGED)
        for number in range(self.method.num_steps):
            if not len(point.y):
                break
            how = self._how(recording, number + 1)
            point, factors, following = self._take(point, number, how, book)
            if not len(point.y):
                break
            if on_step is not None:
                g, in_chain = point.g.detach(), point.recording == "chain"
                on_step(Step(number, point.rows, point.state, g, factors, in_chain))
            book.stepped(following)
            arrived = self._has_arrived(point, following)
            point = book.retire(following, arrived, InferenceStatus.CONVERGED)
        everyone = torch.ones_like(point.energies, dtype=torch.bool)
        book.retire(point, everyone, InferenceStatus.STEP_LIMIT)
        return book.closed()

    def _how(self, recording: Callable[[int], Recording], number: int) -> Recording:
        """How the point is computed that a step starts from, or that the last one ends at."""
        is_last = number == self.method.num_steps
        how = recording(number - 1 if is_last else number)
        if how == "values" and self.method.is_second_order and not is_last:
            return "tape"
        return how

    def _take(
        self, point: Point, number: int, how: Recording, book: Book
    ) -> tuple[Point, Tensor | None, Point]:
        """The examples that took a step, by which factors, and where it led."""
        direction, factors = self._direction(point), None
        if self.method.search is not None:
            factors, found = self.search(point, number, direction)
            if not bool(found.all()):
                point = book.retire(point, ~found, InferenceStatus.LINE_SEARCH_FAILED)
                direction, factors = direction[found], factors[found]
        following = self._step(point, number, factors, direction, how) if len(point.y) else point
        if all_finite(following.energies, following.g):
            return point, factors, following
        fine = are_finite(following.energies, following.g)
        if not bool(fine.all()):
            point = book.retire(point, ~fine, InferenceStatus.DIVERGED)
            direction = direction[fine]
            factors = None if factors is None else factors[fine]
            if len(point.y):
                following = self._step(point, number, factors, direction, how)
        return point, factors, following

    def _step(
        self,
        point: Point,
        number: int,
        factors: Tensor | None,
        direction: Tensor,
        recording: Recording,
    ) -> Point:
        """Where a step leads to."""
        with torch.set_grad_enabled(point.has_graph):
            state = self.advance(point, number, factors, direction)
        with torch.enable_grad():
            if not point.has_graph or number + 1 < self.method.num_steps:
                xs = point.xs if recording == point.recording != "tape" else None
                return self.look(state, point.rows, recording, xs)
            # the last gradient is for the residual alone
            y, final = self.domain.point(state[0]), self.look(state, point.rows, "values")
            return replace(final, state=state, y=y, recording=recording)

    def _direction(self, point: Point) -> Tensor:
        if isinstance(self.method, NewtonDescent):
            with torch.enable_grad():
                tape = point.tape or taped(self.problem, point.y, point.rows)
            return self.method.direction(
                self.problem, self.domain, point.state[0], point.rows, tape
            )
        return point.g

    def residuals(self, point: Point) -> Tensor:
        """The norms of the projected gradient by u, (k,)."""
        with torch.no_grad():
            return self.domain.residuals(point.state[0], point.y, point.g).detach()

    def _has_arrived(self, before: Point | None, after: Point) -> Tensor | None:
        """Which examples meet a tolerance; None where there is none to meet."""
        arrived = None
        if self.method.gtol:
            arrived = self.residuals(after) <= self.method.gtol
        if self.method.rtol and before is not None:
            y = after.y.detach()
            settled = row_norms(y - before.y.detach()) <= self.method.rtol * row_norms(y)
            arrived = settled if arrived is None else arrived | settled
        return arrived
