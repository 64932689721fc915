"""How accurately an inexact Newton step is solved for."""

from typing import Literal

from hvpopt.minimization.objective import Point
from hvpopt.solvers.stopping import EisenstatWalker, ForcingTerm, SquareRoot

ForcingName = Literal["sqrt", "eisenstat-walker"]


class Forcing:
    """The forcing terms η of a run: the step solves ‖H d + g‖ ≤ η ‖g‖.

    Args:
        rule: "sqrt" (`SquareRoot`), "eisenstat-walker" (`EisenstatWalker`), or a fixed number.
        cap: The largest η.

    Raises:
        ValueError: For another rule, or a number outside (0, 1).
    """

    def __init__(self, rule: ForcingName | float, cap: float = 0.5) -> None:
        is_number = isinstance(rule, (int, float)) and not isinstance(rule, bool)
        if is_number and not 0 < float(rule) < 1:
            raise ValueError(f"forcing={rule} is out of range: give a number between 0 and 1.")
        terms: dict[object, ForcingTerm] = {
            "sqrt": SquareRoot(cap),
            "eisenstat-walker": EisenstatWalker(cap=cap),
        }
        if not is_number and rule not in terms:
            raise ValueError(
                f"forcing={rule!r} is unknown: choose 'sqrt', 'eisenstat-walker', or a number "
                "between 0 and 1."
            )
        self._rule: float | ForcingTerm = float(rule) if is_number else terms[rule]
        self._last: tuple[float, float] | tuple[()] = ()

    def rtol(self, point: Point) -> float:
        """η at a point; called once an iteration."""
        if isinstance(self._rule, float):
            return self._rule
        term = self._rule.rtol(point.grad_norm, *self._last)
        self._last = (point.grad_norm, term)
        return term
