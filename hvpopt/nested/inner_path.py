"""The steps of an inner optimizer, and derivatives through them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hvpopt import trees
from hvpopt.engines.support import differentiable_kernels
from hvpopt.nested.bilevel import Loss, outer_gradient, pullback, recorded
from hvpopt.products import jvp
from hvpopt.products.surroundings import rewinder
from hvpopt.pytrees import Tree, check_like
from hvpopt.trees import TensorList

Step = Callable[[Tree, Tree, int], Tree]
"""(params, hparams, t) ↦ the parameters after step t, t = 0, 1, …"""


@dataclass(frozen=True)
class UnrolledHypergradient:
    """The derivative of the outer loss by the hyper-parameters, through an optimizer's steps."""

    value: Tree
    """dℓ/dλ, in the structure and shapes of the hyper-parameters, detached."""
    outer_loss: Tensor
    """ℓ(w_T, λ), without dimensions, detached."""
    params: Tree
    """w_T, the parameters after the last step, detached."""
    start_gradient: Tree | None
    """dℓ/dw₀, by where the path starts; None where the adjoint does not go back that far."""
    num_step_runs: int
    """How many times ``step`` was run, T of them to reach w_T."""


class InnerPath:
    """The steps from w₀, on lists of tensors."""

    def __init__(self, step: Step, params: Tree, hparams: Tree, num_steps: int) -> None:
        self._step, self._params, self._hparams = step, params, hparams
        self._num_steps, self._num_runs = num_steps, 0
        self._start, self._spec = pytree.tree_flatten(params)
        self._leaves, self._hspec = pytree.tree_flatten(hparams)

    def reverse(self, outer_loss: Loss, marks: list[int]) -> UnrolledHypergradient:
        """One tape after the other between the marks, from the last to the first.

        Steps that run again meet torch's random numbers as they were.
        """
        *earlier, last = pairwise(marks)
        kept = [self._kept(self._run(trees.clone(self._start), 0, marks[0]))]
        for span in earlier:
            kept.append(self._kept(self._run(kept[-1].state, *span)))
        tape = self._tape(kept[-1].state, *last)
        reached = tape.end()
        params = self._tree(reached)
        outer = outer_gradient(outer_loss, params, self._hparams)
        afterwards = rewinder(self._params)
        cotangent = pytree.tree_leaves(outer.by_params)
        total = pytree.tree_leaves(outer.by_hparams)
        while True:
            grads = pullback(tape.outputs, tape.leaves, cotangent)
            cotangent, more = grads[: len(reached)], grads[len(reached) :]
            total = trees.add(total, more)
            reached = kept.pop().state
            if not kept:
                break
            del tape  # before there is another
            kept[-1].rewind()
            tape = self._tape(kept[-1].state, *earlier.pop())
            _check_repeats(tape.end(), reached)
        afterwards()
        return UnrolledHypergradient(
            value=pytree.tree_unflatten(total, self._hspec),
            outer_loss=outer.loss,
            params=params,
            start_gradient=self._tree(cotangent) if marks[0] == 0 else None,
            num_step_runs=self._num_runs,
        )

    def forward(self, outer_loss: Loss, max_directions: int) -> UnrolledHypergradient:
        """The derivatives of the state by each hyper-parameter, carried along with it.

        Raises:
            ValueError: If there are more than ``max_directions``.
        """
        count = sum(x.numel() for x in self._leaves)
        if count > max_directions:
            raise ValueError(
                f"hparams have {count} entries, but ForwardMode(max_directions={max_directions}) "
                "carries a copy of the parameters for each: raise max_directions, or take "
                "BackOptimization()."
            )
        state, hparams = self._tree(trees.clone(self._start)), self._hparams
        slopes = pytree.tree_map(lambda x: x.new_zeros(count, *x.shape), state)
        each = pytree.tree_unflatten(_basis(self._leaves, count), self._hspec)
        for t in range(self._num_steps):
            state, slopes = jvp(partial(self._stepped, t), (state, hparams), (slopes, each))
        outer = outer_gradient(outer_loss, state, hparams)
        rows = [
            z.reshape(count, -1) @ g.reshape(-1)
            for z, g in zip(
                pytree.tree_leaves(slopes), pytree.tree_leaves(outer.by_params), strict=True
            )
        ]
        parts = sum(rows).split([x.numel() for x in self._leaves])
        total = [
            g + part.reshape(g.shape).to(g)
            for g, part in zip(pytree.tree_leaves(outer.by_hparams), parts, strict=True)
        ]
        return UnrolledHypergradient(
            value=pytree.tree_unflatten(total, self._hspec),
            outer_loss=outer.loss,
            params=state,
            start_gradient=None,
            num_step_runs=self._num_steps,
        )

    def _kept(self, state: TensorList) -> "_Kept":
        return _Kept(state, rewinder(self._params))

    def _run(self, state: TensorList, first: int, last: int) -> TensorList:
        """The state after the steps ``first`` to ``last`` - 1, holding one step's tape at most."""
        for t in range(first, last):
            state = self._tape(state, t, t + 1).end()
        return state

    def _tape(self, state: TensorList, first: int, last: int) -> "_Tape":
        """The recorded steps ``first`` to ``last`` - 1."""
        with torch.inference_mode(False), torch.enable_grad(), differentiable_kernels():
            leaves = recorded([*state, *self._leaves])
            hparams = pytree.tree_unflatten(leaves[len(state) :], self._hspec)
            at = self._tree(leaves[: len(state)])
            for t in range(first, last):
                at = self._stepped(t, (at, hparams))
        return _Tape(leaves, pytree.tree_leaves(at))

    def _stepped(self, t: int, at: tuple[Tree, Tree]) -> Tree:
        """``step``, its result checked."""
        self._num_runs += 1
        after = self._step(*at, t)
        check_like(after, self._params, "the result of step", "params")
        return after

    def _tree(self, flat: TensorList) -> Tree:
        return pytree.tree_unflatten(flat, self._spec)


@dataclass(frozen=True)
class _Kept:
    """Where a path can be taken up again."""

    state: TensorList
    rewind: Callable[[], None]
    """Puts torch's random numbers back to where they stood."""


@dataclass(frozen=True)
class _Tape:
    """Recorded steps."""

    leaves: TensorList
    """The state before them and the hyper-parameters."""
    outputs: TensorList
    """The state after them, with its graph."""

    def end(self) -> TensorList:
        """The state after them."""
        return [x.detach() for x in self.outputs]


def _basis(leaves: TensorList, count: int) -> TensorList:
    """One direction along each entry of the leaves."""
    rows = torch.eye(count).split([x.numel() for x in leaves], dim=1)
    return [row.reshape(count, *x.shape).to(x) for row, x in zip(rows, leaves, strict=True)]


def _check_repeats(again: TensorList, before: TensorList) -> None:
    """Lets steps pass that gave the same state twice, but for rounding.

    Raises:
        ValueError: If they did not.
    """
    rounding = max(torch.finfo(x.dtype).eps for x in before)
    if float(trees.norm(trees.add(again, before, -1.0))) > rounding**0.5 * float(
        trees.norm(before)
    ):
        raise ValueError(
            "step gave other parameters when it ran again with the same params, hparams and "
            "t: draw its random numbers from a generator that is seeded with t, or take "
            "Unrolled(), which runs each step once."
        )
