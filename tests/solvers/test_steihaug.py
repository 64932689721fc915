"""Trust-region subproblems against dense solutions and a textbook implementation."""

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from hvpopt.solvers import KrylovTrustRegion, ResidualNorm, Status, steihaug

TIGHT = ResidualNorm(rtol=1e-12)


def symmetric(values: Tensor, seed: int = 0) -> Tensor:
    n = len(values)
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return (q * values.double()) @ q.T


def vector(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def indefinite(n: int = 12, seed: int = 0) -> Tensor:
    return symmetric(torch.linspace(-2, 7, n), seed)


def definite(n: int = 12, seed: int = 0) -> Tensor:
    return symmetric(torch.logspace(-1, 2, n), seed)


class Counted:
    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.calls = matrix, 0

    def __call__(self, v: list[Tensor]) -> list[Tensor]:
        self.calls += 1
        return [self.matrix @ v[0]]


def model(a: Tensor, b: Tensor, x: Tensor) -> float:
    return float(0.5 * x @ a @ x - b @ x)


def textbook(a: np.ndarray, b: np.ndarray, radius: float, m: np.ndarray, rtol: float) -> np.ndarray:
    """Nocedal and Wright's algorithm 7.2, with all norms of the dense M computed afresh."""
    z, r = np.zeros_like(b), -b
    y = np.linalg.solve(m, r)
    d = -y
    for _ in range(10 * len(b)):
        curvature = d @ a @ d
        alpha = (r @ y) / curvature if curvature != 0 else math.inf
        if curvature <= 0 or np.sqrt((z + alpha * d) @ m @ (z + alpha * d)) >= radius:
            qa, qb, qc = d @ m @ d, 2 * z @ m @ d, z @ m @ z - radius**2
            return z + (-qb + np.sqrt(qb**2 - 4 * qa * qc)) / (2 * qa) * d
        z = z + alpha * d
        new = r + alpha * a @ d
        if np.linalg.norm(new) <= rtol * np.linalg.norm(b):
            return z
        y_new = np.linalg.solve(m, new)
        d = -y_new + (new @ y_new) / (r @ y) * d
        r, y = new, y_new
    raise AssertionError


def exact(a: Tensor, b: Tensor, radius: float) -> Tensor:
    """The subproblem's solution by a root of the secular equation, outside the hard case."""
    values, vectors = np.linalg.eigh(a.numpy())
    c = vectors.T @ b.numpy()

    def length(shift: float) -> float:
        return float(np.linalg.norm(c / (values + shift)))

    if values[0] > 0 and length(0.0) <= radius:
        return torch.from_numpy(vectors @ (c / values))
    low = max(0.0, -values[0]) + 1e-13
    shift = scipy.optimize.brentq(lambda s: 1 / length(s) - 1 / radius, low, 1e8, xtol=1e-15)
    return torch.from_numpy(vectors @ (c / (values + shift)))


@pytest.mark.parametrize("matrix", [definite, indefinite])
@pytest.mark.parametrize("radius", [1e-3, 0.1, 1.0, 3.0, 1e3])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_step_is_that_of_the_textbook(matrix, radius, scaled):
    a, b = matrix(), vector(12)
    d = torch.logspace(-0.3, 0.3, 12, dtype=torch.float64)
    scaling = [d] if scaled else None
    metric = np.diag((d**2).numpy()) if scaled else np.eye(12)
    step = steihaug(Counted(a), [b], radius, scaling=scaling, stop=ResidualNorm(rtol=1e-6))
    expected = textbook(a.numpy(), b.numpy(), radius, metric, rtol=1e-6)
    np.testing.assert_allclose(step.value[0], expected, rtol=2e-5, atol=1e-9)
    assert step.norm == pytest.approx(math.sqrt(expected @ metric @ expected), rel=1e-6)
    assert step.is_on_boundary == (step.status in (Status.BOUNDARY, Status.NEGATIVE_CURVATURE))
    assert step.predicted_decrease == pytest.approx(-model(a, b, step.value[0]))
    assert all(np.diff(step.model_values) < 0)


def test_a_preconditioner_gives_the_norm_of_its_inverse():
    a, b = indefinite(), vector(12)
    metric = definite(seed=3)
    step = steihaug(
        Counted(a), [b], 2.0, preconditioner=lambda r: [torch.linalg.solve(metric, r[0])]
    )
    expected = textbook(a.numpy(), b.numpy(), 2.0, metric.numpy(), rtol=1e-9)
    np.testing.assert_allclose(step.value[0], expected, rtol=1e-7)
    x = step.value[0]
    assert float(x @ metric @ x) == pytest.approx(4.0)


def test_a_wide_region_gives_the_solution_of_the_linear_system():
    a, b = definite(), vector(12)
    step = steihaug(Counted(a), [b], 1e6, stop=TIGHT)
    assert step.status is Status.CONVERGED
    np.testing.assert_allclose(step.value[0], np.linalg.solve(a, b), rtol=1e-8)
    assert step.norm == pytest.approx(float(step.value[0].norm()))


def test_the_model_falls_at_least_as_far_as_at_the_cauchy_point():
    for seed in range(20):
        a, b = indefinite(seed=seed), vector(12, seed=seed + 100)
        for radius in (0.01, 1.0, 30.0):
            gap = float(b @ a @ b)
            best = radius / float(b.norm())
            if gap > 0:
                best = min(best, float(b @ b) / gap)
            step = steihaug(Counted(a), [b], radius)
            assert step.predicted_decrease >= -model(a, b, best * b) * (1 - 1e-12)


def test_negative_curvature_is_followed_to_the_boundary_and_reported():
    a = torch.diag(torch.tensor([-1.0, -2.0], dtype=torch.float64))
    b = torch.tensor([3.0, 4.0], dtype=torch.float64)
    step = steihaug(Counted(a), [b], 10.0)
    assert (step.status, step.num_products) == (Status.NEGATIVE_CURVATURE, 1)
    assert step.value[0].tolist() == pytest.approx([6.0, 8.0])
    assert step.min_curvature == pytest.approx(float(b @ a @ b / (b @ b)))
    assert torch.equal(step.direction[0], b)


def test_a_zero_matrix_takes_the_gradient_to_the_boundary():
    b = vector(3)
    step = steihaug(lambda v: [torch.zeros_like(v[0])], [b], 2.0)
    np.testing.assert_allclose(step.value[0], 2 * b / b.norm())


def test_float32_steps_keep_to_the_radius():
    a, b = indefinite().float(), vector(12).float()
    step = steihaug(Counted(a), [b], 1.5)
    assert step.value[0].dtype == torch.float32
    assert float(step.value[0].norm()) == pytest.approx(1.5, rel=1e-5)


def test_several_tensors_are_one_vector():
    a, b = indefinite(), vector(12)

    def split(x: Tensor) -> list[Tensor]:
        return [x[:6].reshape(2, 3), x[6], x[7:]]

    def matvec(v: list[Tensor]) -> list[Tensor]:
        return split(a @ torch.cat([x.reshape(-1) for x in v]))

    whole = steihaug(Counted(a), [b], 1.0)
    parts = steihaug(matvec, split(b), 1.0)
    np.testing.assert_allclose(torch.cat([x.reshape(-1) for x in parts.value]), whole.value[0])
    krylov = KrylovTrustRegion(matvec, split(b)).step(1.0, rtol=1e-10)
    flat = torch.cat([x.reshape(-1) for x in krylov.value])
    np.testing.assert_allclose(flat, exact(a, b, 1.0), rtol=1e-7)


@pytest.mark.parametrize("solver", ["steihaug", "krylov"])
def test_what_is_not_finite_is_a_breakdown(solver):
    b = vector(3)

    def solve(matvec, b):
        if solver == "steihaug":
            return steihaug(matvec, b, 1.0)
        return KrylovTrustRegion(matvec, b).step(1.0)

    broken = solve(lambda v: [v[0] * math.nan], [b])
    assert (broken.status, broken.num_steps) == (Status.BREAKDOWN, 0)
    assert broken.value[0].tolist() == [0, 0, 0]
    broken = solve(Counted(definite(3)), [b * math.inf])
    assert (broken.status, broken.num_products) == (Status.BREAKDOWN, 0)
    nothing = solve(Counted(definite(3)), [0 * b])
    assert (nothing.status, nothing.num_products) == (Status.CONVERGED, 0)
    assert nothing.value[0].tolist() == [0, 0, 0]
    assert (nothing.norm, nothing.is_on_boundary) == (0.0, False)


def test_a_product_that_breaks_down_later_leaves_what_there_is():
    operator = Counted(definite())

    def failing(v: list[Tensor]) -> list[Tensor]:
        (product,) = operator(v)
        return [product * (math.nan if operator.calls == 4 else 1)]

    step = steihaug(failing, [vector(12)], 1e3, stop=TIGHT)
    assert (step.status, step.num_steps) == (Status.BREAKDOWN, 3)
    operator.calls = 0
    step = KrylovTrustRegion(failing, [vector(12)]).step(1e3, rtol=1e-12)
    assert (step.status, step.num_steps) == (Status.BREAKDOWN, 3)
    assert model(operator.matrix, vector(12), step.value[0]) < 0


def test_the_step_limit_is_kept_to():
    step = steihaug(Counted(definite()), [vector(12)], 1e3, stop=TIGHT, max_steps=3)
    assert (step.status, step.num_products) == (Status.STEP_LIMIT, 3)
    step = KrylovTrustRegion(Counted(definite()), [vector(12)], max_steps=3).step(1e3, rtol=1e-9)
    assert (step.status, step.num_products) == (Status.STEP_LIMIT, 3)


def test_bad_calls_of_steihaug_are_answered_by_name():
    a, b = Counted(definite(3)), vector(3)
    with pytest.raises(ValueError, match="max_steps ≥ 1, got 0"):
        steihaug(a, [b], 1.0, max_steps=0)
    for radius in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="positive finite radius"):
            steihaug(a, [b], radius)
    with pytest.raises(ValueError, match="both given"):
        steihaug(a, [b], 1.0, scaling=[b.abs()], preconditioner=lambda r: r)
    with pytest.raises(ValueError, match="scaling must be positive and finite, but entry 0"):
        steihaug(a, [b], 1.0, scaling=[torch.zeros(3)])
    with pytest.raises(ValueError, match="scaling has the shapes"):
        steihaug(a, [b], 1.0, scaling=[torch.ones(2)])
    with pytest.raises(ValueError, match="right-hand side is an empty list"):
        steihaug(a, [], 1.0)
    broken = steihaug(a, [b], 1.0, preconditioner=lambda r: [-r[0]])
    assert broken.status is Status.INDEFINITE_PRECONDITIONER


