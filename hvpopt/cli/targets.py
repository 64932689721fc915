"""What a configuration may construct, and with which arguments.

`_target_` can name any importable object, so a configuration file could run any program. Only
objects of the packages in `ALLOWED` (and those that the environment variable
HVPOPT_ALLOWED_TARGETS adds) are constructed.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hvpopt.cli.errors import UserError, nearest
from hvpopt.cli.types import accepts, annotation_text, type_hints

__all__ = ["ALLOWED", "argument_names", "check_targets", "resolve_target"]

ALLOWED = ("hvpopt", "lightning", "torch.nn", "torch.optim", "torchmetrics")
VARIABLE = "HVPOPT_ALLOWED_TARGETS"


def resolve_target(target: Any, key: str, more: Sequence[str] = ()) -> Any:
    """The object that a `_target_` names, if it is in an allowed package, also by its origin.

    Args:
        target: dotted path.
        key: the configuration's node that holds it, for messages.
        more: packages allowed besides `ALLOWED` and the environment's.

    Raises:
        UserError: if it is not allowed, or does not exist.
    """
    allowed = (*ALLOWED, *more, *_from_environment())
    if not isinstance(target, str) or not _is_within(target, allowed):
        raise UserError(_refusal(key, target, allowed))
    try:
        with _root_logger_configured():
            found = _imported(target)
    except (ImportError, AttributeError, ValueError) as error:
        parent, _, name = target.rpartition(".")
        raise UserError(f"{key}._target_={target} does not exist.{_hint(parent, name)}") from error
    # torch.nn.modules.module.os.system is reached through an allowed name, but is not torch's.
    origin = getattr(found, "__module__", None) or ""
    if not callable(found) or not _is_within(origin, allowed):
        raise UserError(_refusal(key, target, allowed, origin))
    return found


def argument_names(target: Any) -> set[str] | None:
    """Names of a callable's keyword arguments; None if it takes any."""
    parameters = inspect.signature(target).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {parameter.name for parameter in parameters if parameter.kind in kinds}


def check_targets(config: Mapping[str, Any], more: Sequence[str] = ()) -> None:
    """Checks every `_target_` of a configuration (plain containers) and its arguments.

    Raises:
        UserError: for the first target that is not allowed or does not exist, the first argument
            that it does not have, or the first value of a type that it does not accept.
    """
    for key, node in _nodes(config):
        target = resolve_target(node["_target_"], key, more)
        names, hints = argument_names(target), type_hints(target)
        for name, value in node.items():
            if name in ("_target_", "_partial_", "_args_", "_recursive_", "_convert_"):
                continue
            if names is not None and name not in names:
                raise UserError(unknown_argument(key, name, node["_target_"], names))
            if name in hints and not accepts(hints[name], value):
                raise UserError(
                    f"{key}.{name}={value!r} is not accepted: {node['_target_']} expects "
                    f"{annotation_text(hints[name])}."
                )


def unknown_argument(key: str, name: str, target: str, names: set[str]) -> str:
    """The sentence about an argument that a target does not have."""
    return f"{target} ({key}) has no argument {name!r}.{nearest(name, names)}"


@contextmanager
def _root_logger_configured() -> Iterator[None]:
    """Lets Lightning, if it is imported in here, find a configured root logger and leave its
    messages to it; else it prints for itself, and Hydra's job log misses them."""
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def _nodes(node: Any, key: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield key, node
        for name, child in node.items():
            yield from _nodes(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from _nodes(child, f"{key}[{index}]")


def _from_environment() -> list[str]:
    return [part.strip() for part in os.environ.get(VARIABLE, "").split(",") if part.strip()]


def _is_within(path: str, prefixes: Sequence[str]) -> bool:
    return any(path == prefix or path.startswith(f"{prefix}.") for prefix in prefixes)


def _refusal(key: str, target: Any, allowed: Sequence[str], origin: str = "") -> str:
    where = f" (it belongs to {origin})" if origin else ""
    return (
        f"{key}._target_={target} is not allowed{where}: a configuration constructs objects of "
        f"{', '.join(allowed)} only. To allow another package, set the environment variable "
        f"{VARIABLE}=PACKAGE (several separated by commas)."
    )


def _imported(path: str) -> Any:
    """What a dotted path names, importing modules on the way."""
    first, *rest = path.split(".")
    found: Any = importlib.import_module(first)
    name = first
    for part in rest:
        name = f"{name}.{part}"
        if not hasattr(found, part):
            importlib.import_module(name)
        found = getattr(found, part)
    return found


def _hint(parent: str, name: str) -> str:
    try:
        names = [other for other in dir(_imported(parent)) if other[0] != "_"]
    except (ImportError, AttributeError, ValueError):
        return ""
    hint = nearest(name, names)
    return hint if hint.startswith(" Did") else ""
