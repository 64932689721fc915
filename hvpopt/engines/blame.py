"""What to say where a model cannot be served: the module, the operation, and the remedy.

Torch says which kernel has no derivative, not whose it is. An error of that kind is read for the
operation; the place is read off its traceback, or looked for in one more run. Other errors, and
those that the closure raises without products too, are the user's own and stay as they are.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from hvpopt.engines.base import Runner
from hvpopt.engines.location import from_another_run, from_traceback, function_in_traceback
from hvpopt.engines.split import Curvature, curvature_name

_NO_DOUBLE_BACKWARD = re.compile(
    r"derivative for '?(?:\w+::)?(\w+)'? is not implemented"
    r"|The function '(?:\w+::)?(\w+)' is not differentiable with respect to argument"
)
_NO_FORWARD_MODE = re.compile(r"Trying to use forward AD with (?:\w+::)?(\w+)[\w.]* that does not")
_NO_FORMULA = re.compile(r"Trying to backward through (\S+?)(?:\.default)? but no autograd formula")
_NO_JVP = re.compile(r"You must implement the jvp function")
_NESTED = re.compile(r"Nested forward mode AD is not supported")
_ONCE = re.compile(r"marked (?:with @)?once_differentiable")
_REFUSED = re.compile(  # what hvpopt.engines.custom_functions says
    r"The (?P<what>backward of the custom autograd Function (?P<name>\S+) .*?): "
    r"(?P<fix>.*?)(?:, or choose .*)?\.$"
)
_OPERATOR = re.compile(r"GeneratedBackwardFor_(\w+?)(?:_default)?(?:Backward)?$")  # torch.library

_REPLACE = "replace the operation by differentiable ones"
_DIFFERENCES = "curvature='hessian', which goes through finite differences"


class UnsupportedOperationError(RuntimeError):
    """Raised where an operation in the closure lacks a derivative that a product needs.

    Attributes:
        short: what is missing and where, for a log.
    """

    def __init__(self, message: str, short: str = "") -> None:
        super().__init__(message)
        self.short = short


@dataclass(frozen=True)
class _Lack:
    """What is missing of an operation.

    Attributes:
        sentence: says it, with a gap where only the autograd node knows the operation's name.
        short: the same for a log.
        fix: what to do about the operation.
        exact: the exact engine that may do without, if any.
        concerns: whether an autograd node is of the operation.
        of_forward_pass: whether the closure's forward pass may raise it.
    """

    sentence: str
    short: str
    fix: str
    exact: str
    concerns: Callable[[Any], bool]
    of_forward_pass: bool = False


def explained(
    error: RuntimeError,
    *,
    requested: str,
    curvature: Curvature,
    run: Runner,
    modules: Callable[[], Sequence[nn.Module]],
) -> UnsupportedOperationError | None:
    """An engine's error in the user's terms; None if it is not about missing derivatives.

    Args:
        error: which torch or a check of ours has raised.
        requested: the engine that was asked for, or "auto".
        curvature: of what the products are.
        run: may run the closure once more, without a trace, to find the operation.
        modules: those of the closure that have been met.
    """
    lack = None if isinstance(error, UnsupportedOperationError) else _lack(error)
    if lack is None:
        return None
    place = from_traceback(error, modules()) if lack.of_forward_pass else None
    if place is None:
        try:
            place = from_another_run(run, lack.concerns, modules)
        except Exception:  # without products, too, the closure fails
            return None
    name = place.node.removesuffix("Backward") or "in use"
    sentence, short = lack.sentence.format(name=name), lack.short.format(name=name)
    where = f"M{str(place)[1:]}" if place.module is not None else f"In {place}"
    remedy = f"Choose {_choices(lack.exact, requested, curvature)}, or {lack.fix}."
    return UnsupportedOperationError(f"{where}: {sentence}. {remedy}", f"{short} in {place}")


def none_serves(failures: Mapping[str, Exception], curvature: Curvature) -> RuntimeError:
    """The error for when every engine has failed, each with its own.

    Args:
        failures: by the engines' names.
        curvature: of what the products were to be.
    """
    matrix = curvature_name(curvature)
    tried = "; ".join(f"{name}: {line(error)}" for name, error in failures.items())
    unsupported = any(isinstance(e, UnsupportedOperationError) for e in failures.values())
    if matrix == "hessian" or not unsupported:
        return RuntimeError(f"No engine can differentiate this closure twice ({tried}).")
    return UnsupportedOperationError(
        f"No engine has products of the {matrix} for this closure ({tried}). "
        f"Choose {_DIFFERENCES}, or {_REPLACE}.",
        tried,
    )


def line(error: Exception) -> str:
    """An error in one line, without a full stop."""
    short = getattr(error, "short", "") or str(error).strip().partition("\n")[0]
    return short.rstrip(".")


def _choices(exact: str, requested: str, curvature: Curvature) -> str:
    """What may serve in the place of an engine that does not."""
    engine = [f"engine={exact!r}"] if exact else []
    if curvature == "hessian":
        hint = " (engine='auto' finds which serves)" if exact and requested != "auto" else ""
        return " or ".join([*engine, "engine='finite_difference'"]) + hint
    if requested == "auto":
        return ", or ".join([*engine, _DIFFERENCES])
    return ", or ".join([*engine, "engine='finite_difference' with curvature='hessian'"])


def _lack(error: RuntimeError) -> _Lack | None:
    """What an error says is missing; None if it says nothing of the kind."""
    text = str(error)
    if found := _NO_DOUBLE_BACKWARD.search(text):
        what = f"no double backward of {_readable(found[1] or found[2])}"
        concerns = _named(found[1] or found[2])
        return _Lack(f"torch has {what}", what, _REPLACE, "dual", concerns)
    if found := _NO_FORWARD_MODE.search(text):
        what = f"no forward mode of {found[1].strip('_')}"
        return _Lack(f"torch has {what}", what, _REPLACE, "graph", _named(found[1]), True)
    if found := _NO_FORMULA.search(text):
        what = f"no backward of the custom operator {found[1]}"
        sentence = f"the backward of a custom operator calls {found[1]}, which has no backward"
        fix = "register one with torch.library.register_autograd"
        return _Lack(sentence, what, fix, "dual", _is_unknown)
    if _NO_JVP.search(text):
        return _no_jvp(function_in_traceback(error))
    if _NESTED.search(text):
        what = "forward mode inside forward mode"
        sentence = f"torch has no {what}, which the closure uses itself (torch.func.jvp, say)"
        fix = "differentiate in reverse mode there"
        return _Lack(sentence, what, fix, "graph", _is_unknown, True)
    if refused := _REFUSED.match(text):
        exact = "dual" if _ONCE.search(text) else ""
        short = f"the {refused['what'].partition(' (')[0]}"
        concerns = _named(refused["name"].rpartition(".")[2])
        return _Lack(f"the {refused['what']}", short, refused["fix"], exact, concerns)
    if _ONCE.search(text):
        what = "the backward of the custom autograd Function {name} is marked once_differentiable"
        fix = "write it in differentiable operations and remove the mark"
        return _Lack(what, what, fix, "dual", _is_once_differentiable)
    return None


def _no_jvp(function: type[Function] | None) -> _Lack:
    name = "in use" if function is None else function.__qualname__.rpartition(".")[2]
    concerns = _named(name)
    if operator := _OPERATOR.match(name):
        what = f"no forward mode of the custom operator {operator[1]}"
        return _Lack(f"torch has {what}", what, _REPLACE, "graph", concerns, True)
    sentence = f"the custom autograd Function {name} has no jvp, which forward mode needs"
    short = f"no jvp of the custom autograd Function {name}"
    return _Lack(sentence, short, "give it one", "graph", concerns, True)


def _readable(kernel: str) -> str:
    """An operation's name, of the name of its backward."""
    return re.sub(r"_(backward|forward)$", "", kernel).strip("_")


def _named(kernel: str) -> Callable[[Any], bool]:
    """Whether a node is of a kernel: ``_ctc_loss_backward`` is CtcLossBackward0's."""
    return lambda node: _key(node.name()) == _key(kernel)


def _key(name: str) -> str:
    return re.sub(r"((back|for)ward\d*)+$", "", name.replace("_", "").lower())


def _is_unknown(node: Any) -> bool:
    return False


def _is_once_differentiable(node: Any) -> bool:
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    return getattr(backward, "__code__", None) is _MARK


_MARK = once_differentiable(lambda ctx, grad: grad).__code__