@pytest.mark.parametrize("matrix", [definite, indefinite])
@pytest.mark.parametrize("radius", [1e-3, 0.1, 1.0, 3.0, 1e3])
@pytest.mark.parametrize("n", [1, 2, 3, 12])
def test_the_krylov_step_is_the_exact_minimiser(matrix, radius, n):
    a, b = matrix(n), vector(n)
    step = KrylovTrustRegion(Counted(a), [b]).step(radius, rtol=1e-11)
    expected = exact(a, b, radius)
    assert model(a, b, step.value[0]) == pytest.approx(model(a, b, expected), rel=1e-8)
    assert step.predicted_decrease == pytest.approx(-model(a, b, step.value[0]), rel=1e-8)
    assert step.norm == pytest.approx(float(step.value[0].norm()), rel=1e-9)
    assert step.norm <= radius * (1 + 1e-9)
    if radius < 1e3 or matrix is definite:
        np.testing.assert_allclose(step.value[0], expected, rtol=1e-5, atol=1e-9)


def test_it_is_never_worse_than_steihaug_and_often_better():
    gains = []
    for seed in range(10):
        a, b = indefinite(seed=seed), vector(12, seed=seed)
        truncated = steihaug(Counted(a), [b], 2.0)
        krylov = KrylovTrustRegion(Counted(a), [b]).step(2.0, rtol=1e-8)
        gains.append(krylov.predicted_decrease / truncated.predicted_decrease)
    assert min(gains) >= 1 - 1e-9
    assert max(gains) > 1.1


