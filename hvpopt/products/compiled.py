"""Compiled products: a bounded cache over ``torch.compile``, and eager ones where it fails."""

import functools
import itertools
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch

from hvpopt.products.surroundings import in_transform

MAX_FUNCTIONS = 32
"""How many functions keep what was compiled for them."""

_numbers = itertools.count()


class CompiledFunction:
    """A function whose calls are compiled, or run as they are once that has failed.

    ``torch.compile`` keeps its results with the function's code object and gives up after eight.
    A copy with a code object of its own, for each function that is differentiated, keeps these
    apart, and its results are freed with it.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        assert isinstance(function, types.FunctionType)
        assert function.__closure__ is None
        code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
        copy = types.FunctionType(code, function.__globals__)
        # One compilation a shape: with symbolic ones torch.func is less well supported.
        self._compiled = torch.compile(copy, fullgraph=True, dynamic=False)
        self._function = function
        self._has_failed = self._has_warned = False
        self.is_new = True

    def __call__(self, *operands: Any) -> Any:
        """The function's value; a failure to compile is warned of once.

        Raises:
            What the function itself raises.
        """
        with torch.no_grad():  # results are values, compiled or not
            if self._has_failed:
                return self._function(*operands)
            try:
                return self.compiled(*operands)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                value = self._function(*operands)  # raises again what is not the compiler's doing
                self.give_up(error)
                return value

    def compiled(self, *operands: Any) -> Any:
        """The compiled function's value.

        Raises:
            Whatever the compiler or the function raises.
        """
        self.is_new = False
        return self._compiled(*operands)

    @property
    def has_failed(self) -> bool:
        """Whether calls are no longer compiled."""
        return self._has_failed

    def give_up(self, error: Exception) -> None:
        """Runs eagerly from now on; what is compiled for other shapes is kept in use."""
        limit = "RecompileLimit" in type(error).__name__
        self._has_failed = not limit
        if self._has_warned:
            return
        self._has_warned = True
        if limit:
            why = (
                "it was compiled too often, for ever new shapes or captured objects: give it the "
                "same function object, and what changes as tensors of one shape among *args"
            )
        else:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            why = f"{type(error).__name__}: {' '.join(lines[:2]).rstrip('.')}"
        warnings.warn(f"compile=True falls back to eager execution: {why}.", stacklevel=2)


_cache: OrderedDict[Hashable, CompiledFunction] = OrderedDict()


def compiled_for(
    function: Callable[..., Any], f: Callable[..., Any], variant: Hashable = None
) -> CompiledFunction:
    """``function`` compiled for use with ``f``, from the cache where it is there.

    Raises:
        ValueError: Inside a transform of ``torch.func``.
    """
    if in_transform():
        raise ValueError(
            "compile=True is inside a torch.func transform, which torch.compile cannot be: "
            "leave it out, and compile the whole."
        )
    key = (function, _code(f), variant)
    if key not in _cache:
        _cache[key] = CompiledFunction(function)
    _cache.move_to_end(key)
    while len(_cache) > MAX_FUNCTIONS:
        _cache.popitem(last=False)
    return _cache[key]


def _code(f: Callable[..., Any]) -> Hashable:
    """What functions share that can share a cache: torch.compile tells the rest apart itself."""
    if isinstance(f, functools.partial):
        return _code(f.func)
    if isinstance(f, types.MethodType):
        return _code(f.__func__)
    return type(f), getattr(f, "__code__", None)
