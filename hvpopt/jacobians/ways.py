"""The six ways to a dense Jacobian, and three to a dense Hessian.

A way is opened at a point and then gives any consecutive rows, or columns, of the matrix. Rows
are pullbacks of unit cotangents (reverse mode), columns are derivatives along unit tangents
(forward mode).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hvpopt.jacobians.functions import Blocks, LeafFunction
from hvpopt.products import linearize

Axis = Literal["rows", "columns"]


@dataclass(frozen=True)
class Opened:
    """A matrix of which consecutive rows, or columns, can be computed."""

    outer: Sequence[Tensor]
    """Tensors whose entries count the rows (f's value), or the columns (its arguments)."""
    lines: Callable[[int, int], list[Tensor]]
    """(start, stop) ↦ these rows, or columns, stacked: one tensor for each argument, or for
    each tensor of f's value, of shape (stop - start, *its own)."""

    @property
    def count(self) -> int:
        """How many rows, or columns, there are."""
        return sum(x.numel() for x in self.outer)


@dataclass(frozen=True)
class Way:
    """One way to a matrix."""

    axis: Axis
    open: Callable[[LeafFunction, Sequence[Tensor]], Opened]
    vmapped: bool


def unit_vectors(like: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """Rows ``start`` to ``stop`` of the identity on all entries of ``like``, split as it is.

    Returns:
        One tensor of shape (stop - start, *its own) for each tensor of ``like``.
    """
    parts, offset = [], 0
    for x in like:
        n = x.numel()
        part = x.new_zeros(stop - start, n)
        first, last = max(start, offset), min(stop, offset + n)
        if first < last:
            ones = part[first - start : last - start, first - offset : last - offset]
            ones.diagonal().fill_(1)
        parts.append(part.view(stop - start, *x.shape))
        offset += n
    return parts


def gathered(opened: Opened, chunk_size: int | None) -> list[Tensor]:
    """All rows, or columns, ``chunk_size`` at a time (None: all at once)."""
    count = opened.count
    if chunk_size is None or chunk_size >= count:
        return opened.lines(0, count)
    whole: list[Tensor] = []
    for start in range(0, count, chunk_size):
        stop = min(start + chunk_size, count)
        lines = opened.lines(start, stop)
        whole = whole or [x.new_empty(count, *x.shape[1:]) for x in lines]
        for x, part in zip(whole, lines, strict=True):
            x[start:stop] = part
    return whole


def assembled(axis: Axis, opened: Opened, lines: Sequence[Tensor]) -> Blocks:
    """The stacked rows, or columns, as blocks; views of them."""
    sizes = [x.numel() for x in opened.outer]
    split = [x.split(sizes) for x in lines]
    if axis == "rows":
        return [
            [parts[j].reshape(y.shape + parts[j].shape[1:]) for parts in split]
            for j, y in enumerate(opened.outer)
        ]
    return [
        [
            part.movedim(0, -1).reshape(part.shape[1:] + x.shape)
            for part, x in zip(parts, opened.outer, strict=True)
        ]
        for parts in split
    ]


def _vjp_vmap(f: LeafFunction, at: Sequence[Tensor]) -> Opened:
    outputs, pullback = torch.func.vjp(f, *at)[:2]
    vmapped = torch.vmap(pullback)
    return Opened(outputs, lambda a, b: list(vmapped(tuple(unit_vectors(outputs, a, b)))))


def _vjp_loop(f: LeafFunction, at: Sequence[Tensor]) -> Opened:
    leaves = [x.detach().requires_grad_() for x in at]
    with torch.enable_grad():
        outputs = f(*leaves)

    def lines(start: int, stop: int) -> list[Tensor]:
        rows: list[Sequence[Tensor]] = []
        for y, cotangents in _alone(outputs, start, stop):
            if not y.requires_grad:
                rows += [[torch.zeros_like(x) for x in at]] * len(cotangents)
                continue
            rows += [
                torch.autograd.grad(y, leaves, u, retain_graph=True, materialize_grads=True)
                for u in cotangents
            ]
        return [torch.stack(row) for row in zip(*rows, strict=True)]

    return Opened([y.detach() for y in outputs], lines)


def _jacfwd(f: LeafFunction, at: Sequence[Tensor]) -> Opened:
    def pushed(*tangents: Tensor) -> tuple[Tensor, ...]:
        return torch.func.jvp(f, tuple(at), tangents)[1]

    vmapped = torch.vmap(pushed, randomness="same")
    return Opened(at, lambda a, b: list(vmapped(*unit_vectors(at, a, b))))


def _jvp_loop(f: LeafFunction, at: Sequence[Tensor]) -> Opened:
    def lines(start: int, stop: int) -> list[Tensor]:
        columns = []
        for i, (x, tangents) in enumerate(_alone(at, start, stop)):

            def g(x: Tensor, i: int = i) -> tuple[Tensor, ...]:
                return f(*at[:i], x, *at[i + 1 :])

            columns += [torch.func.jvp(g, (x,), (v,))[1] for v in tangents]
        return [torch.stack(column) for column in zip(*columns, strict=True)]

    return Opened(at, lines)


def _dual_loop(f: LeafFunction, at: Sequence[Tensor]) -> Opened:
    def column(i: int, v: Tensor) -> list[Tensor]:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, v) if k == i else x for k, x in enumerate(at)]
            parts = [forward_ad.unpack_dual(y) for y in f(*duals)]
            return [torch.zeros_like(p) if t is None else t for p, t in parts]

    def lines(start: int, stop: int) -> list[Tensor]:
        columns = [
            column(i, v)
            for i, (_, tangents) in enumerate(_alone(at, start, stop))
            for v in tangents
        ]
        return [torch.stack(column) for column in zip(*columns, strict=True)]

    return Opened(at, lines)


