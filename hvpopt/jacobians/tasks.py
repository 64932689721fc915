"""A Jacobian or Hessian that is asked for: its size, its way, its chunks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvpopt.jacobians.choice import Candidate, ModeChoice, choose
from hvpopt.jacobians.draws import Generators
from hvpopt.jacobians.examples import as_one_example, check_uncoupled, examples_first
from hvpopt.jacobians.functions import Argnums, Blocks, LeafFunction, Problem
from hvpopt.jacobians.memory import (
    Footprint,
    Remembered,
    budget_for,
    check_fits,
    footprint,
    lines_at_once,
)
from hvpopt.jacobians.ways import HESSIAN_WAYS, JACOBIAN_WAYS, Axis, Opened, Way, blocks_by
from hvpopt.pytrees import Tree

_footprints: Remembered[Footprint] = Remembered()
_choices: Remembered[ModeChoice] = Remembered()
_TIMED = ("vjp_vmap", "vjp_loop", "jacfwd", "dual_loop", *HESSIAN_WAYS)
"""What is chosen from: "jacrev" does what "vjp_vmap" does, "jvp_loop" what "dual_loop" does."""
_LOOP_BYTES, _LOOP_LINES = 2**24, 64


class OutdatedError(RuntimeError):
    """Raised where a function is not what is remembered of it."""


@contextmanager
def values_only() -> Iterator[None]:
    """While active, nothing is recorded but what a way needs."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@dataclass(frozen=True)
class Options:
    """What the public functions take beside the function and its arguments.

    Raises:
        ValueError: For an unknown mode, or sizes that are not positive.
    """

    argnums: Argnums
    mode: str
    chunk_size: int | None
    memory_budget: int | None
    hessian: bool = False
    batched: bool = False

    def __post_init__(self) -> None:
        names = ("auto", *(HESSIAN_WAYS if self.hessian else JACOBIAN_WAYS))
        if self.mode not in names:
            known = ", ".join(map(repr, names))
            raise ValueError(f"mode={self.mode!r} is unknown: choose one of {known}.")
        for name in ("chunk_size", "memory_budget"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value <= 0):
                raise ValueError(f"{name}={value!r}; expected a positive int, or None.")


