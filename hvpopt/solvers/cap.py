"""What capped conjugate gradients know of the matrix from the scalars of their recurrence."""

import math
from dataclasses import dataclass


@dataclass
class Coefficients:
    """What the recurrence knows of each step k: αₖ, βₖ (that led to pₖ), ρₖ = rₖᵀzₖ, ‖pₖ‖²."""

    alpha: list[float]
    beta: list[float]
    rho: list[float]
    pp: list[float]

    def norm_seen(self, xx: float) -> float:
        """The largest of ‖Āv‖ / ‖v‖ over v = pⱼ, zⱼ and xⱼ₊₁ after step j."""
        alpha, beta, rho = self.alpha, self.beta, self.rho
        j = len(alpha) - 1
        of_p = math.sqrt((rho[j] + rho[j + 1]) / self.pp[j]) / alpha[j]
        earlier = beta[j] / alpha[j - 1] if j else 0.0
        off = math.sqrt(beta[j]) / alpha[j - 1] if j else 0.0
        of_z = math.hypot(1 / alpha[j] + earlier, off, math.sqrt(rho[j + 1] / rho[j]) / alpha[j])
        of_x = math.sqrt((rho[0] + rho[j + 1]) / xx) if xx > 0 else 0.0
        return max(of_p, of_z, of_x)

    def flat_from(self, epsilon: float) -> tuple[int, float] | None:
        """The last i whose d = x − xᵢ has dᵀĀd < ε dᵀMd, and the quotient; None if none has.

        With d = Σ αₖ pₖ over k ≥ i, conjugacy gives dᵀĀd = Σ αₖ ρₖ, and pₖᵀMpₗ = ρₗ ‖pₖ‖²/ρₖ for
        l ≥ k gives ‖d‖².
        """
        curved = length = 0.0
        for k in reversed(range(len(self.alpha))):
            a, rho, pp = self.alpha[k], self.rho[k], self.pp[k]
            length += a * a * pp + 2 * a * pp / rho * curved
            curved += a * rho
            if curved < epsilon * length:
                return k, curved / length
        return None


class Cap:
    """The bounds of the algorithm, which follow the largest ‖Āv‖/‖v‖ seen."""

    def __init__(self, epsilon: float, accuracy: float, norm: float) -> None:
        self._epsilon, self._accuracy, self._norm = epsilon, accuracy, norm

    def see(self, norm: float) -> None:
        """Raises the estimate of ‖Ā‖."""
        if math.isfinite(norm):
            self._norm = max(self._norm, norm)

    def is_solved(self, rho: list[float]) -> bool:
        """‖rⱼ‖ ≤ ζ ‖r₀‖ / (3κ), in the norm of M⁻¹."""
        tolerance = self._accuracy * self._epsilon / (3 * self._norm)
        return rho[-1] <= tolerance**2 * rho[0]

    def is_slow(self, rho: list[float]) -> bool:
        """‖rⱼ‖ > √T τ^(j/2) ‖r₀‖."""
        kappa = max(1.0, self._norm / self._epsilon)
        rest = 1 / (math.sqrt(kappa) + 1)  # 1 − τ; in logarithms, as κ⁴ may overflow
        log_tau = math.log1p(-rest)
        log_T = math.log(4) + 4 * math.log(kappa) - 2 * math.log(rest / (1 + math.sqrt(1 - rest)))
        slowest = log_T + (len(rho) - 1) * log_tau
        return rho[-1] > 0 and math.log(rho[-1]) - math.log(rho[0]) > slowest
