"""Jacobians and Hessians in blocks, one after another, for those that no memory holds."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvpopt.jacobians.dense import HessianMode, JacobianMode
from hvpopt.jacobians.draws import Generators
from hvpopt.jacobians.functions import Argnums
from hvpopt.jacobians.tasks import Options, Task, values_only
from hvpopt.jacobians.ways import Axis, Opened
from hvpopt.pytrees import Tree


@dataclass(frozen=True)
class Block:
    """Consecutive rows, or columns, of a Jacobian or Hessian as a matrix.

    Its rows are all entries of f's value (of a Hessian: of the arguments), its columns all
    entries of the arguments that are differentiated, leaf after leaf.
    """

    axis: Axis
    """What is consecutive."""
    start: int
    """The first one's index."""
    stop: int
    """One more than the last one's."""
    value: Tensor
    """(stop - start, all columns) of rows, (all rows, stop - start) of columns."""


def jacobian_blocks(
    f: Callable[..., Tree],
    *args: Any,
    argnums: Argnums = 0,
    mode: JacobianMode = "auto",
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> Iterator[Block]:
    """The Jacobian in blocks of rows, or of columns, each computed when it is asked for.

    Args:
        f: As in `jacobian`, and so are the other arguments and errors.
        *args: Its arguments.
        argnums: Which argument to differentiate by, or several, as a tuple.
        mode: The way, and with it rows or columns.
        chunk_size: How many rows, or columns, a block has; None: as many as fit.
        memory_budget: Bytes for a block and what its computation takes (and for the block before,
            which the caller may hold). None: half of what is free.

    Examples:
        >>> x = torch.arange(4.0)
        >>> for block in jacobian_blocks(torch.square, x, mode="vjp_vmap", chunk_size=3):
        ...     block.start, block.stop, block.value.diagonal(block.start)
        (0, 3, tensor([0., 2., 4.]))
        (3, 4, tensor([6.]))
    """
    return _blocks(f, args, Options(argnums, mode, chunk_size, memory_budget))


def hessian_blocks(
    f: Callable[..., Tensor],
    *args: Any,
    argnums: Argnums = 0,
    mode: HessianMode = "auto",
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> Iterator[Block]:
    """The Hessian in blocks of rows, each computed when it is asked for.

    The arguments are those of `jacobian_blocks`, the modes those of `hessian`.

    Examples:
        >>> blocks = hessian_blocks(lambda p: (p**3).sum(), torch.ones(4), chunk_size=2)
        >>> next(blocks).value
        tensor([[6., 0., 0., 0.],
                [0., 6., 0., 0.]])
    """
    return _blocks(f, args, Options(argnums, mode, chunk_size, memory_budget, hessian=True))


def _blocks(f: Callable[..., Tree], args: tuple[Any, ...], options: Options) -> Iterator[Block]:
    with values_only():
        task = Task(f, args, options, recall=False)
        if task.is_empty:
            return iter(())
        mode = task.choice().mode
        chunk_size = task.chunk_size(mode, streamed=True)
        return _each(task.way(mode).axis, task.open(mode), chunk_size, task.at)


def _each(
    axis: Axis, opened: Opened, chunk_size: int | None, at: Sequence[Tensor]
) -> Iterator[Block]:
    step = chunk_size or opened.count
    for start in range(0, opened.count, step):
        stop = min(start + step, opened.count)
        generators = Generators(at)  # the caller draws between blocks, and goes on where it was
        with values_only():
            lines = [x.flatten(1) for x in opened.lines(start, stop)]
            value = torch.cat(lines, 1) if len(lines) > 1 else lines[0]
            del lines
        generators.rewind()
        yield Block(axis, start, stop, value if axis == "rows" else value.T)
