"""Unrolled steps whose tape is kept for one segment at a time."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hvpopt.nested.adjoints.base import Adjoint, AdjointReport, Gradients, attached
from hvpopt.nested.adjoints.segments import Segment, SegmentSweep
from hvpopt.nested.book import Descent
from hvpopt.nested.descent import Run
from hvpopt.nested.points import Step
from hvpopt.options import check_count


@dataclass(frozen=True)
class Checkpointed(Adjoint):
    """The unrolled gradient, computed anew segment by segment.

    The descent keeps the state at the start of each segment; on the way back a segment's steps
    are taken again, with their tape. The tape is that of one segment.

    Args:
        num_segments: How many; None for the square root of the number of steps, rounded up.

    Raises:
        ValueError: For ``num_segments`` < 1.

    Source: Griewank and Walther, Evaluating Derivatives (2008), chapter 12; segments of equal
    length.
    """

    name: ClassVar[str] = "checkpointed"
    follows_iterates: ClassVar[bool] = True

    num_segments: int | None = None

    def __post_init__(self) -> None:
        if self.num_segments is not None:
            check_count("num_segments", self.num_segments)

    def solve(self, run: Run, report: AdjointReport) -> Descent:
        """The descent, with the states that segments start from."""
        total = run.method.num_steps
        length = math.ceil(total / (self.num_segments or math.ceil(math.sqrt(total))))
        segments: list[Segment] = []

        def keep(step: Step) -> None:
            if not segments or not segments[-1].extended(step, length):
                segments.append(Segment.of(step))

        descent = run.descend(lambda number: "values", on_step=keep)

        def pullback(ybar: Tensor, path: Tensor | None) -> Gradients:
            with run.problem.again():
                sweep = SegmentSweep(run, descent, ybar, path, report, "reverse_over_reverse")
                sweep.back_through_segments(reversed(segments))
                return sweep.gradients(reaches_start=True)

        return attached(run, descent, self.name, pullback)
