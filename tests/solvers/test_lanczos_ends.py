"""Both ends of a spectrum, convergence of values, warm starts and blocks, against dense ones."""

import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from hvpopt.operators import LinearOperator
from hvpopt.solvers import Status
from hvpopt.solvers.eigenpairs import extreme_eigenpairs, top_eigenpairs
from hvpopt.solvers.krylov import KrylovBasis


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_eigenvalues(values, seed: int = 0) -> Tensor:
    n = len(values)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=seeded(seed), dtype=torch.float64))
    return (q * torch.as_tensor(np.asarray(values), dtype=torch.float64)) @ q.T


def operator(matrix: Tensor):
    return lambda v: [matrix @ v[0]]


def like(n: int) -> list[Tensor]:
    return [torch.zeros(n, dtype=torch.float64)]


def test_both_ends_come_from_one_krylov_space():
    a = with_eigenvalues([-5.0, -4.0, *np.linspace(-1, 1, 40), 3.0, 7.0])
    top, bottom = extreme_eigenpairs(
        operator(a), like(44), num_top=2, num_bottom=2, rtol=1e-9, generator=seeded()
    )
    np.testing.assert_allclose(top.values, [7.0, 3.0], atol=1e-9)
    np.testing.assert_allclose(bottom.values, [-5.0, -4.0], atol=1e-9)
    assert top.num_products == bottom.num_products <= 44
    assert top.status is bottom.status is Status.CONVERGED
    for pairs in (top, bottom):
        for value, (vector,) in zip(pairs.values, pairs.vectors, strict=True):
            torch.testing.assert_close(a @ vector, value * vector, atol=1e-7, rtol=0)


def test_one_end_alone_leaves_the_other_empty():
    a = with_eigenvalues([-5.0, *np.linspace(-1, 1, 10)])
    top, bottom = extreme_eigenpairs(operator(a), like(11), num_top=0, generator=seeded())
    assert (top.values, top.vectors) == ((), ())
    assert bottom.values[0] == pytest.approx(-5.0)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_both_ends_of_a_tiny_matrix(n):
    values = [-2.0, 4.0, 5.0][:n]
    top, bottom = extreme_eigenpairs(operator(with_eigenvalues(values)), like(n))
    assert (top.values[0], bottom.values[0]) == pytest.approx((max(values), min(values)))


def test_values_converge_in_fewer_steps_and_are_within_rtol():
    spectrum = [*np.geomspace(1e-3, 1, 300), 1.2, 1.5, 2.0]
    a = with_eigenvalues(spectrum)
    for rtol in (1e-2, 1e-4, 1e-6):
        by = {
            aim: top_eigenpairs(operator(a), like(303), rtol=rtol, converge=aim, generator=seeded())
            for aim in ("vectors", "values")
        }
        assert by["values"].num_products < by["vectors"].num_products
        assert abs(by["values"].values[0] - 2.0) <= rtol * 2.0
        assert by["values"].value_errors[0] <= rtol * by["values"].values[0]
        assert by["values"].value_errors[0] < by["values"].residual_bounds[0]


def test_the_expected_error_covers_the_true_one_nearly_always():
    """It is an estimate: the gap is that of Ritz values. Over spectra, starts and steps."""
    covered = total = 0
    for seed in range(20):
        values = torch.randn(120, generator=seeded(seed), dtype=torch.float64).abs() ** 2
        a = with_eigenvalues(values.numpy(), seed)
        for max_steps in (6, 9, 12, 16):
            top = top_eigenpairs(
                operator(a), like(120), max_steps=max_steps, rtol=1e-12, generator=seeded(seed)
            )
            covered += float(values.max()) - top.values[0] <= 1.1 * top.value_errors[0] + 1e-12
            total += 1
    assert covered >= 0.85 * total


def test_a_warm_start_from_earlier_results_saves_products_at_both_ends():
    rng = seeded(1)
    a = with_eigenvalues([-3.0, -2.5, *np.linspace(-1, 1, 200), 4.0, 5.0])
    drift = torch.randn(204, 204, generator=rng, dtype=torch.float64)
    b = a + 1e-3 * (drift + drift.T)

    def solve(matrix, **options):
        return extreme_eigenpairs(
            operator(matrix),
            like(204),
            num_top=2,
            num_bottom=1,
            rtol=1e-3,
            generator=seeded(),
            **options,
        )

    first = solve(a)
    cold, warm = solve(b), solve(b, start=first)
    assert warm[0].num_products < cold[0].num_products
    np.testing.assert_allclose(warm[0].values, cold[0].values, rtol=1e-4)
    np.testing.assert_allclose(warm[1].values, cold[1].values, rtol=1e-4)
    cold_top = top_eigenpairs(operator(b), like(204), 2, generator=seeded())
    for start in (first[0], first[0].vectors):
        again = top_eigenpairs(operator(b), like(204), 2, generator=seeded(), start=start)
        assert again.num_products < cold_top.num_products


