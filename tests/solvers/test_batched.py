import pytest
import torch

from hvpopt.solvers import Status, cg
from hvpopt.solvers.batched import STATUSES, batched_cg, batched_minres


def systems(count, size, seed=0, shift=0.5):
    generator = torch.Generator().manual_seed(seed)
    m = torch.randn(count, size, size, generator=generator, dtype=torch.float64)
    A = m @ m.transpose(1, 2) / size + shift * torch.eye(size, dtype=torch.float64)
    b = torch.randn(count, size, generator=generator, dtype=torch.float64)
    return A, b


def operator(A, seen=None):
    def matvec(v, rows):
        if seen is not None:
            seen.append(len(v))
        return torch.einsum("kij,kj->ki", A if rows is None else A[rows], v)

    return matvec


@pytest.mark.parametrize("solve", [batched_cg, batched_minres])
def test_solutions_are_those_of_a_dense_solve(solve):
    A, b = systems(7, 9)
    found = solve(operator(A), b, max_steps=200, rtol=1e-12)
    assert torch.allclose(found.value, torch.linalg.solve(A, b), rtol=1e-9, atol=1e-10)
    assert found.statuses == [Status.CONVERGED] * 7
    errors = (torch.einsum("kij,kj->ki", A, found.value) - b).norm(dim=1)
    assert torch.allclose(found.residual_norms, errors, atol=1e-10)


@pytest.mark.parametrize("solve", [batched_cg, batched_minres])
def test_a_system_with_few_distinct_eigenvalues_takes_as_many_steps(solve):
    diagonals = torch.tensor(
        [[1.0, 1, 1, 1, 1], [1, 1, 3, 3, 3], [1, 2, 2, 5, 5]], dtype=torch.float64
    )
    found = solve(lambda v, rows: v * (diagonals if rows is None else diagonals[rows]),
                  torch.ones(3, 5, dtype=torch.float64), rtol=1e-10)  # fmt: skip
    assert found.num_steps.tolist() == [1, 2, 3]
    assert found.num_products == 3


def test_each_row_is_what_cg_makes_of_it_alone():
    A, b = systems(4, 6)
    together = batched_cg(operator(A), b, max_steps=3, rtol=0.0)
    for i in range(4):
        alone = cg(lambda v, i=i: [A[i] @ v[0]], [b[i]], max_steps=3)
        assert torch.allclose(together.value[i], alone.value[0], rtol=1e-12, atol=1e-14)
        assert float(together.residual_norms[i]) == pytest.approx(alone.residual_norm, rel=1e-10)


def test_rows_that_have_finished_are_not_multiplied_again():
    hard, easy = 10.0 ** torch.linspace(0, 3, 8, dtype=torch.float64), torch.ones(8).double()
    diagonals = torch.stack([easy, hard, easy, easy])
    seen = []
    matvec = operator(torch.diag_embed(diagonals), seen)
    found = batched_cg(matvec, torch.ones(4, 8, dtype=torch.float64), rtol=1e-12)
    assert seen == [4] + [1] * (len(seen) - 1)
    assert found.num_steps[[0, 2, 3]].tolist() == [1, 1, 1]
    assert found.num_steps[1] >= 8


def test_cg_ends_a_row_of_negative_curvature_and_solves_the_others():
    diagonals = torch.tensor([[1.0, 2.0], [1.0, -5.0]], dtype=torch.float64)
    found = batched_cg(lambda v, rows: v * (diagonals if rows is None else diagonals[rows]),
                       torch.ones(2, 2, dtype=torch.float64))  # fmt: skip
    assert found.statuses == [Status.CONVERGED, Status.NEGATIVE_CURVATURE]
    assert torch.allclose(found.value[0], 1 / diagonals[0])
    assert found.count(Status.NEGATIVE_CURVATURE) == 1


def test_minres_solves_indefinite_systems():
    A, b = systems(5, 8, shift=-0.7)
    assert (torch.linalg.eigvalsh(A)[:, 0] < 0).all()
    found = batched_minres(operator(A), b, max_steps=100, rtol=1e-12)
    assert torch.allclose(found.value, torch.linalg.solve(A, b), rtol=1e-7, atol=1e-8)


def test_minres_finds_the_least_norm_solution_of_a_singular_consistent_system():
    A = torch.diag(torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64))[None]
    b = torch.tensor([[1.0, 4.0, 0.0]], dtype=torch.float64)
    found = batched_minres(operator(A), b, rtol=1e-12)
    assert torch.allclose(found.value, torch.tensor([[1.0, -2.0, 0.0]], dtype=torch.float64))


def test_minres_stops_at_a_singular_system_without_a_solution():
    A = torch.zeros(1, 2, 2, dtype=torch.float64)
    found = batched_minres(operator(A), torch.ones(1, 2, dtype=torch.float64))
    assert found.statuses == [Status.SMALL_PROGRESS]
    assert torch.equal(found.value, torch.zeros(1, 2, dtype=torch.float64))


@pytest.mark.parametrize("solve", [batched_cg, batched_minres])
def test_a_row_that_meets_nan_breaks_down_alone(solve):
    A, b = systems(3, 4)
    A[1] = torch.nan
    found = solve(operator(A), b, rtol=1e-12)
    assert found.statuses[1] is Status.BREAKDOWN
    assert torch.equal(found.value[1], torch.zeros(4, dtype=torch.float64))
    assert torch.allclose(found.value[::2], torch.linalg.solve(A[::2], b[::2]))


@pytest.mark.parametrize("solve", [batched_cg, batched_minres])
def test_zero_right_hand_sides_and_nan_take_no_step(solve):
    A, b = systems(3, 4)
    b[0], b[1] = 0.0, torch.nan
    found = solve(operator(A), b)
    assert found.statuses[:2] == [Status.CONVERGED, Status.BREAKDOWN]
    assert found.num_steps[:2].tolist() == [0, 0]
    assert torch.equal(found.value[:2], torch.zeros(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("solve", [batched_cg, batched_minres])
def test_the_step_limit_is_a_status(solve):
    A, b = systems(2, 10)
    found = solve(operator(A), b, max_steps=2, rtol=1e-12)
    assert found.statuses == [Status.STEP_LIMIT] * 2
    assert found.num_steps.tolist() == [2, 2]
    assert STATUSES[int(found.status[0])] is Status.STEP_LIMIT


def test_tolerances_may_differ_from_row_to_row():
    A, b = systems(1, 12)
    A, b = A.expand(2, -1, -1), b.expand(2, -1)
    found = batched_cg(operator(A), b, rtol=torch.tensor([1e-1, 1e-10], dtype=torch.float64))
    assert found.num_steps[0] < found.num_steps[1]
    assert (found.residual_norms / b.norm(dim=1) <= torch.tensor([1e-1, 1e-10])).all()


@pytest.mark.parametrize("solve", [batched_cg, batched_minres])
def test_bad_input_is_named(solve):
    A, b = systems(2, 3)
    with pytest.raises(ValueError, match=r"has shape \(3,\); expected \(B, n\)"):
        solve(operator(A), b[0])
    with pytest.raises(TypeError, match=r"is torch.int64; expected floating point"):
        solve(operator(A), b.long())
    with pytest.raises(ValueError, match=r"needs max_steps ≥ 1, got 0"):
        solve(operator(A), b, max_steps=0)
    with pytest.raises(ValueError, match=r"needs rtol ≥ 0, got -1"):
        solve(operator(A), b, rtol=-1.0)
    with pytest.raises(ValueError, match=r"returned shape \(2, 2\) for vectors of shape \(2, 3\)"):
        solve(lambda v, rows: v[:, :2], b)
