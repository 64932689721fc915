"""Krylov decompositions and eigenpairs against closed forms and dense eigensolvers."""

import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from hvpopt.solvers import Status, lanczos, top_eigenpairs


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_eigenvalues(values: list[float], seed: int = 0) -> tuple[Tensor, Tensor]:
    """A symmetric matrix with these eigenvalues, and its eigenvectors as columns."""
    n = len(values)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=seeded(seed), dtype=torch.float64))
    return (q * torch.tensor(values, dtype=torch.float64)) @ q.T, q


def operator(matrix: Tensor):
    return lambda v: [matrix @ v[0]]


def like(n: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.zeros(n, dtype=dtype)]


def test_the_decomposition_holds_with_an_orthonormal_basis():
    a, _ = with_eigenvalues(list(np.linspace(-3, 7, 30)))
    result = lanczos(operator(a), like(30), num_steps=12, generator=seeded())
    q = torch.stack([v[0] for v in result.basis], dim=1)
    t = result.matrix()
    torch.testing.assert_close(q.T @ q, torch.eye(12, dtype=torch.float64), atol=1e-13, rtol=0)
    torch.testing.assert_close(q.T @ a @ q, t, atol=1e-12, rtol=0)
    rest = a @ q - q @ t
    assert float(rest[:, :-1].norm()) < 1e-12
    assert float(rest[:, -1].norm()) == pytest.approx(result.residual_norm)
    assert (result.status, result.num_steps) == (Status.STEP_LIMIT, 12)


def test_reorthogonalisation_keeps_copies_of_an_outlier_away():
    """Plain Lanczos finds the outlier twice by this many steps in float32."""
    a, _ = with_eigenvalues([1e4, *np.linspace(0, 1, 79)])
    a = a.float()
    result = lanczos(operator(a), like(80, torch.float32), num_steps=40, generator=seeded())
    q = torch.stack([v[0] for v in result.basis], dim=1)
    torch.testing.assert_close(q.T @ q, torch.eye(40), atol=1e-5, rtol=0)
    values = torch.linalg.eigvalsh(result.matrix())
    assert int((values > 1e3).sum()) == 1


def test_all_eigenvalues_appear_after_n_steps():
    values = [-2.0, -1.0, 0.5, 3.0, 10.0]
    a, _ = with_eigenvalues(values)
    result = lanczos(operator(a), like(5), num_steps=50, generator=seeded())
    assert (result.num_steps, result.status) == (5, Status.CONVERGED)
    assert result.residual_norm == 0.0
    np.testing.assert_allclose(torch.linalg.eigvalsh(result.matrix()), values, atol=1e-12)


def test_quadrature_weights_give_the_moments_of_the_start():
    """Gauss: q₁ᵀ Aʲ q₁ = Σ wᵢ θᵢʲ exactly for j ≤ 2m − 1."""
    a, _ = with_eigenvalues(list(np.linspace(-1, 1, 20)))
    start = torch.randn(20, generator=seeded(1), dtype=torch.float64)
    result = lanczos(operator(a), like(20), num_steps=4, start=[start])
    nodes, vectors = torch.linalg.eigh(result.matrix())
    weights = vectors[0] ** 2
    unit = start / start.norm()
    power = unit
    for j in range(8):
        assert float(weights @ nodes**j) == pytest.approx(float(unit @ power), abs=1e-12)
        power = a @ power


@pytest.mark.parametrize("support", [1, 2, 3])
def test_an_invariant_subspace_ends_it_early(support):
    a = torch.diag(torch.arange(1, 7, dtype=torch.float64))
    start = a.diagonal().le(support).double()
    result = lanczos(operator(a), like(6), num_steps=6, start=[start])
    assert (result.num_steps, result.status) == (support, Status.CONVERGED)
    np.testing.assert_allclose(
        torch.linalg.eigvalsh(result.matrix()), [1.0, 2.0, 3.0][:support], atol=1e-12
    )


def test_a_product_that_is_not_finite_ends_the_decomposition():
    a, _ = with_eigenvalues(list(range(10)))
    calls = []

    def failing(v: list[Tensor]) -> list[Tensor]:
        calls.append(1)
        return [a @ v[0] * (math.nan if len(calls) == 4 else 1.0)]

    result = lanczos(failing, like(10), num_steps=8, generator=seeded())
    assert (result.num_steps, result.status) == (3, Status.BREAKDOWN)
    assert torch.isfinite(result.matrix()).all()
    first = lanczos(lambda v: [v[0] * math.nan], like(10), num_steps=8, generator=seeded())
    assert (first.num_steps, first.status) == (0, Status.BREAKDOWN)


