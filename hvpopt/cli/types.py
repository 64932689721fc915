"""Whether a configured value fits an annotation of the constructor that gets it."""

from __future__ import annotations

import inspect
import os
import types
import typing
from pathlib import Path
from typing import Any

__all__ = ["accepts", "annotation_text", "type_hints"]


def type_hints(target: Any) -> dict[str, Any]:
    """Annotations of a callable's arguments; none where they cannot be evaluated."""
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(inspect.unwrap(function))
    except (NameError, TypeError, AttributeError):  # names that only a type checker sees
        return {}


def accepts(hint: Any, value: Any) -> bool:
    """Whether a plain configured value can be meant for an annotation.

    Says no only where it is sure; a mapping may stand for any object that is yet to be built.

    Example:
        >>> accepts(float, 1), accepts(float, "big"), accepts(int | None, None), accepts(int, True)
        (True, False, True, False)
    """
    if hint is Any or isinstance(value, dict):
        return True
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(accepts(arg, value) for arg in args)
    if origin is typing.Literal:
        return value in args
    if origin is typing.Annotated:
        return accepts(args[0], value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(value, list):
        return _accepts_list(origin or hint, args, value)
    if hint in (Path, os.PathLike) or origin is os.PathLike:
        return isinstance(value, str)
    kind = origin or hint
    if not inspect.isclass(kind) or kind is object:
        return True
    return isinstance(value, kind)


def _accepts_list(kind: Any, args: tuple[Any, ...], value: list[Any]) -> bool:
    if not inspect.isclass(kind) or kind is object:
        return True
    if not issubclass(list, kind) and kind is not tuple:
        return False
    if len(args) == 1 or (len(args) == 2 and args[1] is Ellipsis):
        return all(accepts(args[0], item) for item in value)
    return kind is not tuple or not args or len(args) == len(value)


def annotation_text(hint: Any) -> str:
    """An annotation as a user would write it.

    Example:
        >>> annotation_text(float | None), annotation_text(list[int])
        ('float or None', 'list[int]')
    """
    if hint is type(None):
        return "None"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(annotation_text(arg) for arg in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(repr(arg) for arg in typing.get_args(hint))
    if inspect.isclass(hint) and not typing.get_args(hint):
        return hint.__name__
    return str(hint).replace("collections.abc.", "").replace("typing.", "")
