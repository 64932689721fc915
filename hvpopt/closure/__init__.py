"""A training closure as an oracle: its loss, gradient, and Hessian or GGN products.

The closure is the zero-argument function that every torch optimizer's ``step`` receives: it
computes a loss, clears the gradients, calls ``backward()`` and returns the loss. It is what
Lightning passes under automatic optimization.
"""

from hvpopt.closure.oracle import ClosureOracle
from hvpopt.closure.runs import NO_BACKWARD, NoBackwardError

__all__ = ["NO_BACKWARD", "ClosureOracle", "NoBackwardError"]
