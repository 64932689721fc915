"""Conjugate gradients against closed forms, dense solves and SciPy."""

import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from hvpopt.solvers import (
    FirstOf,
    Progress,
    RelativeProgress,
    ResidualNorm,
    Status,
    Worthwhile,
    cg,
)

TIGHT = ResidualNorm(rtol=1e-12)


def spd(n: int, condition: float = 100.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, math.log10(condition), n, dtype=torch.float64)
    return (q * values) @ q.T


def vector(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Counted:
    """A dense matrix as an operator that counts its products."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.calls = matrix, 0

    def __call__(self, v: list[Tensor]) -> list[Tensor]:
        self.calls += 1
        return [self.matrix @ v[0]]


@pytest.mark.parametrize("n", [1, 2, 3, 12])
def test_it_is_exact_after_n_steps(n):
    a, b = spd(n, condition=10.0), vector(n)
    solution = cg(Counted(a), [b], stop=TIGHT, max_steps=n)
    assert solution.num_steps <= n
    np.testing.assert_allclose(solution.value[0], np.linalg.solve(a, b), rtol=1e-9)


def test_a_matrix_with_three_eigenvalues_takes_three_steps():
    a = torch.diag(torch.tensor([1.0, 1.0, 5.0, 5.0, 9.0, 9.0], dtype=torch.float64))
    solution = cg(Counted(a), [vector(6)], stop=TIGHT)
    assert (solution.num_steps, solution.status) == (3, Status.CONVERGED)


def test_each_iterate_is_scipys():
    a, b = spd(20), vector(20)
    expected: list[np.ndarray] = []
    scipy.sparse.linalg.cg(
        a.numpy(), b.numpy(), rtol=1e-14, maxiter=8, callback=lambda x: expected.append(x.copy())
    )
    for step in range(1, 9):
        solution = cg(Counted(a), [b], stop=TIGHT, max_steps=step)
        np.testing.assert_allclose(solution.value[0], expected[step - 1], rtol=1e-9)


def test_each_preconditioned_iterate_is_scipys():
    a, b = spd(20), vector(20)
    diagonal = a.diagonal()
    expected: list[np.ndarray] = []
    scipy.sparse.linalg.cg(
        a.numpy(),
        b.numpy(),
        M=np.diag(1 / diagonal.numpy()),
        rtol=1e-14,
        maxiter=6,
        callback=lambda x: expected.append(x.copy()),
    )
    for step in range(1, 7):
        solution = cg(
            Counted(a),
            [b],
            preconditioner=lambda r: [r[0] / diagonal],
            stop=TIGHT,
            max_steps=step,
        )
        np.testing.assert_allclose(solution.value[0], expected[step - 1], rtol=1e-9)


def test_the_identity_as_preconditioner_changes_nothing():
    a, b = spd(10), vector(10)
    plain = cg(Counted(a), [b], max_steps=4)
    preconditioned = cg(Counted(a), [b], preconditioner=lambda r: r, max_steps=4)
    assert torch.equal(plain.value[0], preconditioned.value[0])


def test_the_exact_inverse_as_preconditioner_takes_one_step():
    a, b = spd(10), vector(10)
    solution = cg(
        Counted(a), [b], preconditioner=lambda r: [torch.linalg.solve(a, r[0])], stop=TIGHT
    )
    assert solution.num_steps == 1


def test_one_product_a_step_and_one_for_a_start():
    a, b = spd(10), vector(10)
    for x0, extra in ((None, 0), ([1e-3 * b], 1), ([-b], 1)):
        operator = Counted(a)
        solution = cg(operator, [b], x0=x0, stop=TIGHT, max_steps=7)
        assert operator.calls == solution.num_products == solution.num_steps + extra == 7 + extra


def test_the_model_values_are_those_of_the_quadratic():
    a, b = spd(15), vector(15)
    start = 0.5 * torch.linalg.solve(a, b) + 0.01 * vector(15, seed=3)

    def model(x: Tensor) -> float:
        return float(0.5 * x @ a @ x - b @ x)

    for x0, initial in ((None, 0.0), ([start], model(start))):
        solution = cg(Counted(a), [b], x0=x0, max_steps=10, keep_iterates=True)
        assert solution.model_values[0] == pytest.approx(initial)
        assert len(solution.model_values) == solution.num_steps + 1
        assert solution.model_value == pytest.approx(model(solution.value[0]))
        for kept in solution.iterates:
            assert kept.model_value == solution.model_values[kept.num_steps]
            assert kept.model_value == pytest.approx(model(kept.value[0]))
        assert all(np.diff(solution.model_values) < 0)


def test_the_residual_norm_is_that_of_the_solution():
    a, b = spd(15), vector(15)
    solution = cg(Counted(a), [b], max_steps=6)
    assert solution.residual_norm == pytest.approx(float((b - a @ solution.value[0]).norm()))


def test_iterates_are_kept_at_martens_steps_and_at_the_last():
    a, b = spd(60, condition=1e6), vector(60)
    solution = cg(Counted(a), [b], stop=TIGHT, max_steps=23, keep_iterates=True)
    assert [kept.num_steps for kept in solution.iterates] == [5, 7, 9, 11, 15, 19, 23]
    for kept in solution.iterates:
        same = cg(Counted(a), [b], stop=TIGHT, max_steps=kept.num_steps)
        assert torch.equal(kept.value[0], same.value[0])
    assert cg(Counted(a), [b], max_steps=3).iterates == ()


def test_martens_rule_keeps_the_factor_k():
    """With k = 10 and m ≈ −1, a gain of 4e-3 over ten steps is below 5e-4 · 10 = 5e-3."""
    rule = RelativeProgress()
    values = [-1.0 + 0.004 * (12 - i) / 10 for i in range(13)]
    assert rule(Progress(12, 1.0, 1.0, values)) is Status.SMALL_PROGRESS
    values = [-1.0 + 0.006 * (12 - i) / 10 for i in range(13)]
    assert rule(Progress(12, 1.0, 1.0, values)) is None


def test_martens_rule_waits_for_more_than_k_steps_and_a_negative_model():
    rule = RelativeProgress()
    assert rule(Progress(10, 1.0, 1.0, [-1.0] * 11)) is None
    assert rule(Progress(11, 1.0, 1.0, [-1.0] * 12)) is Status.SMALL_PROGRESS
    assert rule(Progress(11, 1.0, 1.0, [1.0] * 12)) is None


def test_martens_window_grows_with_the_steps():
    """After 200 steps k = 20: the gain since step 180 counts, not the one since step 190."""
    values = [-1.0] * 201
    values[180] = -1.0 + 0.02  # 0.02 ≥ 5e-4 · 20
    assert RelativeProgress()(Progress(200, 1.0, 1.0, values)) is None
    assert RelativeProgress(fraction=0.05)(Progress(200, 1.0, 1.0, values)) is not None


def test_the_default_rule_stops_where_martens_does():
    a, b = spd(200, condition=1e4), vector(200)
    solution = cg(Counted(a), [b])
    values, step = solution.model_values, solution.num_steps
    assert solution.status is Status.SMALL_PROGRESS

    def gained(i: int) -> float:
        k = max(10, math.ceil(0.1 * i))
        return (values[i] - values[i - k]) / values[i] / k

    assert gained(step) < 5e-4
    assert all(gained(i) >= 5e-4 for i in range(11, step))


def test_the_residual_rule_stops_at_its_tolerance():
    a, b = spd(50), vector(50)
    solution = cg(Counted(a), [b], stop=ResidualNorm(rtol=1e-3))
    assert solution.status is Status.CONVERGED
    assert solution.residual_norm <= 1e-3 * float(b.norm())
    before = cg(Counted(a), [b], stop=ResidualNorm(rtol=1e-3), max_steps=solution.num_steps - 1)
    assert before.status is Status.STEP_LIMIT
    assert before.residual_norm > 1e-3 * float(b.norm())


def test_the_first_of_two_rules_wins():
    progress = Progress(11, 0.5, 1.0, [-1.0] * 12)
    rules = (ResidualNorm(rtol=0.1), RelativeProgress())
    assert FirstOf(rules)(progress) is Status.SMALL_PROGRESS
    assert FirstOf((ResidualNorm(rtol=0.9), *rules))(progress) is Status.CONVERGED
    assert FirstOf(())(progress) is None


def test_a_zero_right_hand_side_is_solved_by_zero_without_steps():
    operator = Counted(spd(3))
    solution = cg(operator, [torch.zeros(3, dtype=torch.float64)])
    assert (solution.status, solution.num_steps, operator.calls) == (Status.CONVERGED, 0, 0)
    assert solution.value[0].tolist() == [0, 0, 0]
    started = cg(operator, [torch.zeros(3, dtype=torch.float64)], x0=[vector(3)])
    assert started.value[0].tolist() == [0, 0, 0]


def test_starting_at_the_solution_takes_no_step():
    a = torch.diag(torch.tensor([2.0, 4.0], dtype=torch.float64))
    x = torch.tensor([1.0, -3.0], dtype=torch.float64)
    solution = cg(Counted(a), [a @ x], x0=[x])
    assert (solution.status, solution.num_steps) == (Status.CONVERGED, 0)
    assert torch.equal(solution.value[0], x)


@pytest.mark.parametrize("factor", [-1.0, math.nan, 1e200])
def test_a_start_where_the_model_is_worse_than_at_zero_gives_way_to_zero(factor):
    a, b = spd(10), vector(10)
    cold = cg(Counted(a), [b], stop=TIGHT, max_steps=4)
    reset = cg(Counted(a), [b], x0=[factor * b], stop=TIGHT, max_steps=4)
    assert torch.equal(reset.value[0], cold.value[0])
    assert reset.model_values == cold.model_values
    assert reset.num_products == cold.num_products + 1


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


def test_float32_products_of_large_scale_do_not_overflow_into_a_breakdown():
    a, b = 1e6 * spd(8).float(), 1e6 * vector(8).float()
    solution = cg(lambda v: [a @ v[0]], [b], stop=ResidualNorm(rtol=1e-4))
    assert solution.status is Status.CONVERGED


def test_lists_of_mixed_shapes_and_dtypes_are_one_vector():
    a, b = spd(10), vector(10)

    def flat(v: list[Tensor]) -> Tensor:
        return torch.cat([x.reshape(-1).double() for x in v])

    def split(x: Tensor) -> list[Tensor]:
        return [x[:6].reshape(2, 3), x[6].reshape(()).float(), x[7:].float()]

    solution = cg(lambda v: split(a @ flat(v)), split(b), stop=ResidualNorm(rtol=1e-5))
    assert solution.status is Status.CONVERGED
    assert [x.dtype for x in solution.value] == [torch.float64, torch.float32, torch.float32]
    assert [x.shape for x in solution.value] == [(2, 3), (), (3,)]
    np.testing.assert_allclose(flat(solution.value), np.linalg.solve(a, b), atol=1e-4)


def test_bfloat16_vectors_have_float32_scalars():
    a = torch.tensor([1.0, 2.0, 4.0, 8.0])
    b = torch.ones(4, dtype=torch.bfloat16)
    solution = cg(lambda v: [a.bfloat16() * v[0]], [b], stop=ResidualNorm(rtol=0.02))
    assert solution.value[0].dtype == torch.bfloat16
    np.testing.assert_allclose(solution.value[0].float(), 1 / a, rtol=0.05)


def test_nothing_is_recorded_and_the_inputs_stay():
    a = spd(6).requires_grad_()
    b, start = vector(6).requires_grad_(), vector(6, seed=2)
    before = b.detach().clone(), start.clone()
    solution = cg(lambda v: [a @ v[0]], [b], x0=[start], keep_iterates=True)
    assert not solution.value[0].requires_grad
    assert torch.equal(b, before[0])
    assert torch.equal(start, before[1])
    assert b.grad is None


def test_an_operator_that_returns_its_own_argument_is_the_identity():
    b = vector(4)
    solution = cg(lambda v: v, [b], stop=TIGHT)
    assert solution.num_steps == 1
    assert torch.equal(solution.value[0], b)


def test_bad_calls_are_answered_by_name():
    a, b = Counted(spd(3)), vector(3)
    with pytest.raises(ValueError, match="right-hand side is an empty list"):
        cg(a, [])
    with pytest.raises(TypeError, match=r"real floating-point tensors, but entry 0 is torch.int64"):
        cg(a, [torch.ones(3, dtype=torch.int64)])
    with pytest.raises(TypeError, match=r"entry 0 is torch.complex128"):
        cg(a, [b.to(torch.complex128)])
    with pytest.raises(ValueError, match="max_steps ≥ 1, got 0"):
        cg(a, [b], max_steps=0)
    with pytest.raises(ValueError, match=r"x0 has the shapes \[\(2,\)\]; expected \[\(3,\)\]"):
        cg(a, [b], x0=[vector(2)])
    with pytest.raises(ValueError, match="result of matvec has the shapes"):
        cg(lambda v: [v[0][:2]], [b])
    with pytest.raises(ValueError, match="result of preconditioner has the shapes"):
        cg(a, [b], preconditioner=lambda r: [])


def test_bad_stopping_rules_are_answered_by_name():
    with pytest.raises(ValueError, match="rtol > 0"):
        RelativeProgress(rtol=0.0)
    with pytest.raises(ValueError, match="min_steps ≥ 1"):
        RelativeProgress(min_steps=0)
    with pytest.raises(ValueError, match="fraction ≥ 0"):
        RelativeProgress(fraction=-0.1)
    with pytest.raises(ValueError, match="tolerances ≥ 0"):
        ResidualNorm(rtol=-1.0)


def test_every_status_is_a_sentence_and_says_whether_it_converged():
    assert all(len(status.value.split()) > 5 for status in Status)
    assert {status for status in Status if status.converged} == {
        Status.CONVERGED,
        Status.SMALL_PROGRESS,
    }


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


def test_a_preconditioner_that_fails_later_leaves_the_last_finite_iterate():
    a, b, calls = spd(5), vector(5), []

    def failing(r):
        calls.append(1)
        return [r[0] * (math.nan if len(calls) == 2 else 1.0)]

    solution = cg(Counted(a), [b], preconditioner=failing, stop=TIGHT)
    assert solution.status is Status.INDEFINITE_PRECONDITIONER
    one = cg(Counted(a), [b], stop=TIGHT, max_steps=1)
    assert torch.equal(solution.value[0], one.value[0])


def test_steps_that_gain_less_than_the_average_are_not_worthwhile():
    """With the rest of a step as dear as one of CG, the rule stops where the rate of gain peaks."""
    values = (0.0, -8.0, -12.0, -13.0, -13.5)
    stops = [Worthwhile()(Progress(i, 1.0, 1.0, values[: i + 1])) for i in range(5)]
    assert [stop is not None for stop in stops] == [False, False, False, True, True]
    rates = [-m / (i + 1) for i, m in enumerate(values)]
    assert max(rates) == rates[2]  # and the next step shows it
    dear = Worthwhile(overhead=20.0)
    assert [dear(Progress(i, 1.0, 1.0, values[: i + 1])) for i in (3, 4)] == [
        None,
        Status.SMALL_PROGRESS,
    ]
    with pytest.raises(ValueError, match=r"Worthwhile needs overhead ≥ 0, got -1"):
        Worthwhile(overhead=-1)
