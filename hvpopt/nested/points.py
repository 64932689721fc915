"""What a descent passes from step to step, and what it keeps of a step."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hvpopt.nested.joint import Tape
from hvpopt.nested.methods import State
from hvpopt.nested.problem import InnerProblem

Recording = Literal["values", "tape", "attached"]
"""Whether a point is computed without a graph, with that of its gradient by y alone, or within
autograd's graph of everything before."""


@dataclass
class Point:
    """Some examples between two steps."""

    rows: Tensor | None
    """Which, (k,), rising; None for all."""
    xs: list[Tensor]
    """Their tensors of x."""
    state: State
    """(k, *shape) each, the coordinates first."""
    y: Tensor
    """(k, *shape)."""
    energies: Tensor
    """(k,)."""
    g: Tensor
    """∂E/∂y, (k, *shape)."""
    tape: Tape | None
    """g with its graph, where that was recorded."""


@dataclass
class Step:
    """A step that was taken, as a backward pass meets it; without a graph but the tape's."""

    number: int
    """Counted from 0: it leads from iterate `number` to the next."""
    rows: Tensor | None
    """Which examples took it, (k,), rising; None for all."""
    state: State
    """Where from, (k, *shape) each."""
    g: Tensor
    """∂E/∂y there."""
    factors: Tensor | None
    """By what a line search multiplied the step lengths, (k,)."""
    tape: Tape | None
    """g with its graph, where that was recorded; it can be used once."""


def chosen(problem: InnerProblem, point: Point, places: Tensor) -> Point:
    """The examples of a point in some places; their tape is lost."""
    rows = places if point.rows is None else point.rows[places]
    return Point(
        rows,
        problem.select(rows, "attached" if point.y.requires_grad else "values"),
        tuple(s[places] for s in point.state),
        point.y[places],
        point.energies[places],
        point.g[places],
        None,
    )
