"""How the inner minimisation of each example ended."""

from enum import Enum


class InferenceStatus(Enum):
    """How one example ended; the value is the sentence to show to a reader."""

    CONVERGED = "converged: its last step, or its residual, is as small as was asked for"
    STEP_LIMIT = (
        "stopped at the step limit; where a tolerance was given, allow more or longer steps"
    )
    LINE_SEARCH_FAILED = (
        "stopped where no step length lowers the energy enough: it is as low as the precision "
        "allows, or the energy is not smooth"
    )
    DIVERGED = (
        "diverged: the energy, its gradient or y became NaN or infinite, and the last finite "
        "iterate is returned; shorten the steps, search along a line, or bound the domain"
    )

    @property
    def code(self) -> int:
        """What stands for it in a tensor."""
        return _CODES[self]


_CODES = {status: code for code, status in enumerate(InferenceStatus)}
STATUSES = tuple(InferenceStatus)
"""What the codes mean: code i is ``STATUSES[i]``."""


class DivergenceError(RuntimeError):
    """Raised where more examples of a batch diverge than are allowed to."""
