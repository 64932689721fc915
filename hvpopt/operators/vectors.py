"""The space that an operator acts on: lists of tensors, and flat vectors at its border."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hvpopt.pytrees import check_like, check_params
from hvpopt.trees import TensorList

Block = int | slice | Tensor | Iterable[int] | Iterable[Tensor] | nn.Module | Mapping[str, Any]
"""Some of a vector's tensors: by index, or the tensors themselves."""


class Space:
    """Lists of tensors with the shapes, dtypes and devices of ``like``.

    Raises:
        TypeError: If ``like`` holds tensors that are not real floating point.
        ValueError: If ``like`` is empty.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        self.like = list(like)
        check_params(self.like, "like")
        self.sizes = [x.numel() for x in self.like]
        self.n = sum(self.sizes)
        self.dtype = self.like[0].dtype
        for x in self.like:
            self.dtype = torch.promote_types(self.dtype, x.dtype)
        self.device = self.like[0].device

    def checked(self, v: Sequence[Tensor], what: str = "v") -> TensorList:
        """``v`` detached, if it is a vector of this space.

        Raises:
            ValueError: If it is not, naming the first tensor that does not fit.
        """
        if not isinstance(v, (list, tuple)) or len(v) != len(self.like):
            given = f"a list of {len(v)}" if isinstance(v, (list, tuple)) else type(v).__name__
            raise ValueError(
                f"{what} is {given}; expected a list of {len(self.like)} tensors of the shapes "
                f"{[tuple(x.shape) for x in self.like]}."
            )
        if not all(map(_alike, v, self.like)):
            check_like(list(v), self.like, what, "the operator's vectors")
        return [x.detach() for x in v]

    def checked_many(self, vs: Sequence[Tensor]) -> TensorList:
        """``vs`` detached, if it is k vectors of this space along a leading axis.

        Raises:
            ValueError: If it is not, naming the first tensor that does not fit.
        """
        axes = {x.shape[0] if x.dim() > 0 else None for x in vs}
        if len(vs) != len(self.like) or len(axes) != 1 or axes & {None, 0}:
            raise ValueError(
                f"The vectors have the shapes {[tuple(x.shape) for x in vs]}; expected "
                f"{len(self.like)} tensors of the shapes "
                f"{[('k', *x.shape) for x in self.like]} with one k ≥ 1."
            )
        self.checked([x[0] for x in vs])
        return [x.detach() for x in vs]

    def flatten(self, v: Sequence[Tensor], *, many: bool = False) -> Tensor:
        """The entries of a vector as (n,), or of k vectors as the rows of (k, n)."""
        lead = v[0].shape[:1] if many else ()
        flat = [x.reshape((*lead, size)) for x, size in zip(v, self.sizes, strict=True)]
        return torch.cat([x.to(self.device, self.dtype) for x in flat], dim=-1)

    def unflatten(self, flat: Tensor) -> TensorList:
        """The vector with the entries of (n,), or k vectors with those of the rows of (k, n)."""
        lead = flat.shape[:-1]
        return [
            part.reshape((*lead, *x.shape)).to(x.device, x.dtype)
            for part, x in zip(flat.split(self.sizes, dim=-1), self.like, strict=True)
        ]

    def checked_flat(self, x: Tensor) -> Tensor:
        """``x`` detached, if it is a flat vector (n,) or a matrix (n, k) of this space.

        Raises:
            ValueError: If its shape, dtype or device differs.
        """
        if x.dim() not in (1, 2) or x.shape[0] != self.n or x.numel() == 0:
            raise ValueError(
                f"The operator of shape ({self.n}, {self.n}) was given a tensor of shape "
                f"{tuple(x.shape)}; expected ({self.n},) or ({self.n}, k)."
            )
        for kind in ("dtype", "device"):
            given, wanted = getattr(x, kind), getattr(self, kind)
            if given != wanted:
                raise ValueError(f"The tensor has {kind} {given}; expected {wanted}.")
        return x.detach()

    def check_fits(self, other: "Space", what: str) -> None:
        """Lets the same space pass.

        Raises:
            ValueError: If shapes, dtypes or devices differ.
        """
        described = [[(tuple(x.shape), x.dtype, x.device) for x in s.like] for s in (self, other)]
        if described[0] != described[1]:
            shapes = [[tuple(x.shape) for x in s.like] for s in (self, other)]
            raise ValueError(
                f"{what} of operators on different vectors: shapes {shapes[0]} and {shapes[1]}; "
                "expected the same shapes, dtypes and devices."
            )

    def chosen(self, which: Block) -> list[int]:
        """The positions of a block's tensors: by index, slice, or identity of the tensors.

        Of a module's parameters, those count that are here.

        Raises:
            TypeError: If ``which`` is none of these.
            ValueError: If it names nothing, something twice, or what is not here.
        """
        items: Iterable[Any]
        if isinstance(which, slice):
            items = range(len(self.like))[which]
        elif isinstance(which, nn.Module):
            held = set(map(id, which.parameters()))
            items = [x for x in self.like if id(x) in held]
        elif isinstance(which, Mapping):
            items = which["params"]
        elif isinstance(which, Tensor) or not isinstance(which, Iterable):
            items = [which]
        else:
            items = which
        places = {id(x): i for i, x in enumerate(self.like)}
        found = []
        for item in items:
            if isinstance(item, Tensor):
                if id(item) not in places:
                    raise ValueError(
                        f"A tensor of shape {tuple(item.shape)} is none of the operator's "
                        "parameters, which are compared by identity; expected some of them."
                    )
                found.append(places[id(item)])
            elif isinstance(item, int):
                if not -len(self.like) <= item < len(self.like):
                    raise ValueError(
                        f"Index {item} is out of range for {len(self.like)} parameters."
                    )
                found.append(item % len(self.like))
            else:
                raise TypeError(
                    f"A block was chosen by a {type(item).__name__}; expected indices or "
                    "parameters."
                )
        if not found or len(set(found)) < len(found):
            raise ValueError(f"A block needs distinct parameters, at least one; got {found}.")
        return found

    @property
    def bytes_per_vector(self) -> int:
        """The memory of a flat vector."""
        return self.n * self.dtype.itemsize


def _alike(x: object, y: Tensor) -> bool:
    """Whether ``x`` is a tensor that may stand for ``y``."""
    if not isinstance(x, Tensor):
        return False
    return x.shape == y.shape and x.dtype == y.dtype and x.device == y.device


def checked_scalar(value: object, what: str) -> float:
    """``value`` as a finite float.

    Raises:
        TypeError: If it is not a real number.
        ValueError: If it is not finite.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{what} is a {type(value).__name__}; expected a real number.")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{what} is {number}; expected a finite number.")
    return number
