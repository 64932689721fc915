"""Capped conjugate gradients against dense eigenvalues and solutions."""

import math

import numpy as np
import pytest
import torch
from matrices import TIGHT, Counted, symmetric, vector
from torch import Tensor

from hvpopt.solvers import Status, capped_cg, cg
from hvpopt.solvers.cap import Cap


def quotient(a: Tensor, d: Tensor, metric: Tensor | None = None) -> float:
    return float(d @ a @ d) / float(d @ d if metric is None else d @ metric @ d)


@pytest.mark.parametrize("epsilon", [1e-3, 0.1])
def test_a_positive_definite_system_is_solved_with_its_damping(epsilon):
    a, b = symmetric(torch.logspace(-1, 2, 15)), vector(15)
    operator = Counted(a)
    solution = capped_cg(operator, [b], epsilon=epsilon, stop=TIGHT)
    damped = a + 2 * epsilon * torch.eye(15, dtype=torch.float64)
    assert solution.status is Status.CONVERGED
    np.testing.assert_allclose(solution.value[0], np.linalg.solve(damped, b), rtol=1e-7)
    assert operator.calls == solution.num_products == solution.num_steps
    x = solution.value[0]
    assert solution.model_value == pytest.approx(float(0.5 * x @ damped @ x - b @ x))
    assert solution.direction is None


def test_its_iterates_are_those_of_cg_on_the_damped_matrix():
    a, b = symmetric(torch.logspace(-1, 2, 15)), vector(15)
    damped = a + 0.2 * torch.eye(15, dtype=torch.float64)
    for steps in (1, 2, 5, 9):
        capped = capped_cg(Counted(a), [b], epsilon=0.1, stop=TIGHT, max_steps=steps)
        plain = cg(Counted(damped), [b], stop=TIGHT, max_steps=steps)
        assert capped.status is Status.STEP_LIMIT
        np.testing.assert_allclose(capped.value[0], plain.value[0], rtol=1e-9)
        assert capped.residual_norm == pytest.approx(plain.residual_norm)


def test_the_papers_accuracy_makes_the_residual_small_next_to_the_damping():
    """Lemma 1 of the paper: ‖r‖ ≤ ½ ε ζ ‖d‖ at a solution, and dᵀĀd ≥ ε ‖d‖²."""
    for seed in range(5):
        a, b = symmetric(torch.logspace(-2, 1, 20), seed), vector(20, seed)
        for epsilon, accuracy in ((0.1, 0.5), (0.01, 0.1)):
            solution = capped_cg(Counted(a), [b], epsilon=epsilon, accuracy=accuracy)
            assert solution.status is Status.CONVERGED
            d = solution.value[0]
            damped = a + 2 * epsilon * torch.eye(20, dtype=torch.float64)
            residual = float((b - damped @ d).norm())
            assert residual <= 0.5 * epsilon * accuracy * float(d.norm())
            assert quotient(damped, d) >= epsilon


@pytest.mark.parametrize("least", [-3.0, -0.5, -0.11])
def test_every_direction_has_curvature_below_minus_epsilon_and_descends(least):
    found = 0
    for seed in range(30):
        values = torch.cat((torch.tensor([least]), torch.logspace(-1, 1.5, 19)))
        a, b = symmetric(values, seed), vector(20, seed + 50)
        operator = Counted(a)
        solution = capped_cg(operator, [b], epsilon=0.1, stop=TIGHT)
        assert operator.calls == solution.num_products
        assert solution.num_products <= 20 + 20
        assert solution.status in (Status.NEGATIVE_CURVATURE, Status.CONVERGED)
        if solution.status is Status.CONVERGED:  # allowed: the paper promises no more
            assert least == -0.11
            continue
        found += 1
        d = solution.direction[0]
        assert quotient(a, d) <= -0.1 + 1e-12
        assert solution.min_curvature == pytest.approx(quotient(a, d), rel=1e-6)
        assert float(b @ d) > 0
    assert found >= (0 if least == -0.11 else 15)


def test_an_indefinite_matrix_is_noticed_at_the_first_product():
    a = torch.diag(torch.tensor([-1.0, -2.0], dtype=torch.float64))
    b = vector(2)
    solution = capped_cg(Counted(a), [b], epsilon=0.1)
    assert (solution.status, solution.num_steps) == (Status.NEGATIVE_CURVATURE, 0)
    assert torch.equal(solution.direction[0], b)
    assert solution.value[0].tolist() == [0.0, 0.0]
    assert solution.min_curvature == pytest.approx(quotient(a, b))


def test_curvature_above_minus_epsilon_is_not_followed():
    a, b = torch.diag(torch.tensor([-0.05, 1.0], dtype=torch.float64)), vector(2)
    solution = capped_cg(Counted(a), [b], epsilon=0.1, stop=TIGHT)
    assert solution.status is Status.CONVERGED
    expected = b / torch.tensor([0.15, 1.2], dtype=torch.float64)
    np.testing.assert_allclose(solution.value[0], expected, rtol=1e-9)