@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_the_top_eigenpair_is_the_dense_one(n):
    a, _ = with_eigenvalues(list(np.linspace(-2, 5, n)))
    top = top_eigenpairs(operator(a), like(n), rtol=1e-8, generator=seeded())
    values, vectors = torch.linalg.eigh(a)
    assert top.status is Status.CONVERGED
    assert top.values[0] == pytest.approx(float(values[-1]), rel=1e-12)
    assert abs(float(vectors[:, -1] @ top.vectors[0][0])) == pytest.approx(1.0)
    assert float(top.vectors[0][0].norm()) == pytest.approx(1.0)
    assert top.num_products <= n


def test_the_top_three_are_scipys():
    a, _ = with_eigenvalues(list(np.geomspace(0.01, 100, 60)))
    top = top_eigenpairs(operator(a), like(60), 3, rtol=1e-9, generator=seeded())
    expected = scipy.sparse.linalg.eigsh(a.numpy(), k=3, which="LA")[0][::-1]
    np.testing.assert_allclose(top.values, expected, rtol=1e-10)


def test_the_bound_is_the_residual():
    a, _ = with_eigenvalues(list(np.linspace(0, 1, 50)))
    top = top_eigenpairs(operator(a), like(50), 2, max_steps=9, generator=seeded())
    assert top.status is Status.STEP_LIMIT
    assert top.num_products == 9
    for value, (vector,), bound in zip(top.values, top.vectors, top.residual_bounds, strict=True):
        assert float((a @ vector - value * vector).norm()) == pytest.approx(bound)
        assert min(abs(value - np.linspace(0, 1, 50))) <= bound


def test_it_stops_as_soon_as_the_residual_is_within_rtol():
    a, _ = with_eigenvalues([10.0, *np.linspace(-1, 1, 99)])
    top = top_eigenpairs(operator(a), like(100), rtol=1e-3, generator=seeded())
    assert top.residual_bounds[0] <= 1e-3 * top.values[0]
    assert top.values[0] == pytest.approx(10.0, rel=1e-5)
    assert top.num_products < 12


def test_it_is_the_algebraically_largest_below_a_negative_dominant_one():
    a, q = with_eigenvalues([-100.0, -50.0, *np.linspace(-1, 1, 30)])
    top = top_eigenpairs(operator(a), like(32), rtol=1e-8, generator=seeded())
    assert top.values[0] == pytest.approx(1.0)
    assert abs(float(q[:, -1] @ top.vectors[0][0])) == pytest.approx(1.0)


def test_the_top_of_a_negative_matrix_is_negative_and_of_a_singular_one_zero():
    a, _ = with_eigenvalues([-3.0, -2.0, -1.0])
    assert top_eigenpairs(operator(a), like(3)).values[0] == pytest.approx(-1.0)
    a, _ = with_eigenvalues([-3.0, -2.0, -1.0, 0.0])
    top = top_eigenpairs(operator(a), like(4))
    assert top.values[0] == pytest.approx(0.0, abs=1e-12)
    assert top.status is Status.CONVERGED


def test_a_repeated_eigenvalue_is_found_as_often_as_asked():
    a, _ = with_eigenvalues([5.0, 5.0, 5.0, 1.0, 0.5, 0.0, -1.0, -7.0])
    top = top_eigenpairs(operator(a), like(8), 3, rtol=1e-10, generator=seeded())
    np.testing.assert_allclose(top.values, [5.0, 5.0, 5.0], atol=1e-10)
    v = torch.stack([x[0] for x in top.vectors])
    torch.testing.assert_close(v @ v.T, torch.eye(3, dtype=torch.float64), atol=1e-10, rtol=0)
    torch.testing.assert_close(a @ v.T, 5 * v.T, atol=1e-9, rtol=0)
    four = top_eigenpairs(operator(a), like(8), 4, rtol=1e-10, generator=seeded())
    np.testing.assert_allclose(four.values, [5.0, 5.0, 5.0, 1.0], atol=1e-10)


def test_the_identity_and_zero_take_one_product_each_direction():
    for factor in (1.0, 0.0):
        for k in (1, 3):
            top = top_eigenpairs(
                lambda v, factor=factor: [factor * v[0]], like(6), k, generator=seeded()
            )
            np.testing.assert_allclose(top.values, [factor] * k, atol=1e-14)
            assert top.status is Status.CONVERGED
            assert top.num_products == k


