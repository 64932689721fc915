"""Estimates of a diagonal and of the Frobenius norm against dense matrices and definitions."""

import itertools
import math

import pytest
import torch
from spectra import in_parts, joined, like, product, seeded, wigner, with_eigenvalues

from hvpopt.curvature import diagonal, frobenius_norm
from hvpopt.solvers.rows import Rows

DECAYING = [10 * 0.7**i for i in range(60)]
METHODS = ["hutchinson", "xdiag"]


def test_a_diagonal_matrix_is_exact_with_one_probe():
    d = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)
    estimate = diagonal(lambda v: [d * v[0]], [d], num_probes=1)
    assert torch.equal(estimate.value[0], d)
    assert torch.equal(estimate.standard_error[0], torch.full_like(d, math.inf))
    assert torch.equal(diagonal(lambda v: [d * v[0]], [d]).standard_error[0], torch.zeros_like(d))


def test_the_mean_over_all_sign_vectors_is_the_diagonal(monkeypatch):
    a = wigner(4)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)), dtype=torch.float64)
    monkeypatch.setattr(Rows, "signs", lambda self, count, generator: signs)
    estimate = diagonal(product(a), like(4), num_probes=16)
    torch.testing.assert_close(estimate.value[0], a.diagonal())
    terms = signs * (signs @ a)
    torch.testing.assert_close(estimate.standard_error[0], terms.std(0) / 4)


def test_probes_in_several_groups_give_the_same(monkeypatch):
    a = wigner(20)
    whole = diagonal(product(a), like(20), num_probes=11, generator=seeded())
    monkeypatch.setattr("hvpopt.solvers.rows._AT_ONCE", 100)
    groups = diagonal(product(a), like(20), num_probes=11, generator=seeded())
    torch.testing.assert_close(groups.value, whole.value)
    torch.testing.assert_close(groups.standard_error, whole.standard_error)


@pytest.mark.parametrize("k", [2, 6])
def test_xdiag_is_its_definition(k):
    """Epperly et al. 2024: diag(QᵢQᵢᵀA) + ωᵢ ⊙ (I − QᵢQᵢᵀ) A ωᵢ, averaged."""
    a = with_eigenvalues(DECAYING) - 0.3 * wigner(60)
    omega = Rows(product(a), like(60)).signs(k, seeded(3)).T
    terms = []
    for i in range(k):
        q = torch.linalg.qr(a @ omega[:, [j for j in range(k) if j != i]])[0]
        known = q @ q.T @ a
        terms.append(known.diagonal() + omega[:, i] * ((a - known) @ omega[:, i]))
    expected = torch.stack(terms)
    estimate = diagonal(product(a), like(60), method="xdiag", num_probes=k, generator=seeded(3))
    torch.testing.assert_close(estimate.value[0], expected.mean(0))
    torch.testing.assert_close(estimate.standard_error[0], expected.std(0) / math.sqrt(k))
    assert (estimate.num_products, estimate.degrees_of_freedom) == (2 * k, k - 1)


def test_xdiag_is_exact_on_a_low_rank_and_closer_than_hutchinson_where_eigenvalues_decay():
    low = with_eigenvalues([5.0, 3.0, -2.0] + [0.0] * 37)
    exact = diagonal(product(low), like(40), method="xdiag", num_probes=5, generator=seeded())
    torch.testing.assert_close(exact.value[0], low.diagonal())
    a = with_eigenvalues(DECAYING)
    errors = {}
    for method, num_probes in (("xdiag", 12), ("hutchinson", 24)):
        found = diagonal(
            product(a), like(60), method=method, num_probes=num_probes, generator=seeded()
        )
        assert found.num_products == 24
        errors[method] = float((found.value[0] - a.diagonal()).norm())
    assert errors["xdiag"] < errors["hutchinson"] / 5


@pytest.mark.parametrize("method", METHODS)
def test_bands_hold_the_entries_as_often_as_they_say(method):
    a = with_eigenvalues(DECAYING) + 0.1 * wigner(60)
    held = torch.zeros(60)
    for seed in range(100):
        estimate = diagonal(in_parts(a), method=method, num_probes=12, generator=seeded(seed))
        low, high = map(joined, estimate.band(0.9))
        held += ((low <= a.diagonal()) & (a.diagonal() <= high)).float() / 100
    assert 0.86 <= float(held.mean()) <= 0.94
    assert float(held.min()) > 0.7


