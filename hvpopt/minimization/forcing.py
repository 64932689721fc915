"""How accurately an inexact Newton step is solved for."""

import math
from typing import Literal

from hvpopt.minimization.objective import Point

ForcingName = Literal["sqrt", "eisenstat-walker"]


class Forcing:
    """The forcing terms η of a run: the step solves ‖H d + g‖ ≤ η ‖g‖.

    Args:
        rule: "sqrt" is min(cap, √‖g‖) (Nocedal and Wright, section 7.1, with a cap of ½);
            "eisenstat-walker" their second choice, 0.9 (‖g‖/‖g₋‖)², safeguarded and at most the
            cap; or a fixed number.
        cap: The largest η.

    Raises:
        ValueError: For another rule, or a number outside (0, 1).

    Source: Eisenstat and Walker, "Choosing the forcing terms in an inexact Newton method" (SIAM
    J. Sci. Comput. 17, 1996), equations 2.6 and the safeguard below it.
    """

    def __init__(self, rule: ForcingName | float, cap: float = 0.5) -> None:
        is_number = isinstance(rule, (int, float)) and not isinstance(rule, bool)
        if is_number and not 0 < float(rule) < 1:
            raise ValueError(f"forcing={rule} is out of range: give a number between 0 and 1.")
        if not is_number and rule not in ("sqrt", "eisenstat-walker"):
            raise ValueError(
                f"forcing={rule!r} is unknown: choose 'sqrt', 'eisenstat-walker', or a number "
                "between 0 and 1."
            )
        self._rule, self._cap = rule, cap
        self._last_norm = self._last_term = math.nan

    def rtol(self, point: Point) -> float:
        """η at a point; called once an iteration."""
        if isinstance(self._rule, (int, float)):
            return float(self._rule)
        if self._rule == "sqrt":
            return max(min(self._cap, math.sqrt(point.grad_norm)), 1e-12)
        term = self._cap
        if math.isfinite(self._last_norm):
            term = 0.9 * (point.grad_norm / self._last_norm) ** 2
            safeguard = 0.9 * self._last_term**2
            if safeguard > 0.1:
                term = max(term, safeguard)
        term = max(min(self._cap, term), 1e-12)
        self._last_norm, self._last_term = point.grad_norm, term
        return term
