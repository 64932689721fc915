"""Functions on pytrees as functions of a tuple of tensors, and back."""

from collections.abc import Callable, Sequence
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hvpopt.engines.support import differentiable_kernels
from hvpopt.pytrees import Tree, check_params, scalar_valued

Argnums = int | tuple[int, ...]
Blocks = Sequence[Sequence[Tensor]]
"""blocks[j][i] is ∂outputⱼ/∂inputᵢ, of outputⱼ's shape followed by inputᵢ's."""
LeafFunction = Callable[..., tuple[Tensor, ...]]
"""A function of tensors, each an argument, to a tuple of tensors."""


class Problem:
    """A function, seen as one of the tensors that it is differentiated by, at a point.

    Args:
        f: ``f(*args)``, a pytree of tensors.
        args: All arguments.
        argnums: Which are differentiated.
        scalar: Whether f's value must be a scalar.
        batched: Whether all tensors have the same first dimension, the examples.

    Raises:
        TypeError: For differentiated arguments that are not real floating-point tensors, or
            argnums that are no integers.
        ValueError: For argnums out of range or repeated, or arguments without tensors.
        RuntimeError: Inside a transform of ``torch.func``.
    """

    def __init__(
        self,
        f: Callable[..., Tree],
        args: tuple[Any, ...],
        argnums: Argnums,
        *,
        scalar: bool,
        batched: bool = False,
    ) -> None:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError(
                "hvpopt.jacobians returns values that are not differentiated further, and cannot "
                "run inside vmap, grad or another transform of torch.func: use torch.func.jacrev, "
                "jacfwd or hessian there."
            )
        self._indices = _checked_argnums(argnums, len(args))
        self._one = isinstance(argnums, int)
        for i in self._indices:
            check_params(args[i], f"args[{i}]")
        self._given, self._f = f, scalar_valued(f, "f") if scalar else f
        self._args = pytree.tree_map_only(Tensor, _ordinary, args)
        chosen = tuple(self._args[i] for i in self._indices)
        leaves, self._in_spec = pytree.tree_flatten(chosen)
        self._out_spec: pytree.TreeSpec | None = None
        self._rewind: Callable[[], None] | None = None
        self.at: tuple[Tensor, ...] = tuple(x.detach() for x in leaves)
        """The point: the tensors that f is differentiated by, detached."""
        self.device = self.at[0].device
        self.num_examples = _num_examples(self.at, "the input") if batched else None

    def __call__(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        """f's value as a tuple of tensors, as a function of those that are differentiated.

        Raises:
            TypeError: Where the value holds anything but real floating-point tensors.
            ValueError: Where it holds no tensor, or other examples than the arguments.
        """
        if self._rewind is not None:
            self._rewind()
        args = list(self._args)
        chosen = pytree.tree_unflatten(leaves, self._in_spec)
        for i, arg in zip(self._indices, chosen, strict=True):
            args[i] = arg
        with differentiable_kernels():  # here only: it slows what torch.func does around f
            value = self._f(*args)
        if self._out_spec is None:
            check_params(value, "the value of f")
        outputs, self._out_spec = pytree.tree_flatten(value)
        if self.num_examples is not None:
            _num_examples(outputs, "f's value", self.num_examples)
        return tuple(outputs)

    def rewind_by(self, rewind: Callable[[], None]) -> None:
        """Lets every run start with ``rewind()``, which sets the random number generators."""
        self._rewind = rewind

    def nested(self, blocks: Blocks) -> Tree:
        """The blocks in f's structure, each entry in that of the differentiated arguments."""
        rows = [pytree.tree_unflatten(list(row), self._in_spec) for row in blocks]
        assert self._out_spec is not None
        return pytree.tree_unflatten([r[0] if self._one else r for r in rows], self._out_spec)

    def nested_hessian(self, blocks: Blocks) -> Tree:
        """The blocks in the structure of the arguments, each entry in the same."""
        rows = [pytree.tree_unflatten(list(row), self._in_spec) for row in blocks]
        if not self._one:
            return pytree.tree_unflatten(rows, self._in_spec)
        return pytree.tree_unflatten([row[0] for row in rows], self._in_spec)[0]

    @property
    def key(self) -> tuple[object, ...]:
        """What this function is remembered by: its code, and what its arguments look like.

        A lambda that is written once is the same function each time it is made. Whoever remembers
        must survive that two functions look alike.
        """
        leaves = tuple(_looks(x) for x in pytree.tree_leaves(self._args))
        return _looks(self._given), self._indices, leaves


def _looks(x: Any, depth: int = 3) -> object:
    """What a value looks like; of a function, its code, what it captures and its defaults."""
    if isinstance(x, Tensor):
        return x.shape, x.dtype, x.device
    if isinstance(x, nn.Module):
        return id(x), x.training
    if isinstance(x, partial):
        named = tuple((name, _looks(a)) for name, a in x.keywords.items())
        return _looks(x.func), tuple(map(_looks, x.args)), named
    if isinstance(x, MethodType):
        return x.__func__.__code__, _looks(x.__self__)
    if isinstance(x, FunctionType) and depth:
        held = (*(x.__closure__ or ()), *(x.__defaults__ or ()))
        options = x.__kwdefaults__ or {}
        return (
            x.__code__,
            tuple(_looks(c, depth - 1) for c in held),
            tuple((name, _looks(c, depth - 1)) for name, c in options.items()),
        )
    if isinstance(x, CellType):
        try:
            return _looks(x.cell_contents, depth)
        except ValueError:  # it is empty still
            return None
    if isinstance(x, (bool, int, str)):  # options, which choose what a function does
        return type(x), x
    return type(x)


def _num_examples(tensors: Sequence[Tensor], what: str, size: int | None = None) -> int:
    """The number of examples: the first dimension that all tensors share.

    Raises:
        ValueError: If there is none.
    """
    for x in tensors:
        if x.dim() == 0 or x.shape[0] != (tensors[0].shape[0] if size is None else size):
            expected = "the same first dimension in all" if size is None else f"({size}, ...)"
            raise ValueError(
                f"batched=True takes f from (B, ...) to (B, ...), but {what} has a tensor of shape "
                f"{tuple(x.shape)}; expected {expected}."
            )
    return tensors[0].shape[0]


def _checked_argnums(argnums: Any, num_args: int) -> tuple[int, ...]:
    """The argnums as a tuple of indices ≥ 0."""
    given = argnums if isinstance(argnums, tuple) else (argnums,)
    if not given or any(not isinstance(i, int) or isinstance(i, bool) for i in given):
        raise TypeError(f"argnums={argnums!r}; expected an int or a tuple of ints.")
    for i in given:
        if not -num_args <= i < num_args:
            raise ValueError(f"argnums={argnums!r}, but f was given {num_args} argument(s).")
    indices = tuple(i % num_args for i in given)
    if len(set(indices)) < len(indices):
        raise ValueError(f"argnums={argnums!r} name an argument twice.")
    return indices


def _ordinary(x: Tensor) -> Tensor:
    """``x``, or a copy that autograd can record where it was made under inference mode."""
    return x.clone() if x.is_inference() else x
