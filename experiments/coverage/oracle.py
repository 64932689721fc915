"""The Hessian-vector product by differences of the gradient, sharing no engine's code."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Differences:
    """A product and how far to trust it, entry by entry."""

    value: Tensor
    """(n,), float64, all parameters joined."""
    error: Tensor
    """(n,), what two extrapolations from different steps disagree by."""

    def disagreement(self, product: Tensor) -> float:
        """The relative error of a product over the entries where this oracle is trustworthy.

        Where a kink of the gradient lies within the step, the extrapolations disagree, and the
        entry does not count. NaN where no entry counts.
        """
        size = max(float(self.value.abs().max()), 1e-3) if self.value.numel() else 1.0
        sure = self.error <= 1e-5 * size
        if not bool(sure.any()):
            return float("nan")
        wrong = (product.double() - self.value)[sure].norm()
        return float(wrong / max(float(self.value[sure].norm()), 1e-3))


def differences(
    gradient: Callable[[Sequence[Tensor]], Tensor], start: Sequence[Tensor], v: Sequence[Tensor]
) -> Differences:
    """H v by Richardson's extrapolation of central differences, with steps h, h/2, h/4.

        D(h) = (g(θ + h v) − g(θ − h v)) / 2h,      (4 D(h/2) − D(h)) / 3 = H v + O(h⁴)

    Where extrapolations disagree (a kink of the gradient within reach), smaller h are tried.

    Args:
        gradient: θ ↦ g(θ), all parameters joined, (n,), float64, the same function at each call.
        start: θ, in float64.
        v: The direction, in float64.

    Source: Richardson, The approximate arithmetical solution by finite differences (1911).
    """
    size = max([1.0, *(float(p.abs().max()) for p in start if p.numel())])

    def central(step: float) -> Tensor:
        ahead = gradient([p + step * x for p, x in zip(start, v, strict=True)])
        behind = gradient([p - step * x for p, x in zip(start, v, strict=True)])
        return (ahead - behind) / (2 * step)

    best: Differences | None = None
    for h in (1e-4 * size, 1e-5 * size, 1e-6 * size):
        coarse, middle, fine = (central(step) for step in (h, h / 2, h / 4))
        first, second = (4 * middle - coarse) / 3, (4 * fine - middle) / 3
        found = Differences(second, (second - first).abs())
        if best is None or float(found.error.sum()) < float(best.error.sum()):
            best = found
        if float(found.error.sum()) <= 1e-7 * max(1.0, float(found.value.abs().sum())):
            break
    assert best is not None
    return best
