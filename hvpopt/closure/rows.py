"""A random part of a batch's rows, and the rest: their gradients and Gauss-Newton matrices.

As a function of the network's outputs z a loss is a mean or a sum over the rows z_n of a batch, so
that with J_n = ∂z_n/∂θ

    L(θ) = Σ_n ℓ_n(z_n),      g = Σ_n J_nᵀ ∇ℓ_n,      G = Σ_n J_nᵀ ∇²ℓ_n J_n.

Of a random part A of the N rows,

    g_A = (N/|A|) Σ_{n∈A} J_nᵀ ∇ℓ_n,      G_A = (N/|A|) Σ_{n∈A} J_nᵀ ∇²ℓ_n J_n

have the expectations g and G. They come from the one run of the closure, whose batch is out of
reach: derivatives by z are weighed row by row on their way through the graph, so that a product
costs what one of the whole batch costs.

A row is an index of the first dimension of the input of a loss function: an example, as a rule.
What does not divide into rows is in every part: a penalty, or the loss of a single example.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hvpopt import trees
from hvpopt.engines.base import fill, reverse, vjp
from hvpopt.engines.interception import Backward
from hvpopt.engines.split import LossSplit
from hvpopt.engines.support import without_hooks
from hvpopt.linearization import LinearizedClosure
from hvpopt.trees import TensorList

Which = Literal["part", "rest"]


class Rows:
    """A random part of a batch's rows, the same for every loss function with as many rows.

    Args:
        fraction: share of the rows in the part, rounded so that neither it nor the rest is empty.
        seed: of the choice.

    Raises:
        ValueError: For a fraction outside (0, 1).

    Examples:
        >>> rows = Rows(0.5, seed=0)
        >>> both = torch.cat([rows.indices(5, which) for which in ("part", "rest")])
        >>> both.sort().values
        tensor([0, 1, 2, 3, 4])
    """

    def __init__(self, fraction: float, seed: int) -> None:
        if not 0 < fraction < 1:
            raise ValueError(f"fraction={fraction!r} is out of range: expected 0 < fraction < 1.")
        self._fraction, self._seed = fraction, seed
        self._which: Which | None = None
        self._known: dict[tuple[int, Which, torch.device, torch.dtype], Tensor] = {}

    @contextmanager
    def only(self, which: Which) -> Iterator[None]:
        """While active, derivatives are those of the part, or of the rest."""
        self._which = which
        try:
            yield
        finally:
            self._which = None

    def indices(self, num_rows: int, which: Which) -> Tensor:
        """The rows of the part, or of the rest, of so many."""
        order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(self._seed))
        size = min(max(round(self._fraction * num_rows), 1), num_rows - 1)
        return order[:size] if which == "part" else order[size:]

    def weights(self, like: Tensor) -> Tensor | None:
        """N/|A| in the rows of A and zero elsewhere, to multiply ``like``; None for ones."""
        if self._which is None:
            return None
        num_rows = like.shape[0]
        key = (num_rows, self._which, like.device, like.dtype)
        if key not in self._known:
            chosen = self.indices(num_rows, self._which)
            weights = torch.zeros(num_rows, dtype=torch.float64)
            weights[chosen] = num_rows / len(chosen)
            self._known[key] = weights.to(like.device, like.dtype)
        return self._known[key].reshape(-1, *[1] * (like.dim() - 1))


class _Weighed(torch.autograd.Function):
    """x times the root of the weights, as they stand when it is computed; its own derivative.

    Applied to z while there are none it is the identity, whose derivatives of first and second
    order are weighed later: once on either side of ∇²ℓ.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        weights = rows.weights(x)
        return x.view_as(x) if weights is None else x * weights.sqrt()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Weighed.apply(grad, ctx.rows), None


class _Weighing(TorchFunctionMode):
    """While active, what a split hands to the loss functions can be weighed, if it has rows."""

    def __init__(self, split: LossSplit, rows: Rows, weighed: TensorList) -> None:
        super().__init__()
        self._split, self._rows, self._weighed = split, rows, weighed

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch in place of each of its functions."""
        kwargs = kwargs or {}
        if self._split.handles(func):
            leaves = {id(cut.leaf) for cut in self._split.cuts}

            def weighed(value: Any) -> Any:
                if id(value) not in leaves or not _has_rows(value, func.__name__):
                    return value
                self._weighed.append(value)
                return _Weighed.apply(value, self._rows)

            args = [weighed(value) for value in args]
            kwargs = {name: weighed(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _has_rows(value: Tensor, loss: str) -> bool:
    """Whether there are two or more; the one dimension of a vector may be the classes'."""
    if value.dim() == 1 and loss in ("cross_entropy", "log_softmax"):
        return False
    return value.dim() > 0 and value.shape[0] > 1


class WatchedRows:
    """Rows, with what their gradients need of the run that products come from.

    Args:
        rows: the part.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._weighed: TensorList = []
        self._pairs: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def around(
        self, split: LossSplit, other: AbstractContextManager[object] | None
    ) -> Iterator[None]:
        """A context for a run with a split, inside of another one."""
        with other or nullcontext(), _Weighing(split, self.rows, self._weighed):
            yield

    def seeing(self, split: LossSplit, on_backward: Backward) -> Backward:
        """``on_backward``, after a look at the outputs z and the slopes ∂L/∂z."""

        def handle(loss: Tensor, plain: Callable[..., None], /, **options: Any) -> None:
            weighed = set(map(id, self._weighed))
            cuts = [cut for cut in split.cuts if id(cut.leaf) in weighed]
            leaves = [cut.leaf for cut in cuts]
            if leaves:
                slopes = reverse([loss], leaves, [torch.ones_like(loss)], retain_graph=True)
                self._pairs += [
                    (cut.output, slope.detach())
                    for cut, slope in zip(cuts, slopes, strict=True)
                    if slope is not None
                ]
            on_backward(loss, plain, **options)

        return handle

    def restricted(self, point: LinearizedClosure, which: Which) -> LinearizedClosure:
        """The point with the product of the part, or of the rest."""

        def product(v: TensorList) -> TensorList:
            with self.rows.only(which):
                return point.product(v)

        return replace(point, product=product)

    def excess(self, which: Which, params: TensorList) -> TensorList:
        """g_A − g = Σ_n (w_n − 1) J_nᵀ ∇ℓ_n, of this rank, in the scale of the closure's loss."""
        outputs, slopes = [z for z, _ in self._pairs], [s for _, s in self._pairs]
        extra = []
        with self.rows.only(which):
            for slope in slopes:
                weights = self.rows.weights(slope)
                assert weights is not None
                extra.append((weights - 1) * slope)
        with torch.enable_grad(), without_hooks(params):
            return fill(vjp(outputs, params, extra), params)


def moved_gradient(point: LinearizedClosure, excess: TensorList) -> LinearizedClosure:
    """The point with so much added to its gradients."""
    grad, batch_grad = (trees.add(g, excess) for g in (point.grad, point.batch_grad))
    return replace(point, grad=grad, batch_grad=batch_grad)
