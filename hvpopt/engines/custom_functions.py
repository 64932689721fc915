"""Checks that the derivatives of custom autograd Functions are what autograd takes them for.

A ``backward`` that computes through numpy, ``detach()``, ``.data`` or ``no_grad`` gives right
gradients, but double backward and forward mode take what it hides for a constant, without an
error. So each custom Function that a closure applies is tried once, by itself, on its own inputs:
the derivative of its backward, as the engine would take it, against differences.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

WRONG = (
    "The backward of the custom autograd Function {name} hides what it depends on from autograd "
    "(by numpy, detach(), .data or no_grad, or by a jvp that contradicts it), so that products "
    "through it would be wrong: let it compute from ctx.saved_tensors by differentiable "
    "operations, or choose engine='finite_difference'."
)
ONCE = (
    "The backward of the custom autograd Function {name} is marked once_differentiable: write it "
    "in differentiable operations and remove the mark, or choose engine='finite_difference'."
)
_NUM_ENTRIES = 16


class HiddenDependenceError(RuntimeError):
    """Raised where a custom Function's second derivative would be wrong."""


@dataclass(frozen=True)
class Application:
    """A call of a custom Function."""

    function: Any
    args: tuple[Any, ...]


@contextmanager
def recorded_applications(*, active: bool = True) -> Iterator[dict[str, Application]]:
    """Gathers, if ``active``, the first call of each custom Function, with copies of its inputs.

    By their ``forward``, which ``apply`` looks up at each call, and not by ``apply`` itself, which
    many programs bind to a name once and for all.
    """
    found: dict[str, Application] = {}
    own: dict[Any, Any] = {}
    try:
        classes = _custom_functions() if active else []
        recording = {cls: _recording(cls, found) for cls in classes}  # before one inherits another
        for cls, forward in recording.items():
            own[cls] = cls.__dict__.get("forward")
            cls.forward = staticmethod(forward)
        yield found
    finally:
        for cls, forward in own.items():
            if forward is None:
                del cls.forward
            else:
                cls.forward = forward


def _custom_functions() -> list[Any]:
    """The classes of Functions that are neither torch's nor ours."""
    classes, waiting = [], [torch.autograd.Function]
    while waiting:
        following = waiting.pop().__subclasses__()
        waiting += following
        classes += [
            c for c in following if not f"{c.__module__}.".startswith(("torch.", "hvpopt."))
        ]
    return classes


def _recording(cls: Any, found: dict[str, Application]) -> Callable[..., Any]:
    original = cls.forward
    has_ctx = cls.setup_context is torch.autograd.Function.setup_context

    @functools.wraps(original)
    def forward(*args: Any) -> Any:
        name = f"{cls.__module__}.{cls.__qualname__}"
        if name not in found:
            found[name] = Application(cls, tuple(_copy(x) for x in args[has_ctx:]))
        return original(*args)

    return forward


def check_applications(applications: dict[str, Application], *, forward: bool) -> None:
    """Tries each Function by itself.

    Args:
        applications: what `recorded_applications` found.
        forward: by forward mode over reverse mode, else by double backward.

    Raises:
        HiddenDependenceError: where a derivative is wrong. What torch cannot compute here may not
            be needed, and where it is, the engine itself will raise.
    """
    for application in applications.values():
        trial = _Trial.of(application)
        if trial is None:
            continue
        try:
            with torch.random.fork_rng(), torch.enable_grad():
                is_right = trial.agrees(forward=forward)
        except RuntimeError as error:
            if "once_differentiable" in str(error):
                name = application.function.__qualname__
                raise HiddenDependenceError(ONCE.format(name=name)) from error
            continue
        if not is_right:
            raise HiddenDependenceError(WRONG.format(name=application.function.__qualname__))