def test_a_smaller_radius_costs_no_product_and_a_larger_one_only_what_is_missing():
    a, b = indefinite(), vector(12)
    operator = Counted(a)
    region = KrylovTrustRegion(operator, [b])
    region.step(1.0, rtol=1e-6)
    products = operator.calls
    step = region.step(0.3, rtol=1e-6)
    assert operator.calls == products == region.num_products == step.num_products
    assert model(a, b, step.value[0]) == pytest.approx(model(a, b, exact(a, b, 0.3)), rel=1e-6)
    region.step(100.0, rtol=1e-6)
    assert products <= operator.calls <= 12


def test_the_nearly_hard_case_goes_to_the_boundary():
    """b has hardly anything along the negative eigenvector, which the solution is made of."""
    a = torch.diag(torch.tensor([-1.0, 1.0, 2.0], dtype=torch.float64))
    b = torch.tensor([1e-9, 1.0, 1.0], dtype=torch.float64)
    step = KrylovTrustRegion(Counted(a), [b]).step(5.0, rtol=1e-10)
    expected = torch.tensor([0.0, 1 / 2, 1 / 3], dtype=torch.float64)
    expected[0] = math.sqrt(25 - float(expected @ expected))
    assert model(a, b, step.value[0]) == pytest.approx(model(a, b, expected), rel=1e-6)
    assert step.status is Status.NEGATIVE_CURVATURE
    low, high = KrylovTrustRegion(Counted(a), [b]).eigenvalue_bounds
    assert math.isnan(low)
    assert math.isnan(high)


