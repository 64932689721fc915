"""How often to measure, so that measuring costs at most a share of the time."""

import time
from collections.abc import Callable, Iterable
from typing import Any

from hvpopt.options import check_range


class Budget:
    """Says whether the next measurement fits into a share of the time since training began.

    With S seconds spent so far, T seconds since training began, measurements included, and c the
    sum of what the parts of the next measurement cost the last time, it fits where
    S + c ≤ share · (T + c). A part whose cost nobody knows is taken to cost as much as the
    dearest. The first measurement fits in any case, and those after it wait until it is paid for.

    Args:
        share: of the time, above 0 and at most 1; None for no limit.
        clock: gives seconds.

    Raises:
        ValueError: for a share out of range.

    Examples:
        >>> now = [0.0]
        >>> budget = Budget(0.1, clock=lambda: now[0])
        >>> budget.begin()
        >>> budget.allows(["trace"])
        True
        >>> budget.spend("trace", 2.0)
        >>> now[0] = 37.0
        >>> budget.allows(["trace"])
        False
        >>> now[0] = 38.0
        >>> budget.allows(["trace"]), budget.allows(["trace", "slices"])
        (True, False)
    """

    def __init__(
        self, share: float | None, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.share = None if share is None else _checked_share(share)
        self._clock = clock
        self._start: float | None = None
        self._earlier = 0.0
        self._costs: dict[str, float] = {}
        self.spent = 0.0

    def begin(self) -> None:
        """Starts the clock, where it does not run."""
        if self._start is None:
            self._start = self._clock()

    def end(self) -> None:
        """Stops it; what has passed is kept."""
        self._earlier, self._start = self.elapsed, None

    @property
    def elapsed(self) -> float:
        """Seconds of training, those of measurements and of earlier runs included."""
        return self._earlier + (0.0 if self._start is None else self._clock() - self._start)

    @property
    def spent_share(self) -> float:
        """The share of the time that went into measurements; 0 where none has passed."""
        return self.spent / self.elapsed if self.elapsed > 0 else 0.0

    def allows(self, parts: Iterable[str], *, unknown: float | None = None) -> bool:
        """Whether a measurement of these parts fits now.

        Args:
            parts: their names.
            unknown: the cost of a part that has not been met.
        """
        if self.share is None or self.spent == 0:
            return True
        if unknown is None:
            unknown = max(self._costs.values())
        cost = sum(self._costs.get(part, unknown) for part in parts)
        return self.spent + cost <= self.share * (self.elapsed + cost)

    def spend(self, part: str, seconds: float) -> None:
        """Notes what a part of a measurement has cost."""
        self._costs[part] = seconds
        self.spent += seconds

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain numbers."""
        return {"elapsed": self.elapsed, "spent": self.spent, "costs": dict(self._costs)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; a running clock starts anew."""
        self._earlier, self.spent = state["elapsed"], state["spent"]
        self._costs = dict(state["costs"])
        self._start = None if self._start is None else self._clock()


def _checked_share(share: float) -> float:
    try:
        return check_range("budget", share, 1e-6, 1.0)
    except ValueError as error:
        raise ValueError(
            f"budget={share!r} is out of range: expected the share of the training time that "
            "measurements may cost, above 0 and at most 1 (0.05 are 5 %), or None for no limit."
        ) from error