@pytest.mark.parametrize("method", METHODS)
def test_a_diagonal_comes_in_the_shapes_and_dtypes_of_the_vectors(method):
    scale = [torch.full((2, 3), 2.0), torch.tensor(5.0), torch.full((4,), -1.0).bfloat16()]
    estimate = diagonal(
        lambda v: [s * x for s, x in zip(scale, v, strict=True)],
        scale,
        method=method,
        num_probes=20,
    )
    for value, error, expected in zip(estimate.value, estimate.standard_error, scale, strict=True):
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(error, torch.zeros_like(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_product_that_is_not_finite_shows_in_the_diagonal(method):
    estimate = diagonal(lambda v: [v[0] * math.nan], [torch.ones(3)], method=method, num_probes=2)
    assert bool(estimate.value[0].isnan().all())


def test_the_norm_is_exact_where_it_can_be():
    d = torch.tensor([3.0, -4.0, 12.0], dtype=torch.float64)
    found = frobenius_norm(lambda v: [d * v[0]], [d], num_probes=2)
    assert (found.value, found.standard_error, found.num_products) == (13.0, 0.0, 2)
    low = with_eigenvalues([6.0, -2.0, 3.0] + [0.0] * 37)
    found = frobenius_norm(
        product(low), like(40), method="hutch++", num_probes=8, generator=seeded()
    )
    assert found.value == pytest.approx(7.0, abs=1e-12)
    assert found.num_products == 11  # one less, as the rank is 3 and not 4
    zero = torch.zeros(4, 4, dtype=torch.float64)
    for method in ("hutchinson", "hutch++"):
        found = frobenius_norm(product(zero), like(4), method=method, num_probes=4)
        assert (found.value, found.standard_error) == (0.0, 0.0)


def test_the_mean_square_over_all_sign_vectors_is_the_norms(monkeypatch):
    a = wigner(4)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)), dtype=torch.float64)
    monkeypatch.setattr(Rows, "signs", lambda self, count, generator: signs)
    found = frobenius_norm(product(a), like(4), num_probes=16)
    assert found.value == pytest.approx(float(a.norm()), rel=1e-12)
    squares = ((signs @ a) ** 2).sum(1)
    assert found.standard_error == pytest.approx(float(squares.std()) / 4 / (2 * found.value))


def test_the_norms_hutch_plus_plus_is_its_definition(monkeypatch):
    a = with_eigenvalues(DECAYING)
    signs = Rows(product(a), like(60)).signs(9, seeded(1))
    tables = iter((signs[:5], signs[5:]))
    monkeypatch.setattr(Rows, "signs", lambda self, count, generator: next(tables))
    q = torch.linalg.qr(a @ signs[:5].T)[0]
    outside = torch.eye(60, dtype=torch.float64) - q @ q.T
    square = (a @ q).norm() ** 2 + (a @ outside @ signs[5:].T).norm() ** 2 / 4
    found = frobenius_norm(product(a), like(60), method="hutch++", num_probes=9)
    assert found.value == pytest.approx(math.sqrt(float(square)), rel=1e-12)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_bands_hold_the_norm_as_often_as_they_say(method):
    a = with_eigenvalues(torch.linspace(-1, 1, 60))
    held = 0
    for seed in range(300):
        found = frobenius_norm(in_parts(a), method=method, num_probes=12, generator=seeded(seed))
        low, high = found.band(0.9)
        held += low <= float(a.norm()) <= high
    assert 246 <= held <= 291, held


def test_bad_calls_for_diagonals_and_norms_are_answered_by_name():
    ones = [torch.ones(3)]
    with pytest.raises(ValueError, match="diagonal needs num_probes ≥ 1, got 0"):
        diagonal(lambda v: v, ones, num_probes=0)
    with pytest.raises(
        ValueError, match="method='xtrace' is unknown: choose one of 'hutchinson', 'xd"
    ):
        diagonal(lambda v: v, ones, method="xtrace")
    with pytest.raises(ValueError, match="frobenius_norm needs num_probes ≥ 2, got 1"):
        frobenius_norm(lambda v: v, ones, method="hutch++", num_probes=1)
    with pytest.raises(ValueError, match="choose one of 'hutchinson', 'hutch"):
        frobenius_norm(lambda v: v, ones, method="xtrace")
    nan = frobenius_norm(lambda v: [v[0] * math.nan], ones, method="hutch++")
    assert math.isnan(nan.value)
