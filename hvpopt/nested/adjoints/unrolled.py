"""Reverse mode through the steps themselves: the reference."""

from dataclasses import dataclass
from typing import ClassVar

from hvpopt.nested.adjoints.base import Adjoint, AdjointReport
from hvpopt.nested.book import Descent
from hvpopt.nested.descent import Run


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """Autograd through every step; its tape grows with the number of steps.

    The only one that may be differentiated again, and so the one for optimizers that need products
    of the training loss's second derivatives.
    """

    name: ClassVar[str] = "unrolled"
    follows_iterates: ClassVar[bool] = True

    def solve(self, run: Run, report: AdjointReport) -> Descent:
        """The descent within autograd's graph."""
        return run.descend(lambda number: "attached")
