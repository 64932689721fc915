"""What the measurements of a run have found last, and what they have cost."""

from collections.abc import Mapping
from typing import Any

from hvpopt.lightning.monitors.base import table
from hvpopt.lightning.monitors.budget import Budget


class Ledger:
    """Totals over the measurements of a run, and the last value of each scalar."""

    def __init__(self) -> None:
        self._num_measurements = self._num_products = 0
        self._last: dict[str, float] = {}

    def add(self, scalars: Mapping[str, float], num_products: int) -> None:
        """Enters a measurement."""
        self._num_measurements += 1
        self._num_products += num_products
        self._last.update(scalars)

    def text(self, budget: Budget, num_alerts: int) -> str:
        """A table in Markdown; empty where nothing was measured."""
        if not self._num_measurements:
            return ""
        totals = {
            "measurements": str(self._num_measurements),
            "products": str(self._num_products),
            "seconds": f"{budget.spent:.2f} ({budget.spent_share:.1%} of the training)",
            "stability alerts": str(num_alerts),
        }
        last = {f"last {name}": f"{value:.4g}" for name, value in self._last.items()}
        return table(totals | last, ("measured", "value"))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain numbers."""
        return {
            "num_measurements": self._num_measurements,
            "num_products": self._num_products,
            "last": dict(self._last),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._num_measurements = state["num_measurements"]
        self._num_products, self._last = state["num_products"], dict(state["last"])
