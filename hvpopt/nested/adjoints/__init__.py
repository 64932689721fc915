"""Ways to differentiate through an inner minimisation."""

from hvpopt.nested.adjoints.back_optimization import BackOptimization, Truncated
from hvpopt.nested.adjoints.base import Adjoint, AdjointReport
from hvpopt.nested.adjoints.checkpointed import Checkpointed
from hvpopt.nested.adjoints.forward import ForwardMode
from hvpopt.nested.adjoints.implicit import Implicit
from hvpopt.nested.adjoints.neumann import Neumann
from hvpopt.nested.adjoints.unrolled import Unrolled

ADJOINTS: dict[str, type[Adjoint]] = {
    cls.name: cls
    for cls in (
        Unrolled,
        Checkpointed,
        BackOptimization,
        Truncated,
        Implicit,
        Neumann,
        ForwardMode,
    )
}
"""The adjoints by the words that stand for them in a config."""


def adjoint_named(name: str) -> Adjoint:
    """An adjoint with its defaults, by its word.

    Raises:
        ValueError: If there is none of that name.

    Examples:
        >>> adjoint_named("truncated")
        Truncated(num_steps=1, products='reverse_over_reverse')
    """
    if name not in ADJOINTS:
        known = ", ".join(map(repr, ADJOINTS))
        raise ValueError(f"adjoint={name!r} is unknown: choose one of {known}, or an Adjoint.")
    return ADJOINTS[name]()


__all__ = [
    "ADJOINTS",
    "Adjoint",
    "AdjointReport",
    "BackOptimization",
    "Checkpointed",
    "ForwardMode",
    "Implicit",
    "Neumann",
    "Truncated",
    "Unrolled",
    "adjoint_named",
]
