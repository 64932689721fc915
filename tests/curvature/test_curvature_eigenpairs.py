"""Eigenpairs, condition numbers, curvature along directions and alignment, for operators."""

import math

import numpy as np
import pytest
import torch
from spectra import in_parts, joined, like, product, seeded, wigner, with_eigenvalues

from hvpopt.curvature import (
    alignment,
    bottom_eigenpairs,
    condition_number,
    directional_curvature,
    extreme_eigenpairs,
    top_eigenpairs,
)
from hvpopt.solvers import Status

VALUES = [-5.0, -3.0, *np.linspace(-1, 1, 30), 2.0, 4.0]


def test_an_operator_needs_no_like_and_a_product_takes_it_in_either_place():
    a = with_eigenvalues(VALUES)
    for arguments in ({}, {"like": in_parts(a).like}):
        top = top_eigenpairs(in_parts(a), **arguments, generator=seeded(), rtol=1e-9)
        assert top.values[0] == pytest.approx(4.0)
        assert [x.shape for x in top.vectors[0]] == [(2, 2), (), (29,)]
    assert top_eigenpairs(product(a), like(34), 2).values == pytest.approx((4.0, 2.0), rel=1e-4)
    bottom = bottom_eigenpairs(product(a), like=like(34), k=2)
    assert bottom.values == pytest.approx((-5.0, -3.0), rel=1e-4)


def test_the_ends_are_the_negatives_of_the_negatives():
    a = with_eigenvalues(VALUES)
    top, bottom = extreme_eigenpairs(in_parts(a), num_bottom=3, rtol=1e-9, generator=seeded())
    mirrored = top_eigenpairs(in_parts(-a), k=3, rtol=1e-9, generator=seeded())
    np.testing.assert_allclose(bottom.values, -np.array(mirrored.values), atol=1e-9)
    assert top.values[0] == pytest.approx(4.0)


def test_several_starts_go_through_the_operator_together():
    calls = []
    top_eigenpairs(in_parts(with_eigenvalues(VALUES), num_calls=calls), k=3, generator=seeded())
    assert calls[:4] == [3, 3, 3, 3]


def test_the_condition_number_is_the_ratio_of_the_damped_ends():
    a = with_eigenvalues(np.linspace(0, 9, 40))
    for damping in (1.0, 0.1):
        found = condition_number(in_parts(a), damping=damping, rtol=1e-6, generator=seeded())
        assert found.value == pytest.approx((9 + damping) / damping, rel=1e-5)
        assert found.largest.values[0] == pytest.approx(9 + damping)
        assert found.smallest.values[0] == pytest.approx(damping, rel=1e-5)
        assert found.status is Status.CONVERGED
    again = condition_number(
        in_parts(a), damping=0.1, generator=seeded(), start=(found.largest, found.smallest)
    )
    assert again.num_products < condition_number(in_parts(a), damping=0.1).num_products


def test_a_matrix_that_is_not_positive_definite_has_an_infinite_condition_number():
    for values in ([1.0, -1.0, 2.0], [0.0, 1.0, 2.0]):
        assert condition_number(product(with_eigenvalues(values)), like(3)).value == math.inf
    assert math.isnan(condition_number(lambda v: [v[0] * math.nan], like(3)).value)
    with pytest.raises(ValueError, match=r"damping=-1\.0 is out of range"):
        condition_number(lambda v: v, like(3), damping=-1.0)


def test_too_few_steps_give_a_lower_bound_and_say_so():
    a = with_eigenvalues(np.linspace(0.001, 9, 100))
    found = condition_number(product(a), like(100), max_steps=10, generator=seeded())
    assert found.status is Status.STEP_LIMIT
    assert found.num_products == 10
    assert 1 < found.value < 9000


def test_curvature_along_a_direction_is_its_rayleigh_quotient_with_an_eigenvalue_near():
    a = wigner(30)
    v = torch.randn(30, generator=seeded(), dtype=torch.float64)
    found = directional_curvature(product(a), [v])
    assert found.value == pytest.approx(float(v @ a @ v / (v @ v)))
    assert found.num_products == 1
    residual = (a @ v - found.value * v).norm() / v.norm()
    assert found.residual_norm == pytest.approx(float(residual))
    assert float((torch.linalg.eigvalsh(a) - found.value).abs().min()) <= found.residual_norm
    values, vectors = torch.linalg.eigh(a)
    exact = directional_curvature(product(a), [1e-100 * vectors[:, 3]])
    assert exact.value == pytest.approx(float(values[3]))
    assert exact.residual_norm < 1e-12


def test_a_direction_for_an_operator_takes_its_shapes():
    a = with_eigenvalues(VALUES)
    operator = in_parts(a)
    ones = [torch.ones_like(x) for x in operator.like]
    assert directional_curvature(operator, ones).value == pytest.approx(float(a.sum()) / 34)
    with pytest.raises(ValueError, match="v has the shapes"):
        directional_curvature(operator, like(34))
    for bad in (0.0, math.nan):
        with pytest.raises(ValueError, match="v is zero or not finite"):
            directional_curvature(product(a), [torch.full((34,), bad)])
    with pytest.raises(TypeError, match="v must hold real floating-point"):
        directional_curvature(product(a), [torch.ones(34, dtype=torch.int64)])


def test_alignment_with_orthonormal_vectors_is_pythagoras():
    q = torch.linalg.qr(torch.randn(9, 4, generator=seeded(), dtype=torch.float64))[0]
    g = 3 * q[:, 0] - 4 * q[:, 1] + 12 * q[:, 3]
    found = alignment([g], [[5 * q[:, i]] for i in range(3)])
    assert found.cosines == pytest.approx((3 / 13, -4 / 13, 0.0), abs=1e-12)
    assert found.share == pytest.approx(25 / 169)
    assert found.num_products == 0


def test_alignment_with_skew_and_repeated_directions_is_the_projection():
    v = torch.randn(12, 3, generator=seeded(), dtype=torch.float64)
    g = torch.randn(12, generator=seeded(1), dtype=torch.float64)
    projection = v @ torch.linalg.lstsq(v, g[:, None]).solution[:, 0]
    expected = float(projection @ projection / (g @ g))
    columns = [[v[:, i]] for i in (0, 1, 2, 0)]
    assert alignment([g], columns).share == pytest.approx(expected)
    assert alignment([v[:, 0]], columns).share == pytest.approx(1.0)


def test_a_quadratics_gradient_descends_into_the_top_eigenvectors_span():
    a = with_eigenvalues([0.01] * 28 + [10.0, 20.0])
    top = top_eigenpairs(product(a), like(30), 2, rtol=1e-8, generator=seeded())
    gradient = a @ torch.ones(30, dtype=torch.float64)
    coordinates = torch.stack([joined(v) for v in top.vectors]) @ gradient
    expected = float((coordinates**2).sum() / (gradient**2).sum())
    assert alignment([gradient], top).share == pytest.approx(expected)
    assert expected > 0.99


def test_bad_calls_for_alignment_are_answered_by_name():
    one = [torch.ones(3)]
    with pytest.raises(ValueError, match="vectors is empty"):
        alignment(one, [])
    with pytest.raises(ValueError, match="gradient is zero or not finite"):
        alignment([torch.zeros(3)], [one])
    with pytest.raises(ValueError, match=r"vectors\[1\] is zero or not finite"):
        alignment(one, [one, [torch.zeros(3)]])
    with pytest.raises(ValueError, match=r"vectors\[0\] has the shapes"):
        alignment(one, [[torch.ones(4)]])