def test_slow_residuals_give_a_direction_between_two_iterates(monkeypatch):
    """With the cap at zero every step is too slow: each direction must hold what it promises."""
    monkeypatch.setattr(Cap, "is_slow", lambda self, rho: True)
    between = 0
    for seed in range(60):
        values = torch.cat((torch.tensor([-0.16, -0.12]), torch.logspace(-1, 1, 18)))
        a, b = symmetric(values, seed), vector(20, seed + 50)
        operator = Counted(a)
        solution = capped_cg(operator, [b], epsilon=0.1, stop=TIGHT)
        assert operator.calls == solution.num_products
        if solution.status is not Status.NEGATIVE_CURVATURE:
            continue
        d = solution.direction[0]
        assert quotient(a, d) <= -0.1 + 1e-12
        assert float(b @ d) > 0
        between += solution.num_products > solution.num_steps + 1
        assert solution.min_curvature <= quotient(a, d) + 1e-9
    assert between > 0


def test_the_bound_on_the_residuals_is_the_papers():
    cap = Cap(0.5, 0.5, 2.0)
    kappa = 4.0
    tau = 2.0 / 3.0
    bound = 4 * kappa**4 / (1 - math.sqrt(tau)) ** 2
    for j in (1, 3, 40):
        limit = bound * tau**j  # of squared norms
        assert cap.is_slow([1.0] * j + [limit * 1.001])
        assert not cap.is_slow([1.0] * j + [limit * 0.999])
    assert cap.is_solved([1.0, (0.5 / (3 * kappa)) ** 2 * 0.999])
    assert not cap.is_solved([1.0, (0.5 / (3 * kappa)) ** 2 * 1.001])


def test_a_preconditioner_is_a_change_of_variables():
    """In the variables Lᵀx with M = L Lᵀ, it is the plain algorithm."""
    metric = symmetric(torch.logspace(-1, 1, 15), seed=4)
    lower = torch.linalg.cholesky(metric)
    inverse = torch.linalg.inv(lower)
    for values in (torch.logspace(-1, 2, 15), torch.linspace(-2, 5, 15)):
        a, b = symmetric(values), vector(15)
        solution = capped_cg(
            Counted(a),
            [b],
            epsilon=0.05,
            preconditioner=lambda r: [torch.cholesky_solve(r[0][:, None], lower)[:, 0]],
            max_steps=8,
        )
        plain = capped_cg(
            Counted(inverse @ a @ inverse.T), [inverse @ b], epsilon=0.05, max_steps=8
        )
        assert (solution.status, solution.num_steps) == (plain.status, plain.num_steps)
        np.testing.assert_allclose(solution.value[0], inverse.T @ plain.value[0], rtol=1e-7)
        assert solution.min_curvature == pytest.approx(plain.min_curvature, rel=1e-6)
        if plain.direction is not None:
            d = solution.direction[0]
            np.testing.assert_allclose(d, inverse.T @ plain.direction[0], rtol=1e-6)
            assert quotient(a, d, metric) <= -0.05


def test_lists_and_float32_work():
    a, b = symmetric(torch.linspace(-2, 7, 12)).float(), vector(12).float()

    def split(x: Tensor) -> list[Tensor]:
        return [x[:6].reshape(2, 3), x[6], x[7:]]

    solution = capped_cg(
        lambda v: split(a @ torch.cat([x.reshape(-1) for x in v])), split(b), epsilon=0.1
    )
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert [x.shape for x in solution.direction] == [(2, 3), (), (5,)]
    assert all(x.dtype == torch.float32 for x in solution.direction)


def test_what_is_not_finite_is_a_breakdown_and_zero_is_solved_by_zero():
    operator = Counted(symmetric(torch.ones(3)))
    zero = capped_cg(operator, [torch.zeros(3)], epsilon=0.1)
    assert (zero.status, zero.num_products) == (Status.CONVERGED, 0)
    infinite = capped_cg(operator, [torch.full((3,), math.inf)], epsilon=0.1)
    assert (infinite.status, operator.calls) == (Status.BREAKDOWN, 0)
    broken = capped_cg(lambda v: [v[0] * math.nan], [vector(3)], epsilon=0.1)
    assert (broken.status, broken.num_steps) == (Status.BREAKDOWN, 0)
    assert broken.value[0].tolist() == [0, 0, 0]
    for factor in (-1.0, math.nan):
        bad = capped_cg(
            operator, [vector(3)], epsilon=0.1, preconditioner=lambda r, f=factor: [f * r[0]]
        )
        assert bad.status is Status.INDEFINITE_PRECONDITIONER


def test_bad_calls_are_answered_by_name():
    a, b = Counted(symmetric(torch.ones(3))), vector(3)
    with pytest.raises(ValueError, match="max_steps ≥ 1, got 0"):
        capped_cg(a, [b], epsilon=0.1, max_steps=0)
    for epsilon in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="positive finite epsilon"):
            capped_cg(a, [b], epsilon=epsilon)
    for accuracy in (0.0, 1.0):
        with pytest.raises(ValueError, match="0 < accuracy < 1"):
            capped_cg(a, [b], epsilon=0.1, accuracy=accuracy)
    with pytest.raises(ValueError, match="norm_bound ≥ 0, got -1"):
        capped_cg(a, [b], epsilon=0.1, norm_bound=-1.0)
    with pytest.raises(ValueError, match="right-hand side is an empty list"):
        capped_cg(a, [], epsilon=0.1)
    with pytest.raises(ValueError, match="result of matvec has the shapes"):
        capped_cg(lambda v: [v[0][:2]], [b], epsilon=0.1)


def test_squares_that_underflow_are_no_curvature():
    solution = capped_cg(lambda v: [1e4 * v[0]], [torch.full((3,), 1e-20)], epsilon=0.1)
    assert solution.status is Status.CONVERGED
