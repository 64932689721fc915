"""A linear map on lists of tensors, with the arithmetic of matrices."""

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from hvpopt import trees
from hvpopt.operators.export import as_scipy, dense
from hvpopt.operators.vectors import Block, Space, checked_scalar
from hvpopt.trees import TensorList

Product = Callable[[TensorList], Sequence[Tensor]]


class LinearOperator:
    """A square matrix A that is known by its products v ↦ A v.

    Vectors are lists of tensors, one for each parameter, in the parameters' order; n counts all
    their entries. ``A(v)`` is ``A.matvec(v)``, so that A is what `hvpopt.solvers` take as a
    product. ``A @ x`` takes such a list, a flat tensor (n,) or the columns of a matrix (n, k), and
    returns the same kind. ``A + B``, ``A - B``, ``2 * A``, ``-A`` are operators again.

    Args:
        like: tensors that give the vectors' shapes, dtypes and devices; the parameters
            themselves, where blocks are to be chosen by them.
        matvec: v ↦ A v.
        matmat: V ↦ A V for k vectors at once, tensors with a leading axis of k; by default
            ``matvec`` for each.
        symmetric: whether A = Aᵀ, which ``to_scipy`` passes on.

    Attributes:
        like: as given.
        shapes: the tensors' shapes.
        shape: (n, n).
        dtype: of flat vectors, which holds every tensor's.
        device: of flat vectors, the first tensor's.

    Raises:
        TypeError: If ``like`` holds tensors that are not real floating point.
        ValueError: If ``like`` is empty.

    Examples:
        >>> A = LinearOperator([torch.zeros(2)], lambda v: [torch.tensor([1.0, 2.0]) * v[0]])
        >>> A @ torch.tensor([1.0, 1.0])
        tensor([1., 2.])
        >>> (A + 2 * A).damped(0.5).to_dense()
        tensor([[3.5000, 0.0000],
                [0.0000, 6.5000]])
    """

    def __init__(
        self,
        like: Sequence[Tensor],
        matvec: Product,
        *,
        matmat: Product | None = None,
        symmetric: bool = True,
    ) -> None:
        self._space = Space(like)
        self._matvec, self._matmat = matvec, matmat
        self.symmetric = symmetric

    @property
    def like(self) -> TensorList:
        """The tensors that vectors resemble; of curvature operators, the parameters."""
        return self._space.like

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of a vector's tensors."""
        return [tuple(x.shape) for x in self.like]

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return self._space.n, self._space.n

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of flat vectors, to which the tensors' dtypes promote."""
        return self._space.dtype

    @property
    def device(self) -> torch.device:
        """The device of flat vectors, the first tensor's."""
        return self._space.device

    def matvec(self, v: Sequence[Tensor]) -> TensorList:
        """A v, a list of new tensors, detached.

        Raises:
            ValueError: If ``v`` differs from ``like`` in number, shapes, dtypes or devices, or if
                the product does.
        """
        return self._space.checked(list(self._matvec(self._space.checked(v))), "the product")

    __call__ = matvec

    def matmat(self, vs: Sequence[Tensor]) -> TensorList:
        """A V for k vectors; tensors of shapes (k, *shape), both ways.

        Raises:
            ValueError: If ``vs`` differs from ``like`` but for a leading axis of one length.
        """
        vs = self._space.checked_many(vs)
        if self._matmat is None:
            products = [self.matvec([x[i] for x in vs]) for i in range(len(vs[0]))]
            return [torch.stack(xs) for xs in zip(*products, strict=True)]
        return self._space.checked_many(list(self._matmat(vs)))

    def _rows(self, rows: Tensor) -> Tensor:
        """The products with the rows of (k, n), as rows."""
        return self._space.flatten(self.matmat(self._space.unflatten(rows)), many=True)

    @overload
    def __matmul__(self, x: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, x: Sequence[Tensor]) -> TensorList: ...
    def __matmul__(self, x: Tensor | Sequence[Tensor]) -> Tensor | TensorList:
        """A x in the form of x: a list of tensors, a flat tensor (n,), a matrix (n, k)."""
        if isinstance(x, (list, tuple)):
            return self.matvec(x)
        if not isinstance(x, Tensor):
            raise TypeError(
                f"An operator was multiplied by a {type(x).__name__}; expected a list of tensors, "
                "or a tensor of shape (n,) or (n, k)."
            )
        x = self._space.checked_flat(x)
        if x.dim() == 2:
            return self._rows(x.T).T
        return self._space.flatten(self.matvec(self._space.unflatten(x)))

    def __add__(self, other: object) -> "LinearOperator":
        """A + B."""
        return self._combined(other, 1.0, "The sum")

    def __sub__(self, other: object) -> "LinearOperator":
        """A − B."""
        return self._combined(other, -1.0, "The difference")

    def _combined(self, other: object, sign: float, what: str) -> "LinearOperator":
        if not isinstance(other, LinearOperator):
            raise TypeError(
                f"{what} of an operator and a {type(other).__name__}; expected another operator, "
                "or damped(damping) to add a multiple of the identity."
            )
        self._space.check_fits(other._space, what)
        return LinearOperator(
            self.like,
            lambda v: trees.add(self.matvec(v), other.matvec(v), sign),
            matmat=lambda vs: trees.add(self.matmat(vs), other.matmat(vs), sign),
            symmetric=self.symmetric and other.symmetric,
        )

    def __mul__(self, factor: object) -> "LinearOperator":
        """The operator times a number."""
        c = checked_scalar(factor, "The factor")
        return LinearOperator(
            self.like,
            lambda v: trees.scale(self.matvec(v), c),
            matmat=lambda vs: trees.scale(self.matmat(vs), c),
            symmetric=self.symmetric,
        )

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> "LinearOperator":
        """The operator over a number."""
        return self * (1.0 / checked_scalar(divisor, "The divisor"))

    def __neg__(self) -> "LinearOperator":
        """−A."""
        return self * -1.0

    def damped(self, damping: float | Sequence[float]) -> "LinearOperator":
        """A + λ I, or A + diag(λᵢ Iᵢ) with one damping λᵢ a tensor; in the operator's units.

        Raises:
            TypeError: If a damping is not a real number.
            ValueError: If one is not finite, or their number is not that of the tensors.
        """
        given = damping if isinstance(damping, Sequence) else [damping] * len(self.like)
        each = [checked_scalar(d, "The damping") for d in given]
        if len(each) != len(self.like):
            raise ValueError(f"{len(each)} dampings were given for {len(self.like)} tensors.")
        return LinearOperator(
            self.like,
            lambda v: trees.add(self.matvec(v), trees.scale_each(each, v)),
            matmat=lambda vs: trees.add(self.matmat(vs), trees.scale_each(each, vs)),
            symmetric=self.symmetric,
        )

    def block(self, which: Block) -> "LinearOperator":
        """The rows and columns of some tensors.

        Args:
            which: indices or a slice of ``like``; or tensors of ``like`` themselves, a module
                that holds some of them, a parameter group.

        Raises:
            TypeError: If ``which`` is something else.
            ValueError: If it names nothing, something twice, or what is not in ``like``.
        """
        places = self._space.chosen(which)

        def widened(v: TensorList) -> TensorList:
            lead = v[0].shape[: v[0].dim() - self.like[places[0]].dim()]
            whole = [x.new_zeros((*lead, *x.shape)) for x in self.like]
            for i, x in zip(places, v, strict=True):
                whole[i] = x
            return whole

        def narrowed(v: TensorList) -> TensorList:
            return [v[i] for i in places]

        return LinearOperator(
            [self.like[i] for i in places],
            lambda v: narrowed(self.matvec(widened(v))),
            matmat=lambda vs: narrowed(self.matmat(widened(vs))),
            symmetric=self.symmetric,
        )

    def to_dense(self, *, memory_budget: int = 2 * 2**30) -> Tensor:
        """The matrix (n, n), by products with unit vectors, many at a time.

        Args:
            memory_budget: bytes that the matrix and the vectors of one pass may take.

        Raises:
            ValueError: If the matrix takes more.
        """
        return dense(self._rows, self._space, memory_budget)

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.linalg.LinearOperator``, on NumPy arrays (n,) and (n, k).

        Arrays are float64 for a float64 operator, else float32. ``rmatvec`` is there for a
        symmetric operator.

        Raises:
            ImportError: If SciPy is not installed.
        """
        return as_scipy(self._rows, self._space, symmetric=self.symmetric)
