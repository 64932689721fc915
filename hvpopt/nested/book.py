"""What has become of each example of a batch."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hvpopt.nested.methods import State
from hvpopt.nested.points import Point, chosen
from hvpopt.nested.problem import InnerProblem
from hvpopt.nested.status import DivergenceError, InferenceStatus


@dataclass
class Descent:
    """What a descent comes to; everything is of the whole batch."""

    y: Tensor
    """(batch, *shape), in the graph where points are attached."""
    iterates: Tensor | None
    """(num_steps + 1, batch, *shape), where asked for."""
    state: State
    """The last coordinates and what goes with them, in the graph where points have one."""
    energies: Tensor
    """(batch,) at y, detached."""
    residuals: Tensor
    """(batch,) at y, detached."""
    start_residuals: Tensor
    """(batch,) at y0, detached."""
    steps: Tensor
    """(batch,), int64."""
    status: Tensor
    """(batch,), codes of InferenceStatus."""
    energy_path: Tensor
    """(num_steps + 1, batch), detached."""

    def without_graph(self) -> "Descent":
        """The same values by themselves."""
        iterates = None if self.iterates is None else self.iterates.detach()
        state = tuple(s.detach() for s in self.state)
        return replace(self, y=self.y.detach(), iterates=iterates, state=state)


class Book:
    """What has become of each example."""

    def __init__(
        self,
        problem: InnerProblem,
        residuals: Callable[[Point], Tensor],
        point: Point,
        on_finish: Callable[[Tensor | None], None],
        keep_iterates: bool,
        max_diverged: float,
    ) -> None:
        self._problem, self._residuals, self._on_finish = problem, residuals, on_finish
        self._keep_iterates, self._max_diverged = keep_iterates, max_diverged
        size, device = len(point.y), point.y.device
        self._steps = torch.zeros(size, dtype=torch.int64, device=device)
        self._status = torch.full_like(self._steps, InferenceStatus.STEP_LIMIT.code)
        self._pieces: list[tuple[Tensor | None, Tensor, State, Tensor, Tensor]] = []
        self._paths = [point.energies.detach()]
        self._iterates = [point.y] if keep_iterates else []
        self._start_residuals = residuals(point)
        self._count = self._num_diverged = 0

    def stepped(self, point: Point) -> None:
        """Notes a step that some examples have taken."""
        self._count += 1
        self._paths.append(_put(self._paths[-1], point.rows, point.energies.detach()))
        if self._keep_iterates:
            self._iterates.append(_put(self._iterates[-1], point.rows, point.y))

    def retire(self, point: Point, mask: Tensor | None, status: InferenceStatus) -> Point:
        """Closes the accounts of some examples, and returns the others."""
        if mask is None or not bool(mask.any()):
            return point
        places = mask.nonzero()[:, 0]
        everyone = len(places) == len(mask)
        gone = point if everyone else chosen(self._problem, point, places)
        rows = slice(None) if gone.rows is None else gone.rows
        self._status[rows] = status.code
        self._steps[rows] = self._count
        residuals = self._residuals(gone)
        self._pieces.append((gone.rows, gone.y, gone.state, gone.energies.detach(), residuals))
        self._on_finish(gone.rows)
        if status is InferenceStatus.DIVERGED:
            self._num_diverged += len(places)
            self._check_divergence()
        return chosen(self._problem, point, (~mask).nonzero()[:, 0])

    def _check_divergence(self) -> None:
        size, allowed = len(self._steps), self._max_diverged
        if self._num_diverged > allowed * size:
            first = int((self._status == InferenceStatus.DIVERGED.code).nonzero()[0, 0])
            raise DivergenceError(
                f"The inner minimisation diverged for {self._num_diverged} of {size} examples "
                f"(example {first} after {int(self._steps[first])} steps), more than "
                f"max_diverged={allowed:g} allows: shorten step_size, give the method a "
                "line_search, or bound the domain."
            )

    def closed(self) -> Descent:
        """Everything, in the order of the batch."""
        rows = [p[0] for p in self._pieces]
        one_piece = len(rows) == 1
        order = None if one_piece else torch.cat([r for r in rows if r is not None]).argsort()

        def whole(parts: list[Tensor]) -> Tensor:
            return parts[0] if order is None else torch.cat(parts)[order]

        ys, states, energies, residuals = zip(*(p[1:] for p in self._pieces), strict=True)
        y = whole(list(ys))
        return Descent(
            y=y,
            iterates=torch.stack(self._iterates) if self._keep_iterates else None,
            state=tuple(whole(list(parts)) for parts in zip(*states, strict=True)),
            energies=whole(list(energies)),
            residuals=whole(list(residuals)),
            start_residuals=self._start_residuals,
            steps=self._steps,
            status=self._status,
            energy_path=torch.stack(self._paths),
        )


def _put(whole: Tensor, rows: Tensor | None, part: Tensor) -> Tensor:
    return part if rows is None else whole.index_copy(0, rows, part)
