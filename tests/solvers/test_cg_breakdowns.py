"""What conjugate gradients make of negative curvature and of numbers that are not finite."""

import math

import numpy as np
import pytest
import torch
from matrices import TIGHT, Counted, spd, vector
from torch import Tensor

from hvpopt.solvers import FirstOf, ResidualNorm, Status, cg


def test_rounding_in_the_residual_is_never_taken_for_negative_curvature():
    """A loose rule keeps going on a singular system that is solved; the floor ends it."""
    a = torch.diag(torch.tensor([1.0, 3.0, 0.0]))
    never = FirstOf(())
    solution = cg(Counted(a), [torch.tensor([1.0, 1.0, 0.0])], stop=never)
    assert solution.status is Status.CONVERGED
    np.testing.assert_allclose(solution.value[0], [1, 1 / 3, 0], atol=1e-6)


def test_negative_curvature_at_the_first_step_leaves_the_start():
    a = torch.diag(torch.tensor([-1.0, -2.0], dtype=torch.float64))
    b = vector(2)
    start = 0.1 * b
    for x0, expected in ((None, torch.zeros(2, dtype=torch.float64)), ([start], start)):
        solution = cg(Counted(a), [b], x0=x0)
        assert (solution.status, solution.num_steps) == (Status.NEGATIVE_CURVATURE, 0)
        assert torch.equal(solution.value[0], expected)
        assert -2 <= solution.min_curvature <= -1
        assert solution.direction is not None
        d = solution.direction[0]
        assert float(d @ a @ d) < 0


def test_negative_curvature_later_keeps_the_iterate_before_it():
    a = torch.diag(torch.tensor([3.0, 2.0, 1.0, -1e-2], dtype=torch.float64))
    b = torch.tensor([1.0, 1.0, 1.0, 0.1], dtype=torch.float64)
    solution = cg(Counted(a), [b], stop=TIGHT)
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert solution.num_steps > 0
    assert solution.num_products == solution.num_steps + 1
    same = cg(Counted(a), [b], stop=TIGHT, max_steps=solution.num_steps)
    assert torch.equal(solution.value[0], same.value[0])
    assert solution.residual_norm == same.residual_norm
    assert solution.model_values == same.model_values
    d = solution.direction[0]
    assert float(d @ a @ d) <= 0
    assert solution.min_curvature == pytest.approx(float(d @ a @ d / (d @ d)))


def test_zero_curvature_stops_the_solve():
    a = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    solution = cg(Counted(a), [torch.ones(2, dtype=torch.float64)], stop=TIGHT)
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert solution.value[0].tolist() == [2.0, 2.0]
    assert solution.direction[0].tolist() == [0.0, 2.0]


def test_zero_curvature_hidden_in_rounding_stops_the_solve():
    q = torch.linalg.qr(vector(9).reshape(3, 3)).Q
    a = (q * torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)) @ q.T
    solution = cg(Counted(a), [q.sum(1)], stop=TIGHT)
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert float(solution.value[0].norm()) < 10


def test_the_least_curvature_of_all_directions_is_reported():
    """On diag(1, 9) from b = (1, 1) the first direction's curvature is 5, the second's less."""
    diagonal = torch.tensor([1.0, 9.0], dtype=torch.float64)
    directions = []

    def matvec(v):
        directions.append(v[0].clone())
        return [diagonal * v[0]]

    b = torch.ones(2, dtype=torch.float64)
    solution = cg(matvec, [b], stop=ResidualNorm(rtol=1e-12))
    curvatures = [float(p @ (diagonal * p) / (p @ p)) for p in directions]
    assert solution.min_curvature == pytest.approx(min(curvatures))
    b = torch.tensor([3.0, 0.1], dtype=torch.float64)  # here it is the first's that is least
    directions.clear()
    solution = cg(matvec, [b], stop=ResidualNorm(rtol=1e-12))
    curvatures = [float(p @ (diagonal * p) / (p @ p)) for p in directions]
    assert curvatures[0] < curvatures[1]
    assert solution.min_curvature == pytest.approx(curvatures[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [1, 4])
def test_a_product_that_is_not_finite_leaves_the_last_finite_iterate(bad, at):
    a, b = spd(12), vector(12)
    operator = Counted(a)

    def failing(v: list[Tensor]) -> list[Tensor]:
        (product,) = operator(v)
        if operator.calls == at:
            product[3] = bad
        return [product]

    solution = cg(failing, [b], stop=TIGHT)
    assert (solution.status, solution.num_steps) == (Status.BREAKDOWN, at - 1)
    if at > 1:
        before = cg(Counted(a), [b], stop=TIGHT, max_steps=at - 1)
        assert torch.equal(solution.value[0], before.value[0])
        assert solution.residual_norm == before.residual_norm
    else:
        assert solution.value[0].tolist() == [0.0] * 12


def test_a_right_hand_side_that_is_not_finite_is_a_breakdown():
    operator = Counted(spd(2))
    solution = cg(operator, [torch.tensor([1.0, math.nan], dtype=torch.float64)])
    assert (solution.status, operator.calls) == (Status.BREAKDOWN, 0)
    assert solution.value[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("factor", [-1.0, math.nan, 0.0])
def test_a_preconditioner_that_is_not_positive_definite_is_named(factor):
    a, b = spd(5), vector(5)
    solution = cg(Counted(a), [b], preconditioner=lambda r: [factor * r[0]])
    assert (solution.status, solution.num_steps) == (Status.INDEFINITE_PRECONDITIONER, 0)
    assert "preconditioner" in solution.status.value


def test_a_preconditioner_that_fails_later_leaves_the_last_finite_iterate():
    a, b, calls = spd(5), vector(5), []

    def failing(r):
        calls.append(1)
        return [r[0] * (math.nan if len(calls) == 2 else 1.0)]

    solution = cg(Counted(a), [b], preconditioner=failing, stop=TIGHT)
    assert solution.status is Status.INDEFINITE_PRECONDITIONER
    one = cg(Counted(a), [b], stop=TIGHT, max_steps=1)
    assert torch.equal(solution.value[0], one.value[0])


def test_float32_products_of_large_scale_do_not_overflow_into_a_breakdown():
    a, b = 1e6 * spd(8).float(), 1e6 * vector(8).float()
    solution = cg(lambda v: [a @ v[0]], [b], stop=ResidualNorm(rtol=1e-4))
    assert solution.status is Status.CONVERGED
    np.testing.assert_allclose(solution.value[0], np.linalg.solve(a, b), rtol=0.02, atol=1e-4)
