"""Estimates of a trace against exact ones, their own definitions, and the cover of their bands."""

import itertools
import math

import pytest
import torch
from spectra import in_parts, like, product, seeded, wigner, with_eigenvalues

from hvpopt.curvature import trace
from hvpopt.solvers.rows import Rows

METHODS = ["hutchinson", "hutch++", "xtrace"]
DECAYING = [10 * 0.7**i for i in range(60)]


def symmetric(n: int) -> torch.Tensor:
    return wigner(n, seed=7) * (n / 2) ** 0.5


def of_signs(monkeypatch, *tables):
    """Makes the next calls for signs return these, in place of random ones."""
    left = iter(tables)
    monkeypatch.setattr(Rows, "signs", lambda self, count, generator: next(left))


def test_a_diagonal_matrix_is_exact_with_one_probe():
    diagonal = torch.tensor([3.0, -1.0, 0.5, 8.0], dtype=torch.float64)
    estimate = trace(lambda v: [diagonal * v[0]], [diagonal], num_probes=1, generator=seeded())
    assert estimate.value == 10.5
    assert (estimate.standard_error, estimate.num_products) == (math.inf, 1)
    assert estimate.band() == (-math.inf, math.inf)


def test_a_diagonal_matrix_has_no_standard_error():
    diagonal = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)
    estimate = trace(lambda v: [diagonal * v[0]], [diagonal], num_probes=5, generator=seeded())
    assert (estimate.value, estimate.standard_error) == (2.5, 0.0)
    assert estimate.band() == (2.5, 2.5)


def test_the_standard_error_is_that_of_the_variance_formula():
    a = symmetric(12)
    estimate = trace(lambda v: [a @ v[0]], [a[0]], num_probes=4000, generator=seeded())
    variance = 2 * float((a**2).sum() - (a.diagonal() ** 2).sum())
    assert estimate.standard_error == pytest.approx(math.sqrt(variance / 4000), rel=0.05)
    assert abs(estimate.value - float(a.trace())) < 3 * estimate.standard_error


def test_the_mean_over_all_sign_vectors_is_the_trace(monkeypatch):
    a = symmetric(4)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)), dtype=torch.float64)
    of_signs(monkeypatch, signs)
    estimate = trace(lambda v: [a @ v[0]], [a[0]], num_probes=16)
    assert estimate.value == pytest.approx(float(a.trace()), abs=1e-12)


def test_hutch_plus_plus_is_its_definition(monkeypatch):
    """Meyer et al. 2021, algorithm 1: tr QᵀAQ + (1/m) tr Gᵀ(I − QQᵀ) A (I − QQᵀ) G."""
    a = with_eigenvalues(DECAYING)
    signs = Rows(product(a), like(60)).signs(9, seeded(1))
    of_signs(monkeypatch, signs[:5], signs[5:])
    q = torch.linalg.qr(a @ signs[:5].T)[0]
    outside = torch.eye(60, dtype=torch.float64) - q @ q.T
    g = signs[5:].T
    expected = (q.T @ a @ q).trace() + (g.T @ outside @ a @ outside @ g).trace() / 4
    estimate = trace(product(a), like(60), method="hutch++", num_probes=9)
    assert estimate.value == pytest.approx(float(expected), rel=1e-12)
    assert estimate.num_products == 9 + 5


@pytest.mark.parametrize("k", [1, 2, 7])
def test_xtrace_is_its_definition(k):
    """Epperly et al. 2024, with the complement's probes scaled to √(n − k + 1)."""
    a = with_eigenvalues(DECAYING) - 0.3 * wigner(60)
    omega = Rows(product(a), like(60)).normals(k, seeded(3)).T
    terms = []
    for i in range(k):
        others = [j for j in range(k) if j != i]
        q = torch.linalg.qr(a @ omega[:, others])[0]
        outside = omega[:, i] - q @ (q.T @ omega[:, i])
        outside = outside * math.sqrt(60 - k + 1) / outside.norm()
        terms.append(float((q.T @ a @ q).trace() + outside @ a @ outside))
    estimate = trace(product(a), like(60), method="xtrace", num_probes=k, generator=seeded(3))
    assert estimate.value == pytest.approx(sum(terms) / k, rel=1e-10)
    if k > 1:
        error = float(torch.tensor(terms, dtype=torch.float64).std()) / math.sqrt(k)
        assert estimate.standard_error == pytest.approx(error, rel=1e-8)
    assert estimate.num_products == 2 * k


@pytest.mark.parametrize(("method", "num_probes"), [("hutch++", 8), ("xtrace", 5)])
def test_a_matrix_of_low_rank_is_exact(method, num_probes):
    a = with_eigenvalues([5.0, 3.0, -2.0] + [0.0] * 37)
    estimate = trace(product(a), like(40), method=method, num_probes=num_probes, generator=seeded())
    assert estimate.value == pytest.approx(6.0, abs=1e-12)
    assert estimate.standard_error < 1e-12


