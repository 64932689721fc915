"""A level of forward-mode differentiation whose tangents sit on parameters, in place."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.overrides import TorchFunctionMode

from hvpopt import trees
from hvpopt.engines.support import graph_nodes, saved_tensor_hooks

DISAGREEMENT = (
    "Forward and reverse mode disagree on the derivative of the loss (forward {forward:.3g}, "
    "reverse {reverse:.3g}): an operation drops tangents or replaces its gradient, such as a "
    "scripted module or a straight-through Function. Choose engine='graph'."
)


class _AsReverseMode(TorchFunctionMode):
    """While active, what is constant to reverse mode has no tangent either."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # which is without a graph, too; but a checkpointed layer that runs again in it is not
        is_reverse_pass = torch._C._current_graph_task_id() != -1 and not (
            saved_tensor_hooks().startswith("_recomputation_hook.")
        )
        if not torch.is_grad_enabled() and not is_reverse_pass:
            with forward_ad._set_fwd_grad_enabled(False):
                return func(*args, **kwargs)
        if func is F.embedding and kwargs.get("padding_idx") is not None:
            rows = func(*args, **kwargs)
            padding = (args[0] == kwargs["padding_idx"] % len(args[1])).unsqueeze(-1)
            return torch.where(padding, rows.detach(), rows)
        return func(*args, **kwargs)


class DualLevel:
    """A forward-mode level that can be left before its ``with`` block ends."""

    def __init__(self, params: Sequence[Tensor], tangents: Sequence[Tensor]) -> None:
        self._params, self.tangents = params, tangents
        self._level: int | None = None
        self._mode = _AsReverseMode()

    def __enter__(self) -> "DualLevel":
        self._level = forward_ad.enter_dual_level()
        try:
            # The values do not change: graphs that were recorded from them stay valid.
            with torch.no_grad(), _unsafe_preserve_version_counter(tuple(self._params)):
                for p, t in zip(self._params, self.tangents, strict=True):
                    p.copy_(forward_ad.make_dual(p.detach().clone(), t))
        except BaseException:
            self.leave()
            raise
        self._mode.__enter__()
        return self

    def leave(self) -> None:
        """Clears the tangents of every tensor made at this level."""
        if self._level is not None:
            forward_ad.exit_dual_level(level=self._level)
            self._level = None

    def __exit__(self, *exc: Any) -> None:
        self._mode.__exit__(*exc)
        self.leave()


def check_modes_agree(
    tangent: Tensor | None, grads: Sequence[Tensor | None], v: Sequence[Tensor], *, rough: bool
) -> None:
    """Lets pass that forward and reverse mode see the same function: ∂L(v) = ⟨∇L, v⟩.

    Args:
        tangent: The loss's, by forward mode; None for zero.
        grads: Its gradient, by reverse mode.
        v: The direction.
        rough: Whether a part was computed in less than float32, under autocast.

    Raises:
        RuntimeError: if they differ by more than rounding.
    """
    pairs = [(g.detach(), x) for g, x in zip(grads, v, strict=True) if g is not None]
    if not pairs:
        return
    # In double precision: in single, the sums over many entries err by more than the modes.
    used, along = [g.double() for g, _ in pairs], [x.double() for _, x in pairs]
    reverse = float(trees.dot(used, along))
    forward = 0.0 if tangent is None else float(tangent.detach())
    size = float(trees.norm(used) * trees.norm(along)) / max(1, sum(g.numel() for g in used)) ** 0.5
    epsilon = max(torch.finfo(g.dtype).eps for g, _ in pairs)
    tolerance = 0.2 if rough or epsilon > 1e-4 else 1e-2 if epsilon > 1e-10 else 1e-5
    slack = tolerance * size + 0.1 * tolerance * abs(reverse) + 100 * epsilon
    if abs(forward - reverse) > slack:
        raise RuntimeError(DISAGREEMENT.format(forward=forward, reverse=reverse))


def derivative_along(slopes: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Tensor:
    """The derivative of a loss by the tangents of what it is computed from."""
    pairs = [(s.detach(), t) for s, t in zip(slopes, tangents, strict=True) if t is not None]
    if not pairs:
        return torch.zeros(())
    return trees.dot([s for s, _ in pairs], [t for _, t in pairs])


# Their backward formulas reuse factors that carry no tangent, unless a graph is built.
_REUSING = ("LinalgDet", "LinalgSlogdet", "LinalgSolveEx")


def needs_graph(loss: Tensor) -> bool:
    """Whether the tangents of a loss's gradient are right only with ``create_graph``."""
    return any(node.name().startswith(_REUSING) for node in graph_nodes([loss]))


def is_rough(loss: Tensor) -> bool:
    """Whether a part of a loss was computed in another precision, as under autocast."""
    return any(node.name().startswith("ToCopyBackward") for node in graph_nodes([loss]))
