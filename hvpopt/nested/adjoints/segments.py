"""Several steps backwards at once, by one reverse pass over their graph."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpopt.engines.base import reverse
from hvpopt.nested.adjoints.reverse import Sweep, at
from hvpopt.nested.book import Descent
from hvpopt.nested.methods import State
from hvpopt.nested.points import Step


@dataclass(frozen=True)
class Taken:
    """Which examples took a step, and by what a line search multiplied its lengths."""

    number: int
    rows: Tensor | None
    factors: Tensor | None


@dataclass(frozen=True)
class Segment:
    """The state that a segment starts from, and its steps."""

    state: State
    taken: list[Taken]
    in_chain: bool
    """Whether the descent recorded the steps, with the state as the graph's leaves."""

    @classmethod
    def of(cls, step: Step) -> "Segment":
        """A segment of one step."""
        return cls(step.state, [Taken(step.number, step.rows, step.factors)], step.in_chain)

    def extended(self, step: Step, length: int) -> bool:
        """Whether there was room for a step, which then belongs to the segment."""
        if len(self.taken) >= length or step.in_chain != self.in_chain:
            return False
        self.taken.append(Taken(step.number, step.rows, step.factors))
        return True


class SegmentSweep(Sweep):
    """The way back, one segment's graph at a time."""

    def back_through_segments(self, segments: Iterable[Segment]) -> None:
        """Takes the steps of segments again, and goes back through them, the last one first."""
        for segment in segments:
            self._retake(segment)

    def back_through_chain(self, segment: Segment, end: Descent) -> None:
        """Goes back through the last steps, which the descent recorded on its way to its end."""
        ends = list(zip(end.state, self.cotangents, strict=True))
        if self.path is not None:
            assert end.iterates is not None
            times = torch.arange(len(self.path), device=self.path.device).unsqueeze(1)
            before_end = (times < end.steps).to(self.path.dtype)
            before_end = before_end.view(*before_end.shape, *[1] * (self.path.dim() - 2))
            ends.append((end.iterates, self.path * before_end))
        self._reverse(segment, segment.state, ends)

    def _retake(self, segment: Segment) -> None:
        run, problem = self.run, self.run.problem
        start = tuple(s.detach().clone().requires_grad_() for s in segment.state)
        state, rows = start, segment.taken[0].rows
        xs = problem.select(rows, "chain")
        ends: list[tuple[Tensor, Tensor]] = []
        for step in segment.taken:
            if step.rows is not None and (rows is None or len(rows) != len(step.rows)):
                state = self._leave(state, rows, step.rows, ends)
                rows, xs = step.rows, problem.select(step.rows, "chain")
            y = run.domain.point(state[0])
            y = y if y.requires_grad else y.detach().requires_grad_()
            _, g = problem.gradient(xs, y, rows, create_graph=True)
            if self.path is not None:
                ends.append((y, at(self.path[step.number], rows)))
            alpha = run.lengths(step.number, rows, step.factors)
            state = run.method.advance(run.domain, state, y, g, alpha)
        ends += [(s, at(c, rows)) for s, c in zip(state, self.cotangents, strict=True)]
        self._reverse(segment, start, ends)

    def _reverse(self, segment: Segment, start: State, ends: list[tuple[Tensor, Tensor]]) -> None:
        """The cotangents of a segment's start, of those of what it leads to."""
        run, problem = self.run, self.run.problem
        goes_on = segment.taken[0].number > 0 or run.y0.requires_grad
        start = start if goes_on else ()
        by = [*start, *problem.leaves, *problem.theta, *self.sizes]
        found = reverse([e for e, _ in ends], by, [c for _, c in ends], retain_graph=False)
        self.report.num_products += len(segment.taken)
        if self.sizes:
            self.add_sizes(found.pop())
        if goes_on:
            moved = [m for m in found[: len(start)] if m is not None]
            self.replace(segment.taken[0].rows, moved)
        self.sums.add(found[len(start) :], None)

    def _leave(
        self, state: State, rows: Tensor | None, after: Tensor, ends: list[tuple[Tensor, Tensor]]
    ) -> State:
        """The state of those who go on; the others' ends here."""
        here = torch.arange(len(state[0]), device=after.device) if rows is None else rows
        stay = torch.isin(here, after)
        for s, c in zip(state, self.cotangents, strict=True):
            ends.append((s[~stay], c[here[~stay]]))
        return tuple(s[stay] for s in state)
