"""Checks of the optimizers' options, and of what their solvers return."""

from hvpopt.optim.report import Outcome
from hvpopt.solvers.result import Solution, Status
from hvpopt.solvers.stopping import ForcingTerm, StoppingRule

_BROKEN = {
    Status.BREAKDOWN: Outcome.NONFINITE_PRODUCT,
    Status.INDEFINITE_PRECONDITIONER: Outcome.BROKEN_PRECONDITIONER,
}


def failure_of(solution: Solution) -> Outcome | None:
    """How a step fails whose solver broke down before it took one of its own; else None."""
    return _BROKEN.get(solution.status) if solution.num_steps == 0 else None


def check_stop(rule: StoppingRule | ForcingTerm) -> StoppingRule | ForcingTerm:
    """The rule, if it is one.

    Raises:
        ValueError: if it is not.
    """
    if callable(rule) or isinstance(rule, ForcingTerm):
        return rule
    raise ValueError(
        f"cg_stop={rule!r} is no stopping rule: expected one of hvpopt.solvers.stopping, such as "
        "ResidualNorm(rtol=1e-3) or EisenstatWalker()."
    )


def check_flag(name: str, value: bool) -> bool:
    """``value``, if it is True or False.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: expected True or False.")
    return value
