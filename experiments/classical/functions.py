"""Classical test functions, with their starts and minima.

Sources: Moré, Garbow and Hillstrom, "Testing unconstrained optimization software" (ACM TOMS 7,
1981), whose numbers are given as MGH; Himmelblau, Applied Nonlinear Programming (1972).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TestFunction:
    """A smooth function of a vector, to be minimised from a start."""

    __test__ = False  # no test for pytest to collect

    name: str
    f: Callable[[Tensor], Tensor]
    """(n,) ↦ scalar, twice differentiable by torch."""
    start: tuple[float, ...]
    """The usual start."""
    minimum: float
    """The value of the global minimum."""
    minimizers: tuple[tuple[float, ...], ...] = ()
    """Where that is, as far as known in closed form or to some digits."""
    local_minima: tuple[float, ...] = ()
    """Values of further minima at which a descent method may end."""

    def x0(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The start as a tensor."""
        return torch.tensor(self.start, dtype=dtype)

    @property
    def n(self) -> int:
        """The number of variables."""
        return len(self.start)


def rosenbrock(n: int = 2) -> TestFunction:
    """Rosenbrock's chain, Σ 100 (xᵢ₊₁ − xᵢ²)² + (1 − xᵢ)² over i < n, from (−1.2, 1, −1.2, …)."""
    return TestFunction(
        name=f"Rosenbrock, n = {n}",
        f=_rosenbrock,
        start=tuple(1.0 if i % 2 else -1.2 for i in range(n)),
        minimum=0.0,
        minimizers=((1.0,) * n,),
    )


