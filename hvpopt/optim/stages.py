"""The stages of a schedule of optimizers, and when one ends."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from hvpopt.options import check_count, check_range


class Stage:
    """One optimizer of a `Handover`, and when it hands over to the next.

    Args:
        optimizer: makes it from parameter groups: a class, such as ``torch.optim.Adam``, or a
            ``functools.partial`` of one.
        steps: it hands over after so many calls of ``step``.
        stall_tolerance: it hands over when the mean loss over ``stall_window`` steps is not below
            that over the window before by more than this fraction of its size; None switches this
            off. Whichever comes first counts.
        stall_window: in steps; over mini-batches the means should be steadier than the tolerance.
        options: the optimizer's own, such as ``lr``.

    Raises:
        TypeError: for an ``optimizer`` that cannot be called.
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        optimizer: Callable[..., Optimizer],
        steps: int | None = None,
        *,
        stall_tolerance: float | None = None,
        stall_window: int = 100,
        **options: Any,
    ) -> None:
        if not callable(optimizer) or isinstance(optimizer, Optimizer):
            raise TypeError(
                f"A stage's optimizer is made when the parameters are known: got a "
                f"{type(optimizer).__name__}, expected a class such as torch.optim.Adam, or a "
                "functools.partial of one (in a configuration: _partial_: true)."
            )
        self.steps = None if steps is None else check_count("steps", steps)
        self.stall_tolerance = (
            None if stall_tolerance is None else check_range("stall_tolerance", stall_tolerance, 0)
        )
        self.stall_window = check_count("stall_window", stall_window)
        self._make = partial(optimizer, **options)

    def __repr__(self) -> str:
        ends = {"steps": self.steps, "stall_tolerance": self.stall_tolerance}
        if self.stall_tolerance is not None:
            ends["stall_window"] = self.stall_window
        given = {k: v for k, v in ends.items() if v is not None} | self._make.keywords
        name = getattr(self._make.func, "__name__", repr(self._make.func))
        return f"Stage({', '.join([name, *(f'{k}={v!r}' for k, v in given.items())])})"

    @property
    def ends(self) -> bool:
        """Whether it ever hands over."""
        return self.steps is not None or self.stall_tolerance is not None

    def make(self, groups: list[dict[str, Any]]) -> Optimizer:
        """The optimizer.

        Raises:
            TypeError: if what is made is none.
        """
        made = self._make(groups)
        if not isinstance(made, Optimizer):
            raise TypeError(f"A stage made a {type(made).__name__}, expected a torch optimizer.")
        return made


@dataclass
class Position:
    """Where a schedule stands: in which stage, since when, and how its loss has been.

    Attributes:
        stage: the current one's number.
        num_steps: how many it has made.
        window_steps, window_sum: the losses since the last full window.
        last_mean: the mean loss over that window; None before the first.
        is_stalled: whether it was hardly below the one before.
    """

    stage: int = 0
    num_steps: int = 0
    window_steps: int = 0
    window_sum: float = 0.0
    last_mean: float | None = None
    is_stalled: bool = False

    def is_over(self, stage: Stage) -> bool:
        """Whether the next step is another stage's."""
        return self.is_stalled or (stage.steps is not None and self.num_steps >= stage.steps)

    def watch(
        self, loss: object, window: int, tolerance: float, average: Callable[[float], float]
    ) -> None:
        """Adds a loss to its window, and compares a full window with the one before.

        Args:
            loss: what a step returned; no number, and one that is not finite, leaves its window
                out of the comparison.
            window: steps in a window.
            tolerance: of the relative decrease.
            average: over the ranks, so that all hand over in the same step.
        """
        loss = loss.detach() if isinstance(loss, Tensor) else loss
        self.window_sum += float(loss) if isinstance(loss, (Tensor, float, int)) else math.nan
        self.window_steps += 1
        if self.window_steps < window:
            return
        mean, before = average(self.window_sum / self.window_steps), self.last_mean
        self.window_sum, self.window_steps = 0.0, 0
        if math.isfinite(mean):
            self.is_stalled = before is not None and before - mean <= tolerance * abs(before)
            self.last_mean = mean


def checked_stages(
    stages: Sequence[Stage] | Mapping[str, Stage | None],
) -> tuple[Stage, ...]:
    """The stages, if each but the last has an end.

    Raises:
        TypeError: for one that is no `Stage`.
        ValueError: for none, one without an end before the last, or an end of the last.
    """
    if isinstance(stages, Mapping):
        named = {f"stages[{name!r}]": s for name, s in stages.items() if s is not None}
    else:
        named = {f"stages[{i}]": s for i, s in enumerate(stages)}
    if not named:
        raise ValueError(f"stages={stages!r}: expected at least one hvpopt.Stage.")
    for name, stage in named.items():
        if not isinstance(stage, Stage):
            raise TypeError(
                f"{name} is a {type(stage).__name__}, expected a hvpopt.Stage: "
                "Stage(torch.optim.Adam, steps=1000, lr=1e-3), say."
            )
    *others, last = named
    for name in others:
        if not named[name].ends:
            raise ValueError(
                f"{name} never hands over to the next: give it steps= or stall_tolerance=."
            )
    if named[last].ends:
        raise ValueError(
            f"{last} is the last stage and has none to hand over to: leave out its steps= and "
            "stall_tolerance=."
        )
    return tuple(named.values())
