"""An operator as a dense matrix, and as SciPy's operator."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from hvpopt.operators.vectors import Space

DenseMap = Callable[[Tensor], Tensor]
"""From the rows of (k, n) to their products, as rows."""

_VECTORS = 4  # that one product holds at a time: the unit vector, its product, a copy of each


def dense(apply: DenseMap, space: Space, memory_budget: int) -> Tensor:
    """The matrix (n, n) of a linear map, by products with as many unit vectors as fit at once.

    Raises:
        ValueError: If the matrix needs more bytes than ``memory_budget``.
    """
    n, row = space.n, space.bytes_per_vector
    if n == 0:
        return torch.empty(0, 0, dtype=space.dtype, device=space.device)
    least = (n + _VECTORS) * row
    if least > memory_budget:
        raise ValueError(
            f"A dense matrix of {n} × {n} in {space.dtype} needs {_shown(least)}, more than "
            f"memory_budget={_shown(memory_budget)}: use products (matvec, matmat, to_scipy), a "
            "block, or a larger budget."
        )
    chunk = min(n, (memory_budget - n * row) // (_VECTORS * row))
    matrix = torch.empty(n, n, dtype=space.dtype, device=space.device)
    for start in range(0, n, chunk):
        count = min(chunk, n - start)
        units = torch.zeros(count, n, dtype=space.dtype, device=space.device)
        units.diagonal(start).fill_(1.0)
        matrix[:, start : start + count] = apply(units).T
    return matrix


def as_scipy(apply: DenseMap, space: Space, *, symmetric: bool) -> Any:
    """A linear map as SciPy's, on NumPy arrays in float64, or float32 for narrower tensors.

    Raises:
        ImportError: If SciPy is not installed.
    """
    try:
        import numpy as np

        linalg = import_module("scipy.sparse.linalg")
    except ImportError as error:
        raise ImportError("to_scipy needs SciPy: pip install scipy.") from error
    double = space.dtype == torch.float64

    def columns(xs: Any) -> Any:
        xs = np.asarray(xs)
        if np.iscomplexobj(xs):
            return columns(xs.real) + 1j * columns(xs.imag)
        rows = torch.from_numpy(np.array(xs.T, dtype="f8" if double else "f4"))
        return apply(rows.to(space.device, space.dtype)).to("cpu", rows.dtype).numpy().T

    def column(x: Any) -> Any:
        return columns(x.reshape(-1, 1))[:, 0]

    return linalg.LinearOperator(
        shape=(space.n, space.n),
        dtype=np.dtype("f8" if double else "f4"),
        matvec=column,
        matmat=columns,
        rmatvec=column if symmetric else None,
        rmatmat=columns if symmetric else None,
    )


def _shown(size: float) -> str:
    """Bytes in the largest unit that leaves at least one."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"