def _rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def extended_rosenbrock(n: int = 10) -> TestFunction:
    """MGH 21: n/2 independent copies of Rosenbrock's function of two variables."""

    def f(x: Tensor) -> Tensor:
        return (100 * (x[1::2] - x[::2] ** 2) ** 2 + (1 - x[::2]) ** 2).sum()

    return TestFunction(
        name=f"extended Rosenbrock, n = {n}",
        f=f,
        start=(-1.2, 1.0) * (n // 2),
        minimum=0.0,
        minimizers=((1.0,) * n,),
    )


def himmelblau() -> TestFunction:
    """Himmelblau's function: four minima of value 0, four saddles and a maximum."""

    def f(x: Tensor) -> Tensor:
        return (x[0] ** 2 + x[1] - 11) ** 2 + (x[0] + x[1] ** 2 - 7) ** 2

    minimizers = (
        (3.0, 2.0),
        (-2.805118, 3.131313),
        (-3.779310, -3.283186),
        (3.584428, -1.848127),
    )
    return TestFunction("Himmelblau", f, (0.0, 0.0), 0.0, minimizers)


def beale() -> TestFunction:
    """MGH 5."""
    return _squares(
        "Beale",
        lambda x: [
            y - x[0] * (1 - x[1] ** i) for i, y in zip((1, 2, 3), (1.5, 2.25, 2.625), strict=True)
        ],
        (1.0, 1.0),
        minimizers=((3.0, 0.5),),
    )


def powell_singular() -> TestFunction:
    """MGH 13: the Hessian at the minimum has rank 2 of 4."""
    return _squares(
        "Powell singular",
        lambda x: [
            x[0] + 10 * x[1],
            math.sqrt(5.0) * (x[2] - x[3]),
            (x[1] - 2 * x[2]) ** 2,
            math.sqrt(10.0) * (x[0] - x[3]) ** 2,
        ],
        (3.0, -1.0, 0.0, 1.0),
        minimizers=((0.0, 0.0, 0.0, 0.0),),
    )


def powell_badly_scaled() -> TestFunction:
    """MGH 3."""
    return _squares(
        "Powell badly scaled",
        lambda x: [1e4 * x[0] * x[1] - 1, torch.exp(-x[0]) + torch.exp(-x[1]) - 1.0001],
        (0.0, 1.0),
        minimizers=((1.098159e-5, 9.106147),),
    )


_MEYER = (
    34780.0, 28610.0, 23650.0, 19630.0, 16370.0, 13720.0, 11540.0, 9744.0,
    8261.0, 7030.0, 6005.0, 5147.0, 4427.0, 3820.0, 3307.0, 2872.0,
)  # fmt: skip


def meyer_scaled() -> TestFunction:
    """MGH 10 in the variables (e¹³ x₁ / 1000, x₂ / 1000, x₃ / 100), its value divided by 10⁶.

    Source: the data are MGH's; the scaling is Madsen, Nielsen and Tingleff's, "Methods for
    non-linear least squares problems" (2004).
    """

    def f(x: Tensor) -> Tensor:
        u = 0.45 + 0.05 * torch.arange(1, 17, dtype=x.dtype, device=x.device)
        y = torch.tensor(_MEYER, dtype=x.dtype, device=x.device)
        return ((x[0] * torch.exp(10 * x[1] / (u + x[2]) - 13) - 1e-3 * y) ** 2).sum()

    start = (2e-5 * math.exp(13), 4.0, 2.5)
    return TestFunction("Meyer, scaled", f, start, 87.9458551e-6)


def wood() -> TestFunction:
    """MGH 14; f ≈ 7.877 at a saddle near (−1, 1, −1, 1)."""
    return _squares(
        "Wood",
        lambda x: [
            10 * (x[1] - x[0] ** 2),
            1 - x[0],
            math.sqrt(90.0) * (x[3] - x[2] ** 2),
            1 - x[2],
            math.sqrt(10.0) * (x[1] + x[3] - 2),
            (x[1] - x[3]) / math.sqrt(10.0),
        ],
        (-3.0, -1.0, -3.0, -1.0),
        minimizers=((1.0, 1.0, 1.0, 1.0),),
    )


def brown_badly_scaled() -> TestFunction:
    """MGH 4."""
    return _squares(
        "Brown badly scaled",
        lambda x: [x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2],
        (1.0, 1.0),
        minimizers=((1e6, 2e-6),),
    )


def freudenstein_roth() -> TestFunction:
    """MGH 2, which has a local minimum of value 48.98."""
    return _squares(
        "Freudenstein-Roth",
        lambda x: [
            -13 + x[0] + ((5 - x[1]) * x[1] - 2) * x[1],
            -29 + x[0] + ((x[1] + 1) * x[1] - 14) * x[1],
        ],
        (0.5, -2.0),
        minimizers=((5.0, 4.0),),
        local_minima=(48.98425368,),
    )


def helical_valley() -> TestFunction:
    """MGH 7."""

    def residuals(x: Tensor) -> list[Tensor]:
        angle = torch.atan(x[1] / x[0]) / (2 * math.pi) + 0.5 * (x[0] < 0)
        return [10 * (x[2] - 10 * angle), 10 * (torch.hypot(x[0], x[1]) - 1), x[2]]

    return _squares("helical valley", residuals, (-1.0, 0.0, 0.0), minimizers=((1.0, 0.0, 0.0),))


def broyden_tridiagonal(n: int = 10) -> TestFunction:
    """MGH 30."""

    def f(x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x, (1, 1))
        return (((3 - 2 * x) * x - padded[:-2] - 2 * padded[2:] + 1) ** 2).sum()

    return TestFunction(f"Broyden tridiagonal, n = {n}", f, (-1.0,) * n, 0.0)


def saddle_quartic() -> TestFunction:
    """x² − y² + y⁴/4 from (1, 0), where the gradient leads to the saddle at 0."""

    def f(x: Tensor) -> Tensor:
        return x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4

    root = math.sqrt(2.0)
    return TestFunction("saddle quartic", f, (1.0, 0.0), -1.0, ((0.0, root), (0.0, -root)))


def monkey_saddle() -> TestFunction:
    """x³ − 3xy² + (x² + y²)² from 0, where gradient and Hessian vanish; minima at radius 3/4."""

    def f(x: Tensor) -> Tensor:
        return x[0] ** 3 - 3 * x[0] * x[1] ** 2 + (x[0] ** 2 + x[1] ** 2) ** 2

    high = 3 * math.sqrt(3.0) / 8
    minimizers = ((-0.75, 0.0), (0.375, high), (0.375, -high))
    return TestFunction("monkey saddle", f, (0.0, 0.0), -27 / 256, minimizers)


def _squares(
    name: str,
    residuals: Callable[[Tensor], Sequence[Tensor]],
    start: tuple[float, ...],
    *,
    minimizers: tuple[tuple[float, ...], ...],
    local_minima: tuple[float, ...] = (),
) -> TestFunction:
    """A sum of squares whose minimum is 0."""

    def f(x: Tensor) -> Tensor:
        return torch.stack(list(residuals(x))).square().sum()

    return TestFunction(name, f, start, 0.0, minimizers, local_minima)


def all_functions() -> tuple[TestFunction, ...]:
    """All of them, in the sizes of the usual comparisons."""
    return (
        *(rosenbrock(n) for n in (2, 10, 100, 1000)),
        extended_rosenbrock(10),
        himmelblau(),
        beale(),
        powell_singular(),
        powell_badly_scaled(),
        meyer_scaled(),
        wood(),
        brown_badly_scaled(),
        freudenstein_roth(),
        helical_valley(),
        broyden_tridiagonal(10),
        broyden_tridiagonal(100),
        saddle_quartic(),
        monkey_saddle(),
    )