@pytest.mark.parametrize("n", [1, 2, 3])
def test_more_normal_probes_than_dimensions_are_exact(n):
    a = with_eigenvalues([3.0, 2.0, -7.0][:n])
    estimate = trace(product(a), like(n), method="xtrace", num_probes=n + 1, generator=seeded())
    assert estimate.value == pytest.approx(float(a.trace()), abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_zero_has_trace_zero(method):
    zero = torch.zeros(6, 6, dtype=torch.float64)
    estimate = trace(product(zero), like(6), method=method, num_probes=4, generator=seeded())
    assert (estimate.value, estimate.standard_error) == (0.0, 0.0)


def test_a_single_float_has_its_one_entry():
    for method in METHODS:
        estimate = trace(lambda v: [2 * v[0]], [torch.ones(())], method=method, num_probes=2)
        assert estimate.value == pytest.approx(2.0)


@pytest.mark.parametrize("method", METHODS)
def test_bands_hold_the_trace_as_often_as_they_say(method):
    """Of 400 seeds; the binomial's standard deviation at 0.9 is 6, and few terms are not normal."""
    a = with_eigenvalues(DECAYING) + 0.1 * wigner(60)
    exact, held, values = float(a.trace()), 0, []
    operator = in_parts(a)
    for seed in range(400):
        estimate = trace(operator, method=method, num_probes=12, generator=seeded(seed))
        low, high = estimate.band(0.9)
        held += low <= exact <= high
        values.append(estimate.value)
    assert 330 <= held <= 382, held
    spread = torch.tensor(values, dtype=torch.float64)
    assert abs(float(spread.mean()) - exact) < 4 * float(spread.std()) / 20


def test_xtrace_is_far_closer_than_hutchinson_at_equal_products_where_eigenvalues_decay():
    a = with_eigenvalues(DECAYING)
    exact = float(a.trace())

    def error(method: str, num_probes: int) -> float:
        squares = [
            (
                trace(
                    product(a), like(60), method=method, num_probes=num_probes, generator=seeded(s)
                ).value
                - exact
            )
            ** 2
            for s in range(30)
        ]
        return math.sqrt(sum(squares) / len(squares))

    assert error("xtrace", 12) < error("hutch++", 16) / 2 < error("hutchinson", 24) / 10


def test_a_list_of_tensors_is_one_vector_and_each_probe_one_product():
    scale = [torch.full((2, 3), 2.0), torch.tensor(5.0), torch.full((4,), -1.0).bfloat16()]
    calls = []

    def scaled(v):
        calls.append(1)
        return [s * x for s, x in zip(scale, v, strict=True)]

    estimate = trace(scaled, scale, num_probes=3, generator=seeded())
    assert estimate.value == 2 * 6 + 5 - 4
    assert len(calls) == estimate.num_products == 3


@pytest.mark.parametrize(
    ("method", "products"), [("hutchinson", 8), ("hutch++", 12), ("xtrace", 16)]
)
def test_an_operator_is_given_all_probes_at_once(method, products):
    calls = []
    operator = in_parts(with_eigenvalues(DECAYING), num_calls=calls)
    estimate = trace(operator, method=method, num_probes=8, generator=seeded())
    assert sum(calls) == estimate.num_products == products
    assert max(calls) >= 4
    assert len(calls) <= 3


@pytest.mark.parametrize("method", METHODS)
def test_a_product_that_is_not_finite_shows(method):
    estimate = trace(lambda v: [v[0] * math.nan], [torch.ones(3)], method=method, num_probes=2)
    assert math.isnan(estimate.value)
    assert all(map(math.isnan, estimate.band()))


def test_the_same_seed_gives_the_same_estimate_and_leaves_the_global_generator():
    a, before = with_eigenvalues(DECAYING), torch.get_rng_state()
    for method in METHODS:
        one, two = (
            trace(product(a), like(60), method=method, generator=seeded(5)) for _ in range(2)
        )
        assert one == two
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_calls_are_answered_by_name():
    ones = [torch.ones(3)]
    with pytest.raises(ValueError, match="num_probes ≥ 1, got 0"):
        trace(lambda v: v, ones, num_probes=0)
    with pytest.raises(ValueError, match="num_probes ≥ 2, got 1"):
        trace(lambda v: v, ones, method="hutch++", num_probes=1)
    with pytest.raises(ValueError, match="method='girard' is unknown: choose one of 'hutchinson'"):
        trace(lambda v: v, ones, method="girard")
    with pytest.raises(ValueError, match="like is an empty list"):
        trace(lambda v: v, [])
    with pytest.raises(ValueError, match="result of matvec has the shapes"):
        trace(lambda v: [], ones)
    with pytest.raises(TypeError, match="real floating-point"):
        trace(lambda v: v, [torch.ones(3, dtype=torch.int64)])
