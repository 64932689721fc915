"""What is kept of earlier measurements, for pictures over time."""

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class History(Generic[T]):
    """The findings of past steps, at most so many: when full, every second one goes.

    A picture of them is worth drawing anew when there are four times as many as in the last one.

    Args:
        capacity: the most that are kept, at least 2.

    Examples:
        >>> history = History(4)
        >>> for step in range(9):
        ...     history.add(step, "found")
        >>> history.steps
        [0, 4, 8]
    """

    def __init__(self, capacity: int = 64) -> None:
        self._capacity = capacity
        self._stride = 1
        self._count = self._drawn = 0
        self.steps: list[int] = []
        self.found: list[T] = []

    def add(self, step: int, found: T) -> None:
        """Keeps what was found at a step, if it is that one's turn."""
        if self._count % self._stride == 0:
            if len(self.steps) == self._capacity:
                self._stride *= 2
                self.steps, self.found = self.steps[::2], self.found[::2]
            if self._count % self._stride == 0:
                self.steps.append(step)
                self.found.append(found)
        self._count += 1

    def is_worth_drawing(self, *, at_end: bool = False) -> bool:
        """Whether there is much that the last picture does not show; at the end, anything."""
        enough = self._drawn + 1 if at_end else max(4 * self._drawn, 1)
        return self._count >= enough

    def draw(self) -> None:
        """Notes that a picture shows all that there is."""
        self._drawn = self._count

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; as portable as what was found."""
        return {
            "stride": self._stride,
            "count": self._count,
            "drawn": self._drawn,
            "steps": list(self.steps),
            "found": list(self.found),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._stride, self._count, self._drawn = state["stride"], state["count"], state["drawn"]
        self.steps, self.found = list(state["steps"]), list(state["found"])
