"""Conjugate gradients against closed forms, dense solves and SciPy."""

import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from matrices import TIGHT, Counted, spd, vector
from torch import Tensor

from hvpopt.solvers import ResidualNorm, Status, cg


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
