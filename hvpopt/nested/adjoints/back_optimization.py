"""The steps backwards, each from its iterate alone: the default."""

from collections import deque
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from hvpopt.nested.adjoints.base import Adjoint, AdjointReport, Gradients, attached
from hvpopt.nested.adjoints.reverse import Sweep
from hvpopt.nested.adjoints.segments import Segment, SegmentSweep
from hvpopt.nested.book import Descent
from hvpopt.nested.descent import Run
from hvpopt.nested.joint import Products, check_products
from hvpopt.nested.points import Recording, Step
from hvpopt.options import check_count

LEAST_TAPES, MOST_TAPES, TAPES_BYTES = 8, 64, 32 * 2**20
"""The bounds of `BackOptimization`'s own number of tapes, and what they may hold together."""


@dataclass(frozen=True)
class BackOptimization(Adjoint):
    """The gradient of the unrolled steps, from iterates and a bounded number of tapes.

    The descent keeps iterates, O(num_steps · n); on the way back the energy is evaluated again at
    each. So the tape of the energy's network is that of a few evaluations, whatever the number of
    steps. The last steps keep their tape from the descent, and cost what they do in `Unrolled`; the
    others are taken again, as many at a time. In a dense network a gradient is 2 products of
    matrices for a layer, and the unrolled step with its backward pass 6, so that a step that is
    taken again costs 8 / 6 of it.

    Measured for the smaller energy of the benchmark `adjoints` (159 labels, 64 units, batch 32),
    CPU time of one thread, torch 2.13, in times of `Unrolled` for 5, 20, 50, 100 and 200 steps: by
    default 1.1, 1.0, 1.0, 1.1 and 1.3, with 8 tapes 1.1, 1.3, 1.4, 1.4 and 1.4.

    Args:
        num_tapes: Of how many evaluations the tapes may exist at a time; 0 keeps none from the
            descent, and goes back step by step. None, the default: as many as 32 MiB hold, by an
            estimate, but at least 8 and at most 64.
        products: How (Hv, Cv) are computed (`hvpopt.nested.joint`); forward over reverse goes back
            step by step, and keeps no tape.

    Raises:
        ValueError: For options out of range.

    Source: Domke (AISTATS 2012), algorithms 1 to 3.
    """

    name: ClassVar[str] = "back_optimization"
    follows_iterates: ClassVar[bool] = True

    num_tapes: int | None = None
    products: Products = "reverse_over_reverse"

    def __post_init__(self) -> None:
        if self.num_tapes is not None and self.num_tapes != 0:
            check_count("num_tapes", self.num_tapes)
        check_products(self.products)

    def num_tapes_of(self, size: int) -> int:
        """How many tapes of ``size`` bytes there may be."""
        if self.num_tapes is not None:
            return self.num_tapes
        return min(MOST_TAPES, max(LEAST_TAPES, TAPES_BYTES // max(size, 1)))

    def solve(self, run: Run, report: AdjointReport) -> Descent:
        """The descent, with its steps kept."""
        if self.products == "forward_over_reverse":
            return self._step_by_step(run, report)
        num_tapes = self.num_tapes_of(run.problem.tape_bytes)
        first = run.method.num_steps - num_tapes
        segments: list[Segment] = []

        def keep(step: Step) -> None:
            last = segments[-1] if segments else None
            if last is None or not last.extended(step, num_tapes):
                segments.append(Segment.of(step))

        def recording(number: int) -> Recording:
            return "chain" if number >= first else "values"

        recorded = run.descend(recording, on_step=keep)
        descent, chain = recorded.without_graph(), [recorded]

        def pullback(ybar: Tensor, path: Tensor | None) -> Gradients:
            with run.problem.again():
                sweep = SegmentSweep(run, descent, ybar, path, report, self.products)
                rest = segments
                if chain and segments and segments[-1].in_chain:  # whose graph can be used once
                    sweep.back_through_chain(segments[-1], chain.pop())
                    rest = segments[:-1]
                sweep.back_through_segments(reversed(rest))
                return sweep.gradients(reaches_start=True)

        return attached(run, descent, self.name, pullback)

    def _step_by_step(self, run: Run, report: AdjointReport) -> Descent:
        steps: list[Step] = []
        descent = run.descend(lambda number: "values", on_step=steps.append)

        def pullback(ybar: Tensor, path: Tensor | None) -> Gradients:
            with run.problem.again():
                sweep = Sweep(run, descent, ybar, path, report, self.products)
                sweep.back_through(reversed(steps))
                return sweep.gradients(reaches_start=True)

        return attached(run, descent, self.name, pullback)


@dataclass(frozen=True)
class Truncated(Adjoint):
    """Back-optimisation of each example's last steps alone; what came before is taken as given.

    One step is enough where the descent converges fast or starts close to the minimiser; y0 gets
    no gradient.

    Args:
        num_steps: How many of the last steps.
        products: How (Hv, Cv) are computed (`hvpopt.nested.joint`).

    Raises:
        ValueError: For options out of range.

    Source: Shaban et al. (AISTATS 2019); one step: Bolte, Pauwels and Vaiter (NeurIPS 2023).
    """

    name: ClassVar[str] = "truncated"

    num_steps: int = 1
    products: Products = "reverse_over_reverse"

    def __post_init__(self) -> None:
        check_count("num_steps", self.num_steps)
        check_products(self.products)

    def solve(self, run: Run, report: AdjointReport) -> Descent:
        """The descent, with the last steps of each example kept."""
        recent: deque[Step] = deque(maxlen=self.num_steps)
        kept: list[Step] = []

        def finish(rows: Tensor | None) -> None:
            kept.extend(step if rows is None else _of(step, rows) for step in recent)

        descent = run.descend(lambda number: "values", on_step=recent.append, on_finish=finish)
        recent.clear()
        kept.sort(key=lambda step: -step.number)

        def pullback(ybar: Tensor, path: Tensor | None) -> Gradients:
            with run.problem.again():
                sweep = Sweep(run, descent, ybar, path, report, self.products)
                sweep.back_through(kept)
                return sweep.gradients(reaches_start=False)

        return attached(run, descent, self.name, pullback)


def _of(step: Step, rows: Tensor) -> Step:
    """A step of some of the examples that took it."""
    places = rows if step.rows is None else torch.searchsorted(step.rows, rows)
    return replace(
        step,
        rows=rows,
        state=tuple(s[places] for s in step.state),
        g=step.g[places],
        factors=None if step.factors is None else step.factors[places],
    )
