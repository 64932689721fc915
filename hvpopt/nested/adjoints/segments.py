"""Several steps backwards at once, by one reverse pass over their graph."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpopt.engines.base import reverse
from hvpopt.nested.adjoints.reverse import Sweep, at
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

    @classmethod
    def of(cls, step: Step) -> "Segment":
        """A segment of one step."""
        return cls(step.state, [Taken(step.number, step.rows, step.factors)])

    def extended(self, step: Step, length: int) -> bool:
        """Whether there was room for a step, which then belongs to the segment."""
        if len(self.taken) >= length:
            return False
        self.taken.append(Taken(step.number, step.rows, step.factors))
        return True


class SegmentSweep(Sweep):
    """The way back, one segment's graph at a time."""

    def back_through_segments(self, segments: Iterable[Segment | Step]) -> None:
        """Takes the cotangents back through segments and single steps, the last one first."""
        for segment in segments:
            if isinstance(segment, Segment):
                self._back_through(segment)
            else:
                self.back_through([segment])

    def _back_through(self, segment: Segment) -> None:
        run, problem = self.run, self.run.problem
        goes_on = segment.taken[0].number > 0 or run.y0.requires_grad
        start = tuple(s.detach().clone().requires_grad_(goes_on) for s in segment.state)
        state, rows = start, segment.taken[0].rows
        xs = problem.select(rows)
        sources = [(rows, problem.leaves_of(xs))]
        ends: list[tuple[Tensor, Tensor]] = []
        for step in segment.taken:
            if step.rows is not None and (rows is None or len(rows) != len(step.rows)):
                state = self._leave(state, rows, step.rows, ends)
                rows, xs = step.rows, problem.select(step.rows)
                sources.append((rows, problem.leaves_of(xs)))
            y = run.domain.point(state[0])
            y = y if y.requires_grad else y.detach().requires_grad_()
            _, g = problem.gradient(xs, y, rows, create_graph=True)
            if self.path is not None:
                ends.append((y, at(self.path[step.number], rows)))
            alpha = run.lengths(step.number, rows, step.factors)
            state = run.method.advance(run.domain, state, y, g, alpha)
        ends += [(s, at(c, rows)) for s, c in zip(state, self.cotangents, strict=True)]
        leaves = [v for _, of in sources for v in of]
        start = start if goes_on else ()
        by = [*start, *leaves, *problem.theta, *self.sizes]
        found = reverse([e for e, _ in ends], by, [c for _, c in ends], retain_graph=False)
        self.report.num_products += len(segment.taken)
        if self.sizes:
            self.add_sizes(found.pop())
        moved = [found.pop(0) for _ in start]
        if goes_on:
            self.replace(segment.taken[0].rows, [m for m in moved if m is not None])
        for rows, of in sources:
            self.sums.add([found.pop(0) for _ in of], rows)
        self.sums.add([*[None] * len(problem.inputs), *found], None)

    def _leave(
        self, state: State, rows: Tensor | None, after: Tensor, ends: list[tuple[Tensor, Tensor]]
    ) -> State:
        """The state of those who go on; the others' ends here."""
        here = torch.arange(len(state[0]), device=after.device) if rows is None else rows
        stay = torch.isin(here, after)
        for s, c in zip(state, self.cotangents, strict=True):
            ends.append((s[~stay], c[here[~stay]]))
        return tuple(s[stay] for s in state)
