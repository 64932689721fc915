"""What can be given as a probe, told apart, and its batches."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


def check_probe(probe: Any) -> None:
    """Lets pass what may be a probe: None, "val", a batch, or a loader.

    Raises:
        ValueError: for another word, a number, or an empty container.
        TypeError: for what can be read only once.
    """
    is_empty = isinstance(probe, (Mapping, Sequence)) and len(probe) == 0
    is_other_word = isinstance(probe, str) and probe != "val"
    if is_empty or is_other_word or isinstance(probe, (bool, int, float)):
        raise ValueError(f"probe={probe!r} is unknown: give 'val', a batch, or a loader.")
    if isinstance(probe, Iterator):
        raise TypeError(
            f"probe is a {type(probe).__name__}, which can be read only once: give a batch of it, "
            "next(...), or the loader itself."
        )


def is_loader(probe: Any) -> bool:
    """Whether something holds batches and is no batch."""
    is_batch = isinstance(probe, (Tensor, Mapping, Sequence))
    return not is_batch and (isinstance(probe, Iterable) or hasattr(probe, "__getitem__"))


def first_loader(loaders: Any) -> Any:
    """The first of nested loaders; None where there is none."""
    while isinstance(loaders, (list, tuple, dict)) and loaders:
        loaders = next(iter(loaders.values() if isinstance(loaders, dict) else loaders))
    return loaders or None


def num_rows(batch: Any) -> int | None:
    """The rows of a batch's first tensor with dimensions; None where there is none.

    Lightning weighs by them what modules log.

    Examples:
        >>> import torch
        >>> num_rows({"scale": torch.tensor(2.0), "x": torch.zeros(3, 5)})
        3
    """
    rows = (len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.dim() > 0)
    return next(rows, None)


def cloned(value: Any) -> Any:
    """A tensor's values, apart from it; anything else as it is."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def on_cpu(value: Any) -> Any:
    """A tensor's values on the CPU; anything else as it is."""
    return value.detach().cpu() if isinstance(value, Tensor) else value
