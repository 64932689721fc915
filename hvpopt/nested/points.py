"""What a descent passes from step to step, and what it keeps of a step."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hvpopt.nested.joint import Tape
from hvpopt.nested.methods import State
from hvpopt.nested.problem import InnerProblem

Recording = Literal["values", "tape", "chain", "attached"]
"""Whether a point is computed without a graph, with that of its gradient by y alone, within
autograd's graph of the steps since the first such point, or within that of everything before."""


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
    recording: Recording
    """How it was computed."""
    tape: Tape | None = None
    """g with its graph, where that was recorded by itself."""

    @property
    def has_graph(self) -> bool:
        """Whether the next step is to be in the graph of this point."""
        return self.recording in ("chain", "attached")


@dataclass(frozen=True)
class Step:
    """A step that was taken, as a backward pass meets it."""

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
    in_chain: bool
    """Whether the state is in a chain's graph: the first one of it is its leaf."""


def chosen(problem: InnerProblem, point: Point, places: Tensor) -> Point:
    """The examples of a point in some places; their tape is lost."""
    return Point(
        places if point.rows is None else point.rows[places],
        [problem.rows_of(v, places) for v in point.xs],
        tuple(s[places] for s in point.state),
        point.y[places],
        point.energies[places],
        point.g[places],
        point.recording,
    )