def test_all_vectors_that_wait_go_through_an_operator_at_once():
    a = with_eigenvalues([*np.linspace(-1, 1, 80), 3.0, 3.0, 4.0])
    calls = []

    def rows(vs: list[Tensor]) -> list[Tensor]:
        calls.append(len(vs[0]))
        return [vs[0] @ a]

    many = LinearOperator(like(83), operator(a), matmat=rows)
    found = top_eigenpairs(many, k=3, generator=seeded())
    np.testing.assert_allclose(found.values, [4.0, 3.0, 3.0], rtol=1e-5)
    assert set(calls) == {3}
    assert sum(calls) == found.num_products
    each = top_eigenpairs(operator(a), like(83), 3, generator=seeded())
    np.testing.assert_allclose(found.values, each.values, rtol=1e-9)
    assert each.num_products == found.num_products
    assert top_eigenpairs(many, k=3, max_steps=7, rtol=1e-9).num_products == 7


def test_long_bases_in_several_blocks_stay_orthonormal_in_single_precision():
    a = with_eigenvalues([1e4, *np.linspace(0, 1, 149)]).float()
    basis = KrylovBasis(operator(a), [torch.zeros(150)], 100)
    basis.append([torch.randn(150, generator=seeded())])
    while basis.size < 100:
        assert basis.expand()
    q = torch.stack([basis.vector(i)[0] for i in range(100)])
    torch.testing.assert_close(q @ q.T, torch.eye(100), atol=1e-5, rtol=0)
    weights = torch.randn(100, generator=seeded())
    torch.testing.assert_close(basis.combine(weights)[0], weights @ q, atol=1e-4, rtol=1e-4)
    t = basis.coefficients()[:99]
    torch.testing.assert_close(t, (q[:99] @ a @ q[:99].T).double(), atol=2e-2, rtol=0)


def test_a_breakdown_at_once_gives_no_values():
    top, bottom = extreme_eigenpairs(lambda v: [v[0] * math.nan], like(5), num_bottom=2)
    assert math.isnan(top.values[0])
    assert all(map(math.isnan, bottom.values))
    assert bottom.value_errors == (math.inf, math.inf)
    assert top.status is Status.BREAKDOWN


def test_bad_calls_for_both_ends_are_answered_by_name():
    a = operator(torch.eye(3, dtype=torch.float64))
    for numbers, shown in (((0, 0), 0), ((-1, 2), -1), ((1, 4), 4)):
        with pytest.raises(ValueError, match=f"1 ≤ k ≤ n = 3, got k = {shown}"):
            extreme_eigenpairs(a, like(3), num_top=numbers[0], num_bottom=numbers[1])
    with pytest.raises(
        ValueError, match="converge='speed' is unknown: choose 'vectors' or 'values'"
    ):
        extreme_eigenpairs(a, like(3), converge="speed")
    with pytest.raises(ValueError, match="start has the shapes"):
        top_eigenpairs(a, like(3), start=[like(4), like(4)])
    with pytest.raises(TypeError, match="start mixes vectors, tensors and results"):
        top_eigenpairs(a, like(3), start=[torch.zeros(3), like(3)])


def test_one_start_takes_fewer_products_where_eigenvalues_are_distinct():
    a = with_eigenvalues([*np.linspace(-1, 1, 200), 2.0, 2.5, 3.0, 3.5, 4.0])

    def solve(block_size, **options):
        return top_eigenpairs(
            operator(a), like(205), 5, block_size=block_size, generator=seeded(), **options
        )

    one, two, five = solve(1), solve(2), solve(None)
    for found in (one, two, five):
        np.testing.assert_allclose(found.values, [4.0, 3.5, 3.0, 2.5, 2.0], rtol=1e-4)
    assert one.num_products < two.num_products < five.num_products
    assert solve(1, start=one).num_products < one.num_products
    assert solve(2, start=one).num_products < two.num_products


