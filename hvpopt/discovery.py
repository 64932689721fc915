"""Finds the modules that a training closure uses, from what it refers to."""

import functools
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

_SEARCH_DEPTH = 6


def find_modules(closure: object) -> list[nn.Module]:
    """The modules that a closure refers to: bound, as argument, in a cell, by a global name."""
    found: dict[int, nn.Module] = {}
    visited: set[int] = set()

    def visit(thing: Any, depth: int) -> None:
        if depth > _SEARCH_DEPTH or id(thing) in visited:
            return
        visited.add(id(thing))
        if isinstance(thing, nn.Module):
            found.setdefault(id(thing), thing)
        elif isinstance(thing, functools.partial):
            for part in (thing.func, *thing.args, *thing.keywords.values()):
                visit(part, depth + 1)
        elif inspect.ismethod(thing):
            visit(thing.__self__, depth + 1)
            visit(thing.__func__, depth + 1)
        elif inspect.isfunction(thing):
            for part in _references(thing):
                visit(part, depth + 1)
        elif callable(thing) or depth <= 2:
            for part in vars(thing).values() if hasattr(thing, "__dict__") else ():
                if isinstance(part, nn.Module) or callable(part):
                    visit(part, depth + 1)

    visit(closure, 0)
    return list(found.values())


def _references(function: Any) -> Iterator[Any]:
    """What a function's cells, its defaults and the global names in its code refer to."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a cell that is not filled yet
            continue
    yield from function.__defaults__ or ()
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, nn.Module) or inspect.isfunction(value):
            yield value
