"""What a checkpoint may hold that is read with ``weights_only=True``."""

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

_PLAIN = (bool, int, float, str, bytes, type(None))


def is_portable(value: Any) -> bool:
    """Whether a value consists of tensors and plain values in tuples, lists and dicts."""
    if type(value) in (tuple, list):
        return all(map(is_portable, value))
    if type(value) is dict:
        return all(is_portable(k) and is_portable(v) for k, v in value.items())
    return type(value) is Tensor or type(value) in _PLAIN


def size_in_bytes(value: Any) -> int:
    """The size of all tensors in nested containers."""
    return sum(x.nbytes for x in tree_leaves(value) if isinstance(x, Tensor))