def test_an_exhausted_space_of_fewer_starts_goes_on_from_new_ones():
    for n in (3, 6):
        found = top_eigenpairs(lambda v: [2 * v[0]], like(n), 3, block_size=1, generator=seeded())
        np.testing.assert_allclose(found.values, [2.0] * 3)
        vectors = torch.stack([v[0] for v in found.vectors])
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="block_size=4 is out of range: expected 1 ≤ b ≤ k = 3"):
        top_eigenpairs(lambda v: v, like(6), 3, block_size=4)


@pytest.mark.parametrize(
    ("num_top", "num_bottom", "block_size", "max_basis"),
    [(1, 0, 1, 4), (1, 0, 1, 10), (3, 0, 3, 12), (3, 0, 1, 8), (2, 2, 2, 14), (1, 1, 1, 40)],
)
def test_a_bounded_basis_finds_the_same_at_more_products(
    num_top, num_bottom, block_size, max_basis, monkeypatch
):
    values = np.array([-4.0, -3.0, *np.linspace(-1, 1, 300), 2.0, 2.5, 3.5])
    a = with_eigenvalues(values)
    sizes = []
    grow = KrylovBasis._grow

    def watched(self, *arguments):
        grown = grow(self, *arguments)
        sizes.append(sum(len(block) for block in self._blocks))
        return grown

    monkeypatch.setattr(KrylovBasis, "_grow", watched)

    def solve(**options):
        return extreme_eigenpairs(
            operator(a),
            like(305),
            num_top=num_top,
            num_bottom=num_bottom,
            block_size=block_size,
            max_steps=300,
            rtol=1e-6,
            generator=seeded(),
            **options,
        )

    top, bottom = solve(max_basis=max_basis)
    assert max(sizes) <= max_basis
    assert top.status is Status.CONVERGED
    np.testing.assert_allclose(top.values, values[::-1][:num_top], rtol=1e-10)
    np.testing.assert_allclose(bottom.values, values[:num_bottom], rtol=1e-10)
    for pairs in (top, bottom):
        for value, (v,), bound in zip(
            pairs.values, pairs.vectors, pairs.residual_bounds, strict=True
        ):
            assert float((a @ v - value * v).norm()) == pytest.approx(bound, abs=1e-10)
            assert float(v.norm()) == pytest.approx(1.0)
    assert solve()[0].num_products <= top.num_products


def test_a_bound_above_the_dimension_changes_nothing_and_too_small_ones_are_refused():
    a = with_eigenvalues([1.0, 2.0, 5.0])
    found = top_eigenpairs(operator(a), like(3), max_basis=9, rtol=1e-12)
    assert found.values[0] == pytest.approx(5.0)
    assert found.num_products == 3
    exact = top_eigenpairs(operator(a), like(3), max_basis=3, rtol=1e-12)
    assert exact.values[0] == pytest.approx(5.0)
    with pytest.raises(ValueError, match="max_basis=5 is out of range: expected at least 6"):
        top_eigenpairs(operator(a), like(3), 2, max_basis=5)


def test_lanczos_from_one_start_takes_fewer_products_than_lobpcg_without_a_preconditioner():
    """Why there is no LOBPCG here. Both find five eigenvalues apart from a bulk to 1e-4."""
    values = np.array([*0.3 * np.linspace(0, 1, 400) ** 8, 1.0, 1.1, 1.15, 1.2, 1.332])
    a = with_eigenvalues(values)
    found = top_eigenpairs(
        operator(a),
        like(405),
        5,
        rtol=1e-4,
        converge="values",
        block_size=1,
        generator=seeded(),
    )
    np.testing.assert_allclose(found.values, values[:-6:-1], rtol=1e-4)
    num_products = 0

    def rows(x: np.ndarray) -> np.ndarray:
        nonlocal num_products
        num_products += x.shape[1]
        return a.numpy() @ x

    start = torch.randn(405, 5, generator=seeded(), dtype=torch.float64).numpy()
    other = scipy.sparse.linalg.lobpcg(
        scipy.sparse.linalg.LinearOperator(a.shape, lambda x: a.numpy() @ x, matmat=rows),
        start,
        tol=1e-3,
        maxiter=60,
    )[0]
    np.testing.assert_allclose(np.sort(other)[::-1], found.values, rtol=1e-4)
    assert found.num_products < num_products