def test_all_eigenpairs_of_a_small_matrix():
    values = [-4.0, -1.0, 2.0, 2.0]
    a, _ = with_eigenvalues(values)
    top = top_eigenpairs(operator(a), like(4), 4, generator=seeded())
    np.testing.assert_allclose(top.values, values[::-1], atol=1e-12)


def test_a_good_guess_saves_products_and_a_wrong_one_hides_nothing():
    a, q = with_eigenvalues(list(np.linspace(0, 1, 200)))
    cold = top_eigenpairs(operator(a), like(200), generator=seeded())
    warm = top_eigenpairs(operator(a), like(200), generator=seeded(), start=[q[:, -1]])
    assert warm.num_products < cold.num_products
    b, p = with_eigenvalues([1.0, 2.0, 3.0, 10.0])
    wrong = top_eigenpairs(operator(b), like(4), generator=seeded(), start=[p[:, 0]])
    assert wrong.values[0] == pytest.approx(10.0)
    useless = top_eigenpairs(operator(b), like(4), generator=seeded(), start=like(4))
    assert useless.values[0] == pytest.approx(10.0)


def test_lists_of_mixed_shapes_and_dtypes_are_one_vector():
    a, _ = with_eigenvalues([1.0, 2.0, 3.0, 4.0, 5.0, 9.0, 0.0])

    def split(x: Tensor) -> list[Tensor]:
        return [x[:4].reshape(2, 2), x[4].reshape(()).float(), x[5:].to(torch.bfloat16)]

    def product(v: list[Tensor]) -> list[Tensor]:
        return split(a @ torch.cat([x.reshape(-1).double() for x in v]))

    top = top_eigenpairs(product, split(torch.zeros(7, dtype=torch.float64)), generator=seeded())
    assert top.values[0] == pytest.approx(9.0, rel=1e-2)
    assert [x.dtype for x in top.vectors[0]] == [torch.float64, torch.float32, torch.bfloat16]


def test_the_same_seed_gives_the_same_pair():
    a, _ = with_eigenvalues(list(np.linspace(0, 1, 30)))
    one, two = (
        top_eigenpairs(operator(a), like(30), max_steps=5, generator=seeded(3)) for _ in range(2)
    )
    assert one.values == two.values


def test_a_breakdown_keeps_what_was_found():
    a, _ = with_eigenvalues(list(np.linspace(0, 1, 30)))
    calls = []

    def failing(v: list[Tensor]) -> list[Tensor]:
        calls.append(1)
        return [a @ v[0] / (0.0 if len(calls) == 5 else 1.0)]

    top = top_eigenpairs(failing, like(30), rtol=1e-10, generator=seeded())
    before = top_eigenpairs(operator(a), like(30), max_steps=4, rtol=1e-10, generator=seeded())
    assert top.status is Status.BREAKDOWN
    assert top.values == before.values
    nothing = top_eigenpairs(lambda v: [v[0] * math.nan], like(30), 2, generator=seeded())
    assert all(math.isnan(x) for x in nothing.values)
    assert nothing.residual_bounds == (math.inf, math.inf)


def test_bad_calls_are_answered_by_name():
    a = operator(torch.eye(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="num_steps ≥ 1, got 0"):
        lanczos(a, like(3), num_steps=0)
    with pytest.raises(ValueError, match="start is zero or not finite"):
        lanczos(a, like(3), num_steps=2, start=like(3))
    with pytest.raises(ValueError, match="start has the shapes"):
        lanczos(a, like(3), num_steps=2, start=like(4))
    with pytest.raises(ValueError, match="1 ≤ k ≤ n = 3, got k = 4"):
        top_eigenpairs(a, like(3), 4)
    with pytest.raises(ValueError, match="1 ≤ k ≤ n = 3, got k = 0"):
        top_eigenpairs(a, like(3), 0)
    with pytest.raises(ValueError, match="max_steps ≥ k = 2, got 1"):
        top_eigenpairs(a, like(3), 2, max_steps=1)
    with pytest.raises(ValueError, match="rtol > 0"):
        top_eigenpairs(a, like(3), rtol=0.0)
    with pytest.raises(TypeError, match="real floating-point"):
        top_eigenpairs(a, like(3, torch.int64))
    with pytest.raises(ValueError, match="result of matvec"):
        top_eigenpairs(lambda v: [], like(3))
