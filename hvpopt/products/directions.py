"""Products with several directions: how many at once, by vmap or one by one.

Measured on a CPU (torch 2.13, one thread, 8 directions; milliseconds and MiB a direction, by a
loop over a retained double-backward graph and by vmap over it): GPT of 2 layers, d = 32: 24.7 ms
and 9.3 ms; MLP 784-64-64-10, batch 32: 0.63 and 0.57; MLP 784-256-256-10, batch 256: 6.5 and 7.1;
GPT of 4 layers, d = 128: 108 and 117; CNN with BatchNorm: 41 and 44. So vmap pays where
operations are small and their overhead dominates; where they are large it gains nothing, and
takes as much memory a direction as one gradient's intermediate values (11 MiB of the CNN's, 8
of the larger GPT's). Jacobian products gain more (with two threads, in gradients a direction, GGN
products of an MLP 2.0 and 1.4, of a GPT 2.4 and 1.8), as they share the primal. Hence the rule: as
many at once as fit a budget of memory, and over a retained graph on a CPU, unless a limit is given,
only where the values that operations compute are small on average.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hvpopt.engines.support import graph_nodes
from hvpopt.products.surroundings import in_transform, ordinary, rewinder
from hvpopt.pytrees import Tree

logger = logging.getLogger("hvpopt")

_BUDGETS = {"cpu": 64 * 2**20}
_BUDGET = 2**30  # of devices that need more work at once than a CPU does
_SMALL = 2**18  # bytes of an operation's value, whose arithmetic takes about as long as its call


@dataclass(frozen=True)
class Limit:
    """How many directions may go at once.

    Raises:
        TypeError: If a limit is no int.
        ValueError: If a limit is not positive, or both are given.
    """

    chunk_size: int | None
    memory_budget: int | None

    def __post_init__(self) -> None:
        for name, value in (
            ("chunk_size", self.chunk_size),
            ("memory_budget", self.memory_budget),
        ):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise TypeError(f"{name}={value!r} is a {type(value).__name__}; expected an int.")
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}; expected at least 1, or None.")
        if self.chunk_size is not None and self.memory_budget is not None:
            raise ValueError("chunk_size and memory_budget are both given; expected one of them.")

    def of(
        self,
        k: int,
        device: torch.device,
        sizes: Callable[[], "Intermediates"],
        *,
        is_retained: bool = False,
    ) -> int:
        """How many of k directions go at once, at least one; over a retained graph, or none."""
        if self.chunk_size is not None or k == 1:
            return min(k, self.chunk_size or k)
        values = sizes()
        budget = self.memory_budget or _BUDGETS.get(device.type, _BUDGET)
        if is_retained and self.memory_budget is None and device.type == "cpu":
            if values.mean > _SMALL:
                return 1
            budget *= 4
        return max(1, min(k, budget // max(1, values.total)))


@dataclass(frozen=True)
class Intermediates:
    """The values that are computed on the way to some tensors, in bytes."""

    total: int
    count: int

    @property
    def mean(self) -> float:
        """Of one operation's."""
        return self.total / max(1, self.count)


def along(
    one: Callable[[Tree], tuple[Tree, Tree]],
    v: Tree,
    k: int | None,
    *,
    limit: Limit,
    run: Callable[[Tree], Tree],
    params: Tree,
) -> tuple[Tree, Tree]:
    """What ``one(v)`` gives, for one direction or for each of k.

    Inside a transform or ``torch.compile`` and under inference mode nothing is estimated, and all
    go at once.

    Args:
        one: As of `for_each`.
        v: A direction, or k.
        k: None for one.
        limit: How many go at once.
        run: The function that ``one`` runs, from whose graph the memory is estimated.
        params: Its argument.
    """
    if k is None:
        return one(v)
    if torch.compiler.is_compiling() or in_transform() or torch.is_inference_mode_enabled():
        return for_each(one, v, k, min(k, limit.chunk_size or k))
    rewind = rewinder(params)

    def sizes() -> Intermediates:
        values = recorded(run, params)
        rewind()
        return values

    return for_each(one, v, k, limit.of(k, device_of(params), sizes), rewind)


def device_of(params: Tree) -> torch.device:
    """The device of the first parameter."""
    return pytree.tree_leaves(params)[0].device


def for_each(
    one: Callable[[Tree], tuple[Tree, Tree]],
    vs: Tree,
    k: int,
    chunk: int,
    rewind: Callable[[], None] = lambda: None,
) -> tuple[Tree, Tree]:
    """What ``one(v)`` gives for each of the k directions in ``vs``.

    By vmap, ``chunk`` at once. What vmap cannot do is done one by one, and logged.

    Args:
        one: v ↦ (what does not depend on v, what does).
        vs: k directions.
        k: How many.
        chunk: How many at once; 1 for no vmap.
        rewind: Called before each run of ``one`` but the first.

    Returns:
        (shared, products): the first as it is, the second stacked in a first dimension.
    """
    shared: Tree = None
    parts: list[Tree] = []
    done = 0
    while done < k:
        if done:
            rewind()
        size = min(chunk, k - done)
        piece = pytree.tree_map(lambda x, a=done, b=done + size: x[a:b], vs)
        if size == 1:
            shared, product = one(pytree.tree_map(lambda x: x[0], piece))
            parts.append(pytree.tree_map(lambda x: x.unsqueeze(0), product))
        else:
            try:
                copies, products = torch.vmap(one, randomness="same")(piece)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # one by one, f's own errors are raised again
                log_fall_back(str(error).strip().partition("\n")[0])
                chunk = 1
                rewind()
                continue
            shared = pytree.tree_map(lambda x: x[0], copies)
            parts.append(products)
        done += size
    return shared, pytree.tree_map(lambda *xs: torch.cat(xs), *parts) if parts[1:] else parts[0]


@functools.lru_cache(64)
def log_fall_back(reason: str) -> None:
    """Logs once for each reason that directions are taken one by one."""
    logger.warning("Products with several directions go one by one, as vmap failed: %s", reason)


def intermediates(outputs: Iterable[Tensor]) -> Intermediates:
    """The values computed on the way to ``outputs``, as their graph records them."""
    sizes = [
        math.prod(meta.shape) * meta.dtype.itemsize
        for node in graph_nodes(outputs)
        if not hasattr(node, "variable")
        for meta in node._input_metadata
    ]
    return Intermediates(sum(sizes), len(sizes))


def recorded(f: Callable[[Tree], Tree], params: Tree) -> Intermediates:
    """`intermediates` of ``f(params)``, which is run once for it."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = pytree.tree_map(lambda x: ordinary(x).detach().requires_grad_(), params)
        return intermediates(pytree.tree_leaves(f(leaves)))
