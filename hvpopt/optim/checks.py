"""Checks of the optimizers' options, and of what their solvers return."""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

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


def check_seed(seed: int) -> int:
    """``seed``, if it is a whole number.

    Raises:
        ValueError: if it is not.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise ValueError(f"seed={seed!r}: expected a whole number.")
    return int(seed)


def check_group_options(
    optimizer: type[Any], group: Mapping[str, Any], options: Iterable[str]
) -> None:
    """Refuses a group's option that would be ignored without a word.

    Other keys pass: schedulers and users keep notes of their own in groups.

    Args:
        optimizer: the class.
        group: as given.
        options: those that may differ from group to group.

    Raises:
        ValueError: for an option of the optimizer that is not a group's, or one that is misspelt.
    """
    options = list(options)
    others = set(inspect.signature(optimizer).parameters) - {"params", *options}
    for key in group:
        if key in others:
            raise ValueError(
                f"{key}={group[key]!r} in a parameter group: {optimizer.__name__} has it for all "
                f"groups together; give it as an argument of its own."
            )
        near = difflib.get_close_matches(key, options, n=1, cutoff=0.85)
        if near and near != [key]:
            raise ValueError(
                f"A parameter group has the unknown option {key!r}: was {near[0]!r} meant?"
            )