def test_a_scaled_region_is_the_plain_one_in_scaled_variables():
    a, b = indefinite(), vector(12)
    d = torch.logspace(-1, 1, 12, dtype=torch.float64)
    step = KrylovTrustRegion(Counted(a), [b], scaling=[d]).step(1.0, rtol=1e-11)
    scaled = exact(a / d[:, None] / d[None, :], b / d, 1.0)
    np.testing.assert_allclose(step.value[0], scaled / d, rtol=1e-6)
    assert step.norm == pytest.approx(float((d * step.value[0]).norm()))


def test_an_infinite_radius_gives_newtons_step_or_an_error():
    a, b = definite(), vector(12)
    step = KrylovTrustRegion(Counted(a), [b]).step(math.inf, rtol=1e-12)
    np.testing.assert_allclose(step.value[0], np.linalg.solve(a, b), rtol=1e-8)
    assert not step.is_on_boundary
    with pytest.raises(ValueError, match="unbounded below: give a finite radius"):
        KrylovTrustRegion(Counted(indefinite()), [b]).step(math.inf)


def test_the_fewest_steps_are_taken_unless_the_space_is_exhausted():
    operator = Counted(torch.eye(5, dtype=torch.float64))
    assert KrylovTrustRegion(operator, [vector(5)]).step(1e3, min_steps=2).num_products == 1
    a = symmetric(torch.linspace(1, 2, 12))
    assert KrylovTrustRegion(Counted(a), [vector(12)]).step(1e3, rtol=0.9).num_steps == 1
    step = KrylovTrustRegion(Counted(a), [vector(12)]).step(1e3, rtol=0.9, min_steps=2)
    assert step.num_steps == 2


def test_bad_calls_of_the_krylov_region_are_answered_by_name():
    a, b = Counted(definite(3)), vector(3)
    with pytest.raises(ValueError, match="max_steps ≥ 1, got 0"):
        KrylovTrustRegion(a, [b], max_steps=0)
    with pytest.raises(ValueError, match="scaling must be positive"):
        KrylovTrustRegion(a, [b], scaling=[-b.abs()])
    with pytest.raises(TypeError, match="real floating-point tensors"):
        KrylovTrustRegion(a, [torch.ones(3, dtype=torch.int64)])
    region = KrylovTrustRegion(a, [b])
    with pytest.raises(ValueError, match="positive radius, got 0"):
        region.step(0.0)
    with pytest.raises(ValueError, match="rtol must be positive, got 0"):
        region.step(1.0, rtol=0.0)
