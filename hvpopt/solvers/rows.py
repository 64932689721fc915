"""What solvers and estimators are given, read: an operator, or a product and its vectors' form."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor

from hvpopt.solvers.checks import Operator, checked_map, checked_vector
from hvpopt.solvers.flat import Flat
from hvpopt.trees import TensorList

_AT_ONCE = 2**22  # entries of the vectors that go through an operator in one call,
_AT_MOST = 2**28  # or of four vectors, which spares a dataset most of its passes, up to so many


class ListOperator(Protocol):
    """An operator that knows what its vectors look like, such as a `LinearOperator`."""

    @property
    def like(self) -> TensorList:
        """Tensors of the vectors' shapes, dtypes and devices."""

    symmetric: bool

    def __call__(self, v: Sequence[Tensor], /) -> TensorList:
        """A v."""

    def matmat(self, vs: Sequence[Tensor], /) -> TensorList:
        """A times k vectors, along a leading axis."""


def read(operator: ListOperator | Operator, like: Sequence[Tensor] | None) -> ListOperator:
    """A symmetric operator, from one or from a product v ↦ A v on lists shaped like ``like``.

    Raises:
        TypeError: If a product comes without ``like``, ``operator`` is neither, or ``like`` is no
            list of real floating-point tensors.
        ValueError: If ``like`` is empty or does not fit the operator, or the operator is not
            symmetric.
    """
    if like is not None and not _is_list_of_tensors(like):
        given = repr(like) if isinstance(like, int | float | str) else f"a {type(like).__name__}"
        raise TypeError(
            f"like is {given}; expected a list of tensors, such as list(net.parameters()). Options "
            "come by name."
        )
    if _knows_its_vectors(operator):
        shapes = [tuple(x.shape) for x in operator.like]
        if like is not None and [tuple(x.shape) for x in like] != shapes:
            raise ValueError(
                f"like has the shapes {[tuple(x.shape) for x in like]}, but the operator's vectors "
                f"{shapes}: leave like out beside a LinearOperator."
            )
        if not operator.symmetric:
            raise ValueError("The operator is not symmetric, which this supposes.")
        return operator
    if not callable(operator):
        raise TypeError(
            f"operator is a {type(operator).__name__}; expected a LinearOperator, or a function "
            "v ↦ A v on lists of tensors."
        )
    if like is None:
        raise TypeError(
            "A function v ↦ A v does not say what its vectors look like: give like=, such as the "
            "parameters, or a LinearOperator."
        )
    return _OneByOne(operator, like)


def _is_list_of_tensors(like: object) -> bool:
    return isinstance(like, list | tuple) and all(isinstance(x, Tensor) for x in like)


def _knows_its_vectors(operator: Any) -> TypeGuard[ListOperator]:
    return hasattr(operator, "like") and hasattr(operator, "matmat")


class _OneByOne:
    """A product that takes one vector at a time; what it returns is checked."""

    symmetric = True

    def __init__(self, product: Operator, like: Sequence[Tensor]) -> None:
        self._product = checked_map(product, checked_vector(like, "like"), "matvec")
        self.like = list(like)

    def __call__(self, v: Sequence[Tensor], /) -> TensorList:
        return self._product(list(v))

    def matmat(self, vs: Sequence[Tensor], /) -> TensorList:
        each = [self([x[i] for x in vs]) for i in range(len(vs[0]))]
        return [torch.stack(xs) for xs in zip(*each, strict=True)]


class Rows:
    """A symmetric operator on flat vectors, which are the rows of matrices (k, n).

    Rows are float32 or float64 on the first tensor's device (`hvpopt.solvers.flat.Flat`).

    Args:
        operator: A `LinearOperator`, or a product v ↦ A v.
        like: For a product, the shapes, dtypes and devices of its vectors.

    Raises:
        As `read`.
    """

    def __init__(
        self, operator: ListOperator | Operator, like: Sequence[Tensor] | None = None
    ) -> None:
        self.operator = read(operator, like)
        self.space = Flat(checked_vector(self.operator.like, "like"))
        self.n = self.space.n
        self.rounding: float = torch.finfo(self.space.dtype).eps
        self.num_products = 0

    def products(self, rows: Tensor) -> Tensor:
        """A times each row, as new rows."""
        results = []
        for part in rows.split(self.at_once):
            self.num_products += len(part)
            if len(part) == 1:  # spares operators without a matmat two copies
                results.append(self.space.flat(self.operator(self.space.listed(part[0])))[None])
            else:
                results.append(self.space.rows(self.operator.matmat(self.space.stacked(part))))
        return torch.cat(results) if len(results) > 1 else results[0]

    @property
    def at_once(self) -> int:
        """How many rows go through the operator in one call."""
        few = min(4, _AT_MOST // self.n)
        return max(1, few, _AT_ONCE // self.n)

    def signs(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Rows of independent entries ±1, each with probability ½, so that E[zzᵀ] = I.

        They are the bits of random words, 64 entries of a row for each number that is drawn on
        the CPU; what goes to another device is an eighth of a byte for each.
        """
        rows = []
        for _ in range(count):
            words = torch.empty((self.n + 63) // 64, dtype=torch.int64)
            words.random_(-(2**63), None, generator=generator)
            octets = words.view(torch.uint8).to(self.space.device)
            places = torch.arange(8, dtype=torch.uint8, device=octets.device)
            bits = (octets[:, None] >> places & 1).reshape(-1)[: self.n]
            rows.append(bits.to(self.space.dtype).mul_(2).sub_(1))
        return torch.stack(rows)

    def normals(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Rows of independent standard normal entries, drawn on the CPU."""
        rows = [torch.randn(self.n, generator=generator) for _ in range(count)]
        return torch.stack(rows).to(self.space.device, self.space.dtype)
