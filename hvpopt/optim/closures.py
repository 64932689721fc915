"""What Lightning hands an optimizer in the place of a closure that trains."""

from functools import partial
from typing import Any


def _innermost(closure: object) -> Any:
    """What Lightning's precision plugins wrap."""
    while isinstance(closure, partial) and closure.args:
        closure = closure.args[-1]
    return closure


def is_missing(closure: object) -> bool:
    """Whether there is none: Lightning passes an empty function on where a user passed nothing."""
    return closure is None or getattr(_innermost(closure), "__name__", "") == "do_nothing_closure"


def is_automatic(closure: object) -> bool:
    """Whether it is that of Lightning's automatic optimization, for a ``training_step``.

    One that returns None skips its batch, as often as it likes.
    """
    return hasattr(_innermost(closure), "_backward_fn")


def leaves_backward_out(closure: object) -> bool:
    """Whether Lightning made it without a backward pass.

    Its StochasticWeightAveraging does, for a last pass that updates the statistics of batch norm.
    """
    return is_automatic(closure) and _innermost(closure)._backward_fn is None
