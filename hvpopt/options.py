"""Checks of numeric options, where they are given."""

import math
from numbers import Integral, Real


def check_range(name: str, value: float, low: float, high: float = math.inf) -> float:
    """``value``, if low ≤ value ≤ high.

    Raises:
        ValueError: if it is not.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:
        bound = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise ValueError(f"{name}={value!r} is out of range: expected a number {bound}.")
    return value


def check_count(name: str, value: int) -> int:
    """``value``, if it is a whole number above zero.

    Raises:
        ValueError: if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}={value!r} is out of range: expected a whole number at least 1.")
    return int(value)
