"""Dual numbers on parameters, for training loops of one's own.

While the context is active each parameter carries a tangent, so that ``loss.backward()`` computes
the gradient, the loss's derivative along the tangents and the Hessian-vector product in one pass:
forward over reverse, Pearlmutter (1994).
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hvpopt.engines.base import fill
from hvpopt.engines.dual import DualLevel, DualRecorder, ZeroTangents
from hvpopt.engines.interception import Interception
from hvpopt.engines.support import differentiable_kernels, graph_nodes
from hvpopt.trees import TensorList

# Their backward kernels have no forward-mode formula; the graph-building backward avoids them.
_NEED_GRAPH = frozenset(("SiluBackward0", "MishBackward0", "NativeGroupNormBackward0"))

NO_BACKWARD = (
    "loss.backward() was not called inside `with hvpopt.dual(...)` (torch.autograd.backward and "
    "torch.autograd.grad do not count), so that there is no product: compute the loss and call "
    "its backward inside."
)


class dual:
    """A context that makes ``loss.backward()`` give a Hessian-vector product as well.

    ``p.grad`` is accumulated as without it, plain. The modules run once, so that BatchNorm's
    statistics, dropout and random numbers advance as in any step. Loss, gradient and product
    together take the time of about three gradients and three to four times the memory of one.
    Several ``backward`` calls add up. Operations run by kernels that have forward-mode formulas:
    attention by the math kernel, recurrent layers without cuDNN, compiled modules eagerly.

    Args:
        params: Leaves that require gradients.
        v: A direction, one tensor a parameter, of its shape, dtype and device.
        thorough: Builds a graph in the backward pass, which takes memory and gives more
            operations forward-mode formulas. None does where the loss goes through SiLU, Mish or
            GroupNorm.

    Raises:
        ValueError: If ``v`` does not match the parameters, or one of these is no leaf that
            requires a gradient.
        RuntimeError: On entry, inside another level of forward mode. On ``backward``, if an
            operation has no forward-mode formula, or forward and reverse mode disagree on the
            derivative of the loss.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> with dual([w], [torch.tensor([1.0, 0.0])]) as d:
        ...     (w**3).sum().backward()
        >>> d.hvp, d.jvp, w.grad
        ([tensor([6., 0.])], tensor(3.), tensor([ 3., 12.]))
    """

    def __init__(
        self, params: Iterable[Tensor], v: Sequence[Tensor], *, thorough: bool | None = None
    ) -> None:
        self.params, self._v = list(params), list(v)
        self._thorough = thorough
        self._stack = ExitStack()
        self._recorders = {
            create_graph: DualRecorder(_Loop(self.params), create_graph=create_graph, check=self._v)
            for create_graph in (False, True)
        }
        self._slopes: list[Tensor] = []
        _check(self.params, self._v)

    def __enter__(self) -> "dual":
        if forward_ad._current_level >= 0:
            raise RuntimeError(
                "hvpopt.dual is inside another level of forward mode, and torch has only one: "
                "leave the other (hvpopt.dual, torch.func.jvp, the engine 'dual') first, or "
                "compute this product by hvpopt.products.hvp."
            )
        self._slopes.clear()
        for recorder in self._recorders.values():
            recorder.losses.clear()
            recorder.products = [None] * len(self.params)
        with ExitStack() as stack:
            stack.enter_context(differentiable_kernels())
            stack.enter_context(DualLevel(self.params, self._v))
            stack.enter_context(Interception(self._backward, split=ZeroTangents()))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.__exit__(*exc)

    @property
    def loss(self) -> Tensor:
        """The sum of the losses, a scalar, detached.

        Raises:
            RuntimeError: If ``backward`` was not called.
        """
        self._check_is_recorded()
        return torch.stack([x for r in self._recorders.values() for x in r.losses]).sum()

    @property
    def jvp(self) -> Tensor:
        """The losses' derivative ⟨∇L, v⟩ along ``v``, a scalar, detached.

        Raises:
            RuntimeError: If ``backward`` was not called.
        """
        self._check_is_recorded()
        return torch.stack(self._slopes).sum()

    @property
    def hvp(self) -> TensorList:
        """∇²L v in the parameters' order, detached; zeros where the loss does not depend on one.

        Raises:
            RuntimeError: If ``backward`` was not called.
        """
        self._check_is_recorded()
        lean, thorough = (fill(r.products, self.params) for r in self._recorders.values())
        return list(torch._foreach_add(lean, thorough))

    def _check_is_recorded(self) -> None:
        if not self._slopes:
            raise RuntimeError(NO_BACKWARD)

    def _backward(self, loss: Tensor, plain: Callable[..., None], /, **options: Any) -> None:
        tangent = forward_ad.unpack_dual(loss).tangent
        slope = torch.zeros_like(loss) if tangent is None else tangent
        thorough = self._thorough
        if thorough is None:
            thorough = any(node.name() in _NEED_GRAPH for node in graph_nodes([loss]))
        try:
            self._recorders[thorough](loss, plain, **options)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"hvpopt.dual cannot differentiate this backward pass by forward mode ({error}). "
                "thorough=True helps where a formula is missing; hvpopt.products.hvp, and "
                "hvpopt.ClosureOracle with engine='graph', need none. p.grad may be incomplete."
            ) from error
        self._slopes.append(slope.detach().clone())


class _Loop:
    """The run that a `DualRecorder` sees here: the only one."""

    is_first = True

    def __init__(self, params: TensorList) -> None:
        self.params = params


def _check(params: TensorList, v: TensorList) -> None:
    if not params:
        raise ValueError("params hold no tensor; expected the parameters to differentiate by.")
    if len(v) != len(params):
        raise ValueError(f"v has {len(v)} tensors for {len(params)} parameters; expected one each.")
    for i, (p, x) in enumerate(zip(params, v, strict=True)):
        if not (p.is_leaf and p.requires_grad):
            raise ValueError(
                f"params[{i}] is not a leaf that requires a gradient: give trainable parameters "
                "only, and their tensors of v."
            )
        for kind in ("shape", "dtype", "device"):
            given, wanted = getattr(x, kind), getattr(p, kind)
            if given != wanted:
                raise ValueError(f"v[{i}] has {kind} {given}; expected the parameter's, {wanted}.")
