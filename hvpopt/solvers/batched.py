"""Krylov solvers for many small systems at once, each with its own scalars and its own end.

The systems Aᵢ xᵢ = bᵢ are the rows of a batch: dots, step lengths, convergence and failures are per
row, and rows that have finished leave the batch, so that one hard system neither stops nor slows
the others.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpopt.solvers.result import Status

BatchedOperator = Callable[[Tensor, Tensor | None], Tensor]
"""(v, rows) ↦ A v for the systems ``rows`` (k,), v (k, n); rows is None where v holds them all."""

STATUSES = tuple(Status)
"""What the codes of a batch of statuses mean: code i is ``STATUSES[i]``."""


@dataclass(frozen=True)
class BatchedSolution:
    """The approximate solutions of B systems with n unknowns each."""

    value: Tensor
    """(B, n), finite wherever b was."""
    residual_norms: Tensor
    """(B,), ‖bᵢ − Aᵢ xᵢ‖ as the recurrences carry them."""
    num_steps: Tensor
    """(B,), int64: steps that changed xᵢ."""
    status: Tensor
    """(B,), int64: codes of `STATUSES`."""
    num_products: int
    """Calls of the operator."""

    @property
    def statuses(self) -> list[Status]:
        """Why each system ended, in sentences."""
        return [STATUSES[code] for code in self.status.tolist()]

    def count(self, status: Status) -> int:
        """How many systems ended so."""
        return int((self.status == STATUSES.index(status)).sum())


def batched_cg(
    matvec: BatchedOperator, b: Tensor, *, max_steps: int = 100, rtol: float | Tensor = 1e-6
) -> BatchedSolution:
    """The solutions of Aᵢ xᵢ = bᵢ for symmetric positive definite Aᵢ by conjugate gradients.

    Row by row the algorithm of `hvpopt.solvers.cg`, from x = 0.

    Args:
        matvec: Products of the rows asked for; they must not depend on other rows.
        b: The right-hand sides, (B, n).
        max_steps: The most steps of a row.
        rtol: A row has converged where ‖r‖ ≤ max(rtol, ε) ‖b‖; one number, or one a row (B,).

    Returns:
        The solutions. A row that meets a direction with pᵀAp ≤ ε ‖p‖ ‖Ap‖ ends with the iterate
        so far and the status NEGATIVE_CURVATURE, one that meets NaN with BREAKDOWN. Nothing is
        recorded by autograd beyond what ``matvec`` records.

    Raises:
        ValueError: For a ``b`` that is not (B, n), ``max_steps`` < 1, a negative ``rtol``, or a
            product of another shape.
        TypeError: If ``b`` is not real floating point.

    Source: Hestenes and Stiefel (1952); Nocedal and Wright (2006), algorithm 5.3.

    Examples:
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> found = batched_cg(lambda v, rows: v @ A, torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
        >>> found.value, found.num_steps
        (tensor([[0.0909, 0.6364],
                [0.0000, 0.0000]]), tensor([2, 0]))
    """
    work = _Work("batched_cg", matvec, b, max_steps, rtol)
    r = work.b.clone()
    x, p, rr = torch.zeros_like(r), r, _dot(r, r)
    for step in range(1, max_steps + 1):
        x, r, p, rr = work.compacted(x, r, p, rr)
        if not len(rr):
            break
        Ap = work.product(p)
        pAp, pp = _dot(p, Ap), _dot(p, p)
        flat = pAp <= work.eps * (pp * _dot(Ap, Ap)).sqrt()
        alpha = (rr / pAp).unsqueeze(1)
        following = r - alpha * Ap
        rr_next = _dot(following, following)
        usable = ~flat & torch.isfinite(rr_next) & torch.isfinite(alpha[:, 0] ** 2 * pp)
        moved = usable.unsqueeze(1)
        x, r = torch.where(moved, x + alpha * p, x), torch.where(moved, following, r)
        work.ended(~usable & flat, Status.NEGATIVE_CURVATURE)
        work.ended(~usable & ~flat, Status.BREAKDOWN)
        beta = rr_next / rr
        rr = torch.where(usable, rr_next, rr)
        work.advance(x, rr.sqrt(), usable, step)
        p = torch.where(moved, r + beta.unsqueeze(1) * p, p)
    return work.solution()


def batched_minres(
    matvec: BatchedOperator, b: Tensor, *, max_steps: int = 100, rtol: float | Tensor = 1e-6
) -> BatchedSolution:
    """The solutions of Aᵢ xᵢ = bᵢ for symmetric Aᵢ, indefinite ones too, by MINRES.

    Each step minimises ‖b − A x‖ over one more dimension of the Krylov space. Where A is singular
    and b in its range, x is the solution of least norm.

    Args:
        matvec: As of `batched_cg`, whose arguments, result and errors are the same.
        b: The right-hand sides, (B, n).
        max_steps: The most steps of a row.
        rtol: A row has converged where ‖r‖ ≤ max(rtol, ε) ‖b‖; one number, or one a row (B,).

    Returns:
        The solutions. A singular system without a solution ends with the status SMALL_PROGRESS.

    Source: Paige and Saunders (SIAM J. Numer. Anal. 12, 1975); in the form of Elman, Silvester
    and Wathen, Finite Elements and Fast Iterative Solvers (2014), algorithm 4.1.

    Examples:
        >>> A = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
        >>> batched_minres(lambda v, rows: v @ A, torch.tensor([[3.0, 0.0]])).value
        tensor([[-1.0000,  2.0000]])
    """
    work = _Work("batched_minres", matvec, b, max_steps, rtol)
    v = work.b.clone()
    v_old, w_old, w, x = (torch.zeros_like(v) for _ in range(4))
    gamma = _dot(v, v).sqrt()
    eta = gamma
    c_old, c = torch.ones_like(gamma), torch.ones_like(gamma)
    s_old, s = torch.zeros_like(gamma), torch.zeros_like(gamma)
    for step in range(1, max_steps + 1):
        x, v, v_old, w, w_old, gamma, eta, c, c_old, s, s_old = work.compacted(
            x, v, v_old, w, w_old, gamma, eta, c, c_old, s, s_old
        )
        if not len(gamma):
            break
        v = v / gamma.unsqueeze(1)
        Av = work.product(v)
        delta = _dot(v, Av)
        v_next = Av - delta.unsqueeze(1) * v - gamma.unsqueeze(1) * v_old
        gamma_next = _dot(v_next, v_next).sqrt()
        a0 = c * delta - c_old * s * gamma
        a1 = torch.hypot(a0, gamma_next)
        a2, a3 = s * delta + c_old * c * gamma, s_old * gamma
        singular = a1 <= work.eps * (delta.abs() + gamma)
        usable = ~singular & torch.isfinite(a1)
        c_old, c, s_old, s = c, a0 / a1, s, gamma_next / a1
        w_next = (v - a3.unsqueeze(1) * w_old - a2.unsqueeze(1) * w) / a1.unsqueeze(1)
        x = torch.where(usable.unsqueeze(1), x + (c * eta).unsqueeze(1) * w_next, x)
        work.ended(singular, Status.SMALL_PROGRESS)
        work.ended(~usable & ~singular, Status.BREAKDOWN)
        eta = torch.where(usable, -s * eta, eta)
        work.advance(x, eta.abs(), usable, step)
        v, v_old, w, w_old, gamma = v_next, v, w_next, w, gamma_next
    return work.solution()


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """⟨xᵢ, yᵢ⟩ for each row, in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vecdot(x.to(wide), y.to(wide))


class _Work:
    """The rows at work, and the results of those that have ended."""

    def __init__(
        self, name: str, matvec: BatchedOperator, b: Tensor, max_steps: int, rtol: float | Tensor
    ) -> None:
        if b.dim() != 2:
            raise ValueError(
                f"The right-hand side of {name} has shape {tuple(b.shape)}; expected (B, n), one "
                "system a row."
            )
        if not b.is_floating_point():
            raise TypeError(f"The right-hand side of {name} is {b.dtype}; expected floating point.")
        if max_steps < 1:
            raise ValueError(f"{name} needs max_steps ≥ 1, got {max_steps}.")
        if not bool(torch.as_tensor(rtol >= 0).all()):
            raise ValueError(f"{name} needs rtol ≥ 0, got {rtol}.")
        self.b, self._matvec, self._name = b.detach(), matvec, name
        norms = _dot(self.b, self.b).sqrt()
        self.eps = torch.finfo(norms.dtype).eps
        self._tolerance = torch.as_tensor(rtol, device=b.device).clamp(min=self.eps) * norms
        self._rows: Tensor | None = None
        self._value = torch.zeros_like(self.b)
        self._residual_norms = norms.clone()
        self._num_steps = torch.zeros_like(norms, dtype=torch.int64)
        self._status = torch.full_like(self._num_steps, STATUSES.index(Status.STEP_LIMIT))
        self._num_products = 0
        self._is_done = norms == 0.0
        self.ended(self._is_done, Status.CONVERGED)
        self.ended(~torch.isfinite(norms), Status.BREAKDOWN)

    def product(self, v: Tensor) -> Tensor:
        """A v of the rows at work."""
        self._num_products += 1
        product = self._matvec(v, self._rows)
        if product.shape != v.shape:
            raise ValueError(
                f"The operator of {self._name} returned shape {tuple(product.shape)} for vectors "
                f"of shape {tuple(v.shape)}; expected the same."
            )
        return product.detach().to(v.dtype)

    def ended(self, mask: Tensor, status: Status) -> None:
        """Notes that the rows at work of a mask have ended."""
        if bool(mask.any()):
            self._status[self._all(mask)] = STATUSES.index(status)
            self._is_done = self._is_done | mask

    def advance(self, x: Tensor, residual_norms: Tensor, moved: Tensor, step: int) -> None:
        """Keeps the iterates of the rows at work, and ends those that have converged."""
        everyone = slice(None) if self._rows is None else self._rows
        self._value[everyone] = x.to(self._value.dtype)
        self._residual_norms[everyone] = residual_norms
        self._num_steps[self._all(moved)] = step
        self.ended(moved & (residual_norms <= self._tolerance), Status.CONVERGED)

    def compacted(self, *tensors: Tensor) -> list[Tensor]:
        """The rows of the tensors that still have work to do."""
        if not bool(self._is_done.any()):
            return list(tensors)
        kept = (~self._is_done).nonzero()[:, 0]
        self._rows = kept if self._rows is None else self._rows[kept]
        self._tolerance, self._is_done = self._tolerance[kept], self._is_done[kept]
        return [t[kept] for t in tensors]

    def _all(self, mask: Tensor) -> Tensor:
        """The rows of a mask, numbered among all."""
        return mask.nonzero()[:, 0] if self._rows is None else self._rows[mask]

    def solution(self) -> BatchedSolution:
        """What has been found."""
        return BatchedSolution(
            self._value, self._residual_norms, self._num_steps, self._status, self._num_products
        )
