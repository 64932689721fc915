"""When to measure what."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning as L

from hvpopt.lightning.monitors.budget import Budget
from hvpopt.lightning.monitors.measures import MEASURES
from hvpopt.options import check_count

DEFAULT_METRICS = {
    "sharpness": 1,
    "trace": 1,
    "layers": 1,
    "alignment": 2,
    "spectrum": 2,
    "slices": 16,
}
"""At every how many measurements each metric is taken."""


class Schedule:
    """Which metrics are due after a step: at the first step and every n-th, as far as they fit.

    Metrics that are due together are measured together, or wait together for the budget, so that
    dear ones get their turn. When training ends, those that fit are measured once more.

    Args:
        every_n_steps: steps from one measurement to the next, at least.
        metrics: names of metrics, or for each at every how many measurements it is taken.
        budget: the share of the time that measurements may cost; None for no limit.

    Raises:
        ValueError: for an argument out of range, or an unknown metric.
        TypeError: for metrics that are no names.
    """

    def __init__(
        self,
        every_n_steps: int,
        metrics: Sequence[str] | Mapping[str, int] | None,
        budget: float | None,
    ) -> None:
        self._every = check_count("every_n_steps", every_n_steps)
        self.metrics = _checked_metrics(metrics)
        self.budget = Budget(budget)
        self._last_step = -1
        self._measured: dict[str, int] = {}
        self.num_measurements = 0

    def due(self, trainer: L.Trainer) -> list[str]:
        """The metrics to measure now; none where it is not time, or they do not fit.

        All ranks are told the same.
        """
        step = trainer.global_step
        is_time = step == 1 or (step > 0 and step % self._every == 0)
        if not is_time or step == self._last_step:  # the other micro-batches of a step
            return []
        self._last_step = step
        turn = self.num_measurements + 1
        names = [name for name, k in self.metrics.items() if turn % k == 0]
        if not self._agreed(trainer, self.budget.allows(names)):
            return []
        if not names:
            self.num_measurements = turn
        return names

    def closing(self, trainer: L.Trainer) -> list[str]:
        """The metrics to measure when training ends: those that fit, and are not of this step."""
        names: list[str] = []
        for name in self.metrics:
            is_new = self._measured.get(name) != trainer.global_step
            if self._agreed(trainer, is_new and self.budget.allows([*names, name])):
                names.append(name)
        return names

    def _agreed(self, trainer: L.Trainer, fits: bool) -> bool:
        """What the first rank says, as the clocks of ranks differ."""
        return bool(trainer.strategy.broadcast(fits)) if trainer.world_size > 1 else fits

    def spend(self, step: int, costs: Mapping[str, float]) -> None:
        """Notes that a measurement was made, and the seconds that its parts have cost."""
        self.num_measurements += 1
        for part, seconds in costs.items():
            self.budget.spend(part, seconds)
            self._measured[part] = step

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain numbers."""
        return {
            "budget": self.budget.state_dict(),
            "last_step": self._last_step,
            "measured": dict(self._measured),
            "num_measurements": self.num_measurements,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.budget.load_state_dict(state["budget"])
        self._last_step, self._measured = state["last_step"], dict(state["measured"])
        self.num_measurements = state["num_measurements"]


def _checked_metrics(metrics: Sequence[str] | Mapping[str, int] | None) -> dict[str, int]:
    if metrics is None:
        return dict(DEFAULT_METRICS)
    names = [metrics] if isinstance(metrics, str) else metrics
    if not isinstance(names, Iterable):
        raise TypeError(
            f"metrics={metrics!r}; expected names, or a mapping from names to how often, of "
            f"{', '.join(MEASURES)}."
        )
    chosen = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, 1)
    for name, every in chosen.items():
        if name not in MEASURES:
            raise ValueError(f"metrics: {name!r} is unknown; choose from {', '.join(MEASURES)}.")
        check_count(f"metrics[{name!r}]", every)
    if not chosen:
        raise ValueError(f"metrics is empty: choose from {', '.join(MEASURES)}.")
    return chosen
