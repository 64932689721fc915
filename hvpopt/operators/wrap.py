"""Any product as an operator."""

from collections.abc import Sequence

from torch import Tensor

from hvpopt.operators.base import LinearOperator, Product


def from_product(
    product: Product, like: Sequence[Tensor], *, symmetric: bool = True
) -> LinearOperator:
    """The operator of a function v ↦ A v on lists of tensors.

    Args:
        product: such as ``LinearizedClosure.product``, or ``Linearization.hvp`` of a list.
        like: tensors of the vectors' shapes, dtypes and devices.
        symmetric: whether A = Aᵀ.

    Raises:
        TypeError: If ``like`` holds tensors that are not real floating point.
        ValueError: If ``like`` is empty.

    Examples:
        >>> import torch
        >>> from hvpopt.products import linearize
        >>> w = [torch.tensor([1.0, 2.0])]
        >>> from_product(linearize(lambda p: (p[0] ** 3).sum(), w).hvp, w).to_dense()
        tensor([[ 6.,  0.],
                [ 0., 12.]])
    """
    return LinearOperator(like, product, symmetric=symmetric)
