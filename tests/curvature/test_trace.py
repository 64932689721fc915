"""Hutchinson's estimate against exact traces and its own variance formula."""

import itertools
import math

import pytest
import torch

from hvpopt.curvature import trace


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def symmetric(n: int) -> torch.Tensor:
    a = torch.randn(n, n, generator=seeded(7), dtype=torch.float64)
    return (a + a.T) / 2


def test_a_diagonal_matrix_is_exact_with_one_probe():
    diagonal = torch.tensor([3.0, -1.0, 0.5, 8.0], dtype=torch.float64)
    estimate = trace(lambda v: [diagonal * v[0]], [diagonal], num_probes=1, generator=seeded())
    assert estimate.value == 10.5
    assert (estimate.standard_error, estimate.num_products) == (math.inf, 1)


def test_a_diagonal_matrix_has_no_standard_error():
    diagonal = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)
    estimate = trace(lambda v: [diagonal * v[0]], [diagonal], num_probes=5, generator=seeded())
    assert (estimate.value, estimate.standard_error) == (2.5, 0.0)


def test_it_is_unbiased_within_its_standard_error():
    a = symmetric(12)
    estimate = trace(lambda v: [a @ v[0]], [a[0]], num_probes=4000, generator=seeded())
    assert abs(estimate.value - float(a.trace())) < 3 * estimate.standard_error


def test_the_standard_error_is_that_of_the_variance_formula():
    a = symmetric(12)
    estimate = trace(lambda v: [a @ v[0]], [a[0]], num_probes=4000, generator=seeded())
    variance = 2 * float((a**2).sum() - (a.diagonal() ** 2).sum())
    assert estimate.standard_error == pytest.approx(math.sqrt(variance / 4000), rel=0.05)


def test_the_mean_over_all_sign_vectors_is_the_trace(monkeypatch):
    a = symmetric(4)
    signs = itertools.product([-1.0, 1.0], repeat=4)
    monkeypatch.setattr(
        "hvpopt.trees.rademacher_like",
        lambda like, generator: [torch.tensor(next(signs), dtype=torch.float64)],
    )
    estimate = trace(lambda v: [a @ v[0]], [a[0]], num_probes=16)
    assert estimate.value == pytest.approx(float(a.trace()), abs=1e-12)


def test_a_list_of_tensors_is_one_vector_and_each_probe_one_product():
    scale = [torch.full((2, 3), 2.0), torch.tensor(5.0), torch.full((4,), -1.0).bfloat16()]
    calls = []

    def product(v):
        calls.append(1)
        return [s * x for s, x in zip(scale, v, strict=True)]

    estimate = trace(product, scale, num_probes=3, generator=seeded())
    assert estimate.value == 2 * 6 + 5 - 4
    assert len(calls) == estimate.num_products == 3


def test_a_product_that_is_not_finite_shows():
    estimate = trace(lambda v: [v[0] * math.nan], [torch.ones(3)], num_probes=2)
    assert math.isnan(estimate.value)


def test_bad_calls_are_answered_by_name():
    like = [torch.ones(3)]
    with pytest.raises(ValueError, match="num_probes ≥ 1, got 0"):
        trace(lambda v: v, like, num_probes=0)
    with pytest.raises(ValueError, match="like is an empty list"):
        trace(lambda v: v, [])
    with pytest.raises(ValueError, match="result of matvec has the shapes"):
        trace(lambda v: [], like)
    with pytest.raises(TypeError, match="real floating-point"):
        trace(lambda v: v, [torch.ones(3, dtype=torch.int64)])