class _Trial:
    """A Function as the map (x, c) ↦ Jᵀ(x) c, along a direction of x and of the cotangent c."""

    def __init__(self, application: Application, dtype: torch.dtype | None) -> None:
        self._function = application.function
        self._args = [
            x.to(dtype) if dtype is not None and isinstance(x, Tensor) and x.is_floating_point()
            else x
            for x in application.args
        ]  # fmt: skip
        self._places = [
            i
            for i, x in enumerate(application.args)
            if isinstance(x, Tensor) and x.requires_grad and x.is_floating_point()
        ]
        self._x = [self._args[i].detach() for i in self._places]
        outputs = [y.detach() for y in self._outputs(self._x)]
        generator = torch.Generator().manual_seed(0)
        self._c = [_normal(y, generator) for y in outputs]
        self._dx = [_normal(x, generator) for x in self._x]
        self._dc = [_normal(y, generator) for y in outputs]

    @classmethod
    def of(cls, application: Application) -> "_Trial | None":
        """In float64, where the Function takes that; None where nothing can be tried."""
        for dtype in (torch.float64, None):
            try:
                with torch.random.fork_rng():
                    trial = cls(application, dtype)
                    trial._pullback(trial._x, trial._c)
            except Exception:  # the Function's own refusal, of whatever kind
                continue
            return trial if trial._x and trial._c else None
        return None

    def _outputs(self, x: Sequence[Tensor]) -> list[Tensor]:
        args = list(self._args)
        for place, value in zip(self._places, x, strict=True):
            args[place] = value.view_as(value)  # which a Function may change in place
        torch.manual_seed(0)
        result = self._function.apply(*args)
        every = result if isinstance(result, (tuple, list)) else (result,)
        return [y for y in every if isinstance(y, Tensor) and y.is_floating_point()]

    def _pullback(
        self, x: Sequence[Tensor], c: Sequence[Tensor], *, create_graph: bool = False
    ) -> list[Tensor]:
        """Jᵀ c, zeros where the Function returns None."""
        with torch.enable_grad():
            x = [v if v.requires_grad else v.detach().requires_grad_() for v in x]
            pairs = [(y, w) for y, w in zip(self._outputs(x), c, strict=True) if y.requires_grad]
            grads: Sequence[Tensor | None] = torch.autograd.grad(
                [y for y, _ in pairs],
                x,
                [w for _, w in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        return [torch.zeros_like(v) if g is None else g for g, v in zip(grads, x, strict=True)]

    def agrees(self, *, forward: bool) -> bool:
        """Whether derivative and differences are the same wherever differences can be trusted."""
        scale = max([1.0, *(float(x.abs().max()) for x in self._x if x.numel())])
        h = torch.finfo(self._x[0].dtype).eps ** (1 / 3) * scale
        wide, narrow = self._differences(h), self._differences(h / 2)
        exact = self._forward() if forward else None
        rounding = 10 * torch.finfo(self._x[0].dtype).eps / h
        for i, (d, closer) in enumerate(zip(wide, narrow, strict=True)):
            if not d.numel():
                continue
            size = closer.abs().mean() + rounding * self._size
            for j in torch.linspace(0, d.numel() - 1, min(_NUM_ENTRIES, d.numel())).long().tolist():
                a, b = float(d.reshape(-1)[j]), float(closer.reshape(-1)[j])
                if abs(a - b) > 1e-2 * (abs(b) + float(size)):
                    continue  # a kink within reach
                e = float(exact[i].reshape(-1)[j]) if exact else self._by_double_backward(i, j)
                if abs(e - b) > 0.05 * (abs(b) + float(size)):
                    return False
        return True

    @property
    def _size(self) -> float:
        return max(float(g.abs().max()) for g in self._pullback(self._x, self._c) if g.numel())

    def _differences(self, h: float) -> list[Tensor]:
        def at(step: float) -> list[Tensor]:
            x = [x + step * d for x, d in zip(self._x, self._dx, strict=True)]
            c = [c + step * d for c, d in zip(self._c, self._dc, strict=True)]
            return self._pullback(x, c)

        return [(a - b) / (2 * h) for a, b in zip(at(h), at(-h), strict=True)]

    def _by_double_backward(self, i: int, j: int) -> float:
        """One entry of the derivative, as ⟨∇ of the entry, direction⟩."""
        x = [v.clone().requires_grad_() for v in self._x]
        c = [v.clone().requires_grad_() for v in self._c]
        entry = self._pullback(x, c, create_graph=True)[i].reshape(-1)[j]
        if not entry.requires_grad:
            return 0.0
        slopes = torch.autograd.grad(entry, [*x, *c], allow_unused=True)
        pairs = zip(slopes, [*self._dx, *self._dc], strict=True)
        return sum(float((s * d).sum()) for s, d in pairs if s is not None)

    def _forward(self) -> list[Tensor]:
        with forward_ad.dual_level():
            x = [v.clone().requires_grad_() for v in self._x]
            x = [forward_ad.make_dual(v, d) for v, d in zip(x, self._dx, strict=True)]
            c = [forward_ad.make_dual(v, d) for v, d in zip(self._c, self._dc, strict=True)]
            found = [forward_ad.unpack_dual(g) for g in self._pullback(x, c)]
            return [
                torch.zeros_like(g.primal) if g.tangent is None else g.tangent.detach().clone()
                for g in found
            ]


def _copy(x: Any) -> Any:
    """A detached copy, without tangents, that requires a gradient where ``x`` does."""
    if not isinstance(x, Tensor):
        return x
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return None
    primal = forward_ad.unpack_dual(x.detach()).primal
    copied = primal.detach().clone()
    return copied.requires_grad_() if x.requires_grad else copied


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like.device, like.dtype)
