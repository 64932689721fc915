"""The step that conjugate-gradient methods share, and the norms that they carry along."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hvpopt import trees
from hvpopt.solvers.result import Status
from hvpopt.trees import TensorList


class Taken(NamedTuple):
    """What the host learns about one step, in a single transfer."""

    refusal: Status | None
    curvature: float
    residual_norm: float
    model: float
    alpha: float
    is_cut: bool
    is_curved: bool


def take_step(
    apply: Callable[[TensorList], TensorList],
    b: TensorList,
    x: TensorList,
    r: TensorList,
    p: TensorList,
    rz: Tensor,
    rounding: float,
    *,
    reach: Tensor | None = None,
    floor: Tensor | None = None,
) -> Taken:
    """Moves x and r along p in place, unless the step is refused: then x stays as it is.

    With α = rᵀz / pᵀAp: x ← x + α p, r ← r − α A p. The device decides for itself (a refused
    step is a step of length zero), so that the host waits for it only once.

    Args:
        apply: v ↦ A v.
        b: The right-hand side.
        x: The iterate, changed in place.
        r: Its residual b − A x, changed in place, also by a step that is refused.
        p: The direction.
        rz: rᵀz, with z the preconditioned residual.
        rounding: The machine's ε: a curvature pᵀAp ≤ ε ‖p‖ ‖Ap‖ counts as none.
        reach: The longest step there is. One that would be longer, or has no curvature to end
            it, is cut to this length instead of refused.
        floor: A curvature pᵀAp at or below it counts as none, too.
    """
    Ap = apply(p)
    pAp, pp = trees.dot(p, Ap), trees.dot(p, p)
    least = rounding * pp.sqrt() * trees.dot(Ap, Ap).sqrt()
    if floor is not None:
        least = torch.maximum(least, floor)
    alpha, is_curved = rz / pAp, pAp > least
    is_cut = torch.zeros_like(is_curved)
    if reach is not None:
        is_cut = (pAp <= least) | (alpha >= reach)
        alpha = torch.where(is_cut, reach, alpha)
    add_times_(r, -alpha, Ap)
    rr = trees.dot(r, r)
    usable = (rz > 0) & (is_curved | is_cut) & torch.isfinite(alpha * pp) & torch.isfinite(rr)
    for xi, moved in zip(x, times(alpha, p), strict=True):  # 0 · NaN would be NaN
        xi.add_(torch.where(usable.to(xi.device), moved, torch.zeros_like(moved)))
    rz_, pAp_, pp_, least_, usable_, rr_, model, alpha_, is_cut_ = numbers(
        rz, pAp, pp, least, usable, rr, model_at(x, r, b), alpha, is_cut
    )
    has_no_curvature = math.isfinite(least_) and pAp_ <= least_
    refusal = None
    if not 0 < rz_ < math.inf:
        refusal = Status.INDEFINITE_PRECONDITIONER
    elif has_no_curvature and reach is None:
        refusal = Status.NEGATIVE_CURVATURE
    elif not usable_:
        refusal = Status.BREAKDOWN
    curvature = pAp_ / pp_ if pp_ > 0 else math.nan
    residual_norm = math.sqrt(rr_) if usable_ else math.nan
    return Taken(
        refusal, curvature, residual_norm, model, alpha_, bool(is_cut_), not has_no_curvature
    )


class CarriedNorms:
    """‖x‖²_M, xᵀMp and ‖p‖²_M of conjugate gradients from x₀ = 0, without products with M.

    With z = M⁻¹r, p ← z + β p, and r orthogonal to the earlier directions, pᵀMz = 0:

        ‖x + α p‖² = ‖x‖² + 2 α xᵀMp + α² ‖p‖²,
        xᵀM p₊ = β (xᵀMp + α ‖p‖²),     ‖p₊‖² = rᵀz + β² ‖p‖².

    Source: Conn, Gould and Toint, Trust-Region Methods (2000), section 7.5.1.
    """

    def __init__(self, rz: Tensor) -> None:
        self.xx, self.xp, self.pp = torch.zeros_like(rz), torch.zeros_like(rz), rz

    def reach(self, radius: float) -> Tensor:
        """The τ ≥ 0 with ‖x + τ p‖_M = radius."""
        left = (radius**2 - self.xx).clamp(min=0.0)
        return left / (self.xp + (self.xp**2 + self.pp * left).sqrt())

    def advance(self, alpha: float) -> None:
        """To x + α p."""
        self.xx = self.xx + 2 * alpha * self.xp + alpha**2 * self.pp
        self.xp = self.xp + alpha * self.pp

    def turn(self, beta: Tensor, rz: Tensor) -> None:
        """To the direction z + β p."""
        self.xp = beta * self.xp
        self.pp = rz + beta**2 * self.pp


def model_at(x: TensorList, r: TensorList, b: TensorList) -> Tensor:
    """½ xᵀAx − bᵀx = −½ xᵀ(r + b), where A x = b − r."""
    return -0.5 * (trees.dot(x, r) + trees.dot(x, b))


def numbers(*scalars: Tensor) -> list[float]:
    """The scalars on the host, after one wait for the device."""
    on_host: list[float] = torch.stack([s.to(scalars[0].dtype) for s in scalars]).tolist()
    return on_host


def times(factor: Tensor, xs: TensorList) -> TensorList:
    """``factor * xs`` in the dtypes of xs, for a scalar tensor, which need not reach the host."""
    if all(x.device == factor.device and x.dtype == factor.dtype for x in xs):
        return list(torch._foreach_mul(xs, factor))
    return [(x * factor.to(x.device)).to(x.dtype) for x in xs]


def add_times_(ys: TensorList, factor: Tensor, xs: TensorList) -> None:
    """Adds ``factor * xs`` to ``ys`` in place."""
    trees.add_(ys, times(factor, xs))