def _alone(like: Sequence[Tensor], start: int, stop: int) -> list[tuple[Tensor, Sequence[Tensor]]]:
    """Each tensor with those unit vectors of ``start`` to ``stop`` that are its own."""
    pairs: list[tuple[Tensor, Sequence[Tensor]]] = []
    offset = 0
    for x in like:
        first, last = max(start - offset, 0), min(stop - offset, x.numel())
        pairs.append((x, unit_vectors([x], first, last)[0].unbind() if first < last else ()))
        offset += x.numel()
    return pairs


def _gradient(f: LeafFunction, at: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    return torch.func.grad(lambda *leaves: f(*leaves)[0], argnums=tuple(range(len(at))))


def _forward_over_reverse(f: LeafFunction, at: Sequence[Tensor]) -> Opened:
    return _jacfwd(_gradient(f, at), at)


def _reverse_over_reverse(f: LeafFunction, at: Sequence[Tensor]) -> Opened:
    return _vjp_vmap(_gradient(f, at), at)


def _hvp_loop(f: LeafFunction, at: Sequence[Tensor]) -> Opened:
    point = linearize(lambda leaves: f(*leaves)[0], tuple(at))

    def lines(start: int, stop: int) -> list[Tensor]:
        basis = zip(*(x.unbind() for x in unit_vectors(at, start, stop)), strict=True)
        return [torch.stack(rows) for rows in zip(*map(point.hvp, basis), strict=True)]

    return Opened(at, lines)


JACOBIAN_WAYS: dict[str, Way] = {
    "vjp_loop": Way("rows", _vjp_loop, vmapped=False),
    "vjp_vmap": Way("rows", _vjp_vmap, vmapped=True),
    "jacrev": Way("rows", _vjp_vmap, vmapped=True),
    "dual_loop": Way("columns", _dual_loop, vmapped=False),
    "jvp_loop": Way("columns", _jvp_loop, vmapped=False),
    "jacfwd": Way("columns", _jacfwd, vmapped=True),
}
HESSIAN_WAYS: dict[str, Way] = {
    "forward_over_reverse": Way("rows", _forward_over_reverse, vmapped=True),
    "reverse_over_reverse": Way("rows", _reverse_over_reverse, vmapped=True),
    "hvp_loop": Way("rows", _hvp_loop, vmapped=False),
}


def blocks_by(
    mode: str, f: LeafFunction, at: Sequence[Tensor], *, chunk_size: int | None
) -> Blocks:
    """The whole Jacobian of f, or Hessian, ``chunk_size`` rows or columns at a time (None: all).

    In chunks, "jacrev" is "vjp_vmap", which writes them to where they belong, and "jacfwd" the same
    with forward mode: torch's jacrev holds its chunks twice, and its jacfwd has none.
    """
    way = (JACOBIAN_WAYS | HESSIAN_WAYS)[mode]
    if mode == "jacrev" and chunk_size is None:
        return torch.func.jacrev(f, argnums=tuple(range(len(at))))(*at)
    if mode == "jacfwd" and chunk_size is None:
        return torch.func.jacfwd(f, argnums=tuple(range(len(at))), randomness="same")(*at)
    opened = way.open(f, at)
    return assembled(way.axis, opened, gathered(opened, chunk_size))