class Task:
    """A matrix of derivatives that is asked for. To be made and used inside `values_only`.

    Args:
        f: ``f(*args)``.
        args: All arguments.
        options: The rest.
        recall: Whether what is remembered of the function may be used.

    Raises:
        TypeError, ValueError, RuntimeError: As in `hvpopt.jacobians.jacobian`.
    """

    def __init__(
        self, f: Callable[..., Tree], args: tuple[Any, ...], options: Options, *, recall: bool
    ) -> None:
        self._options = options
        self.problem = Problem(
            f, args, options.argnums, scalar=options.hessian, batched=options.batched
        )
        self.at = self.problem.at
        self._ways = HESSIAN_WAYS if options.hessian else JACOBIAN_WAYS
        self._key = (self.problem.key, options)
        self._batch = self.problem.num_examples or 1
        self.generators = Generators(self.at)
        known = _footprints.get(self._key) if recall else None
        self.recalled = known is not None
        """Whether something remembered is relied on."""
        if known is None:
            _choices.forget(self._key)
            known = footprint(self.problem, self.at, self.generators)
            _footprints.put(self._key, known)
        if known.draws:
            self.problem.rewind_by(self.generators.rewind)
        self.footprint = known.of_gradient if options.hessian else known

    def blocks(self) -> Blocks:
        """The whole matrix, in blocks.

        Raises:
            ValueError: If it is larger than the budget, or examples are coupled.
            OutdatedError: If the function is not what was remembered of it.
        """
        options, size = self._options, self.footprint
        rows, columns = size.rows // self._batch, size.columns
        what = "Hessian" if options.hessian else "Jacobian"
        result = size.result // self._batch
        check_fits(what, (rows, columns), result, self._budget(result))
        if self.is_empty:
            return self._empty()
        mode = self.choice().mode
        axis = self.way(mode).axis
        blocks = blocks_by(mode, *self._view(axis), chunk_size=self.chunk_size(mode))
        if options.batched:
            blocks = examples_first(blocks, self.at, axis)
            check_uncoupled(self.problem, self.at, blocks, axis)
        if sum(row[0].numel() for row in blocks) != rows * self.at[0].numel():
            raise OutdatedError("f returned more or fewer entries than in its run before.")
        if self.generators.moved() and not size.draws:
            raise OutdatedError("f drew random numbers, as it did not in its run before.")
        return [[b.to(x) for b, x in zip(row, self.at, strict=True)] for row in blocks]

    def choice(self) -> ModeChoice:
        """The way that is taken."""
        if self._options.mode != "auto":
            return ModeChoice(self._options.mode, "asked for")
        if self.is_empty:
            return ModeChoice(next(iter(self._ways)), "there are no entries")
        chosen = _choices.get(self._key)
        if chosen is None:
            names = [n for n in _TIMED if n in self._ways]
            chosen = choose({n: self._candidate(n) for n in names}, self.problem.device)
            _choices.put(self._key, chosen)
        return chosen

    @property
    def is_empty(self) -> bool:
        """Whether the matrix has no entries."""
        return 0 in (self.footprint.rows, self.footprint.columns)

    def way(self, mode: str) -> Way:
        """The way of this name."""
        return self._ways[mode]

    def open(self, mode: str) -> Opened:
        """The way, opened."""
        way = self.way(mode)
        return way.open(*self._view(way.axis))

    def chunk_size(self, mode: str, *, streamed: bool = False) -> int | None:
        """How many rows or columns to compute at once; None: all.

        Args:
            mode: A way.
            streamed: Whether they are handed on, instead of gathered.
        """
        way, size, count = self.way(mode), self.footprint, self._count(mode)
        if not (way.vmapped or streamed):
            line = size.result // self._batch // count
            return min(_LOOP_LINES, max(1, _LOOP_BYTES // max(1, line)))
        if self._options.chunk_size is not None:
            chunk = self._options.chunk_size
            return None if chunk >= count else chunk
        result = size.result // self._batch
        held, kept = (0, result // count) if streamed else (result, 0)
        budget = self._budget(size.work + count * size.line)
        return lines_at_once(size, budget, count=count, held=held, kept=kept)

    def _budget(self, need: int) -> int | None:
        return budget_for(self._options.memory_budget, need, self.problem.device)

    def _candidate(self, mode: str) -> Candidate:
        way = self.way(mode)
        return Candidate(
            way.axis, lambda: self.open(mode), self._count(mode), self.chunk_size(mode), way.vmapped
        )

    def _count(self, mode: str) -> int:
        size = self.footprint
        return (size.rows if self.way(mode).axis == "rows" else size.columns) // self._batch

    def _view(self, axis: Axis) -> tuple[LeafFunction, tuple[Tensor, ...]]:
        """The function whose rows, or columns, are computed, and its point."""
        if self._options.batched:
            return as_one_example(self.problem, self.at, axis)
        return self.problem, self.at

    def _empty(self) -> Blocks:
        """The blocks of a matrix without entries."""
        outputs = self.at if self._options.hessian else self.problem(*self.at)
        skipped = 1 if self._options.batched else 0
        return [[x.new_zeros(*y.shape, *x.shape[skipped:]) for x in self.at] for y in outputs]


def solved(f: Callable[..., Tree], args: tuple[Any, ...], options: Options) -> tuple[Task, Blocks]:
    """The task and its blocks; what is remembered of another function with the same code is
    looked at afresh."""
    with values_only():
        task = Task(f, args, options, recall=True)
        try:
            return task, task.blocks()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError):
            if not task.recalled:
                raise
        task.generators.rewind()
        task = Task(f, args, options, recall=False)
        return task, task.blocks()
