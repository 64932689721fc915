"""What a Jacobian takes in memory, how many of its rows fit at once, and when it is refused."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from hvpopt.jacobians.draws import Generators
from hvpopt.jacobians.functions import LeafFunction

T = TypeVar("T")
ALWAYS_FITS = 2**26
"""Bytes below which nobody asks how much memory is free."""


class Remembered(Generic[T]):
    """The last 256 things by key."""

    def __init__(self) -> None:
        self._things: OrderedDict[object, T] = OrderedDict()

    def get(self, key: object) -> T | None:
        """What is remembered, if anything."""
        return self._things.get(key)

    def put(self, key: object, thing: T) -> None:
        """Remembers it; the oldest is forgotten where there are too many."""
        self._things[key] = thing
        self._things.move_to_end(key)
        if len(self._things) > 256:
            self._things.popitem(last=False)

    def forget(self, key: object) -> None:
        """Forgets it, if it was known."""
        self._things.pop(key, None)


@dataclass(frozen=True)
class Footprint:
    """What one run of a function shows about the size of its Jacobian."""

    inputs: tuple[tuple[int, int], ...]
    """(entries, bytes of one) of each differentiated tensor."""
    outputs: tuple[tuple[int, int], ...]
    """(entries, bytes of one) of each tensor of the value."""
    work: int
    """Bytes that the run's operations allocate, summed."""
    draws: bool = False
    """Whether the run drew random numbers."""

    @cached_property
    def rows(self) -> int:
        """Entries of the value."""
        return sum(n for n, _ in self.outputs)

    @cached_property
    def columns(self) -> int:
        """Entries that are differentiated."""
        return sum(n for n, _ in self.inputs)

    @cached_property
    def result(self) -> int:
        """Bytes of the Jacobian: its entries have the dtypes of the inputs."""
        return self.rows * sum(n * size for n, size in self.inputs)

    @cached_property
    def of_gradient(self) -> "Footprint":
        """That of the gradient of the function: some three times its work."""
        return replace(self, outputs=self.inputs, work=3 * self.work)

    @cached_property
    def line(self) -> int:
        """Bytes that another row or column takes while it is computed together with others.

        A unit vector, a row or column, and the derivatives of what the function computes on the
        way, with as much again for what their formulas allocate. All of them are counted as if
        they lived at once, which is more than what is needed.
        """
        return 2 * self.work + sum(n * size for n, size in (*self.inputs, *self.outputs))


class _Allocated(TorchDispatchMode):
    """Sums the bytes of what operations return, views excepted."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False):
            self.total += sum(x.nbytes for x in pytree.tree_leaves(out) if isinstance(x, Tensor))
        return out


def footprint(f: LeafFunction, at: Sequence[Tensor], generators: Generators) -> Footprint:
    """Runs f once, without derivatives, and looks at what it allocates, returns and draws."""
    with torch.no_grad(), _Allocated() as allocated:
        outputs = f(*at)
    return Footprint(
        tuple((x.numel(), x.element_size()) for x in at),
        tuple((y.numel(), y.element_size()) for y in outputs),
        allocated.total,
        generators.moved(),
    )


def budget_for(memory_budget: int | None, need: int, device: torch.device) -> int | None:
    """The bytes that may be used: those given, else half of what is free.

    None, for no limit, where ``need`` is too little to matter, or what is free is unknown.
    """
    if memory_budget is not None:
        return memory_budget
    free = _free_bytes(device) if need > ALWAYS_FITS else None
    return None if free is None else free // 2


def check_fits(what: str, shape: tuple[int, ...], size: int, budget: int | None) -> None:
    """Lets a result pass that the budget holds.

    Raises:
        ValueError: If it is larger, with both sizes.
    """
    if budget is not None and size > budget:
        raise ValueError(
            f"The {what} of shape {' × '.join(f'{n:,}' for n in shape)} needs {in_words(size)}; "
            f"the memory budget is {in_words(budget)}. Take it in blocks that you use one by one "
            f"(hvpopt.jacobians.{what.split()[-1].lower()}_blocks), take products with it "
            "(hvpopt.products), or raise memory_budget."
        )


def lines_at_once(
    footprint: Footprint, budget: int | None, *, count: int, held: int, kept: int
) -> int | None:
    """How many rows, or columns, to compute together; None where all of them fit.

    Args:
        footprint: Of the function.
        budget: In bytes, or None.
        count: Of the rows, or columns.
        held: Bytes that are taken besides, by the result while it fills.
        kept: Bytes that another row or column takes besides, in the block before.
    """
    if budget is None or footprint.work + count * footprint.line <= budget:
        return None
    room = budget - held - footprint.work
    return min(max(1, room // (footprint.line + kept)), count)


def in_words(size: int) -> str:
    """Bytes in KiB, MiB, GiB or TiB."""
    scaled = float(size)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if scaled < 1024:
            return f"{scaled:.0f} bytes" if unit == "bytes" else f"{scaled:.1f} {unit}"
        scaled /= 1024
    return f"{scaled:,.1f} TiB"


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    info = Path("/proc/meminfo")
    if device.type == "cpu" and info.exists():
        for entry in info.read_text().splitlines():
            if entry.startswith("MemAvailable:"):
                return int(entry.split()[1]) * 1024
    return None
