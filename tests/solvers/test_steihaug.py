"""Steps of truncated conjugate gradients against a textbook implementation."""

import math

import numpy as np
import pytest
import torch
from matrices import TIGHT, Counted, definite, indefinite, vector
from torch import Tensor
from trust_regions import exact, model, textbook

from hvpopt.solvers import KrylovTrustRegion, ResidualNorm, Status, steihaug


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
