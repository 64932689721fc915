"""The two forms in which operators are given, and the random probes."""

import pytest
import scipy.stats
import torch
from spectra import in_parts, joined, like, product, seeded, with_eigenvalues

from hvpopt.curvature import trace
from hvpopt.curvature.bands import ScalarEstimate, band_factor
from hvpopt.operators import LinearOperator
from hvpopt.solvers.rows import Rows

VALUES = [4.0, 3.0, 1.0, 0.5, 0.0, -1.0, -2.0, 7.0]


def test_an_operator_and_its_product_give_the_same_rows():
    a = with_eigenvalues(VALUES)
    rows = torch.randn(3, 8, generator=seeded(), dtype=torch.float64)
    for read in (Rows(in_parts(a)), Rows(product(a), like(8)), Rows(in_parts(a), in_parts(a).like)):
        torch.testing.assert_close(read.products(rows), rows @ a)
        torch.testing.assert_close(read.products(rows[:1]), rows[:1] @ a)
        assert read.num_products == 4


def test_more_rows_than_go_at_once_are_split(monkeypatch):
    monkeypatch.setattr("hvpopt.solvers.rows._AT_ONCE", 17)
    monkeypatch.setattr("hvpopt.solvers.rows._AT_MOST", 17)
    calls = []
    a = with_eigenvalues(VALUES)
    read = Rows(in_parts(a, num_calls=calls))
    rows = torch.randn(5, 8, generator=seeded(), dtype=torch.float64)
    torch.testing.assert_close(read.products(rows), rows @ a)
    assert calls == [2, 2, 1]
    estimate = trace(in_parts(a), num_probes=5, generator=seeded())
    monkeypatch.undo()
    assert trace(in_parts(a), num_probes=5, generator=seeded()).value == pytest.approx(
        estimate.value
    )


def test_probes_of_signs_are_signs_independent_and_fair():
    signs = Rows(product(torch.eye(70)), [torch.zeros(70)]).signs(4000, seeded())
    assert signs.shape == (4000, 70)
    assert signs.dtype == torch.float32
    assert torch.equal(signs.abs(), torch.ones_like(signs))
    covariance = signs.T @ signs / 4000 - torch.eye(70)
    assert float(covariance.abs().max()) < 5 / 4000**0.5
    assert float(signs.mean(0).abs().max()) < 5 / 4000**0.5
    along_time = (signs[1:] * signs[:-1]).mean(0)
    assert float(along_time.abs().max()) < 5 / 4000**0.5


def test_normal_probes_have_unit_covariance():
    normals = Rows(product(torch.eye(5)), like(5)).normals(20000, seeded())
    torch.testing.assert_close(
        normals.T @ normals / 20000, torch.eye(5, dtype=torch.float64), atol=0.05, rtol=0
    )


def test_lists_of_mixed_shapes_and_dtypes_go_and_return():
    mixed = [torch.zeros(2, 3), torch.zeros((), dtype=torch.float64), torch.zeros(4).bfloat16()]
    read = Rows(lambda v: [2 * x for x in v], mixed)
    rows = torch.arange(22, dtype=torch.float64).reshape(2, 11)
    assert torch.equal(read.products(rows), 2 * rows)
    listed = read.space.listed(rows[0])
    assert [(x.shape, x.dtype) for x in listed] == [(x.shape, x.dtype) for x in mixed]
    assert torch.equal(joined([x.double() for x in listed]), rows[0])


def test_the_bands_factor_is_students():
    for nu in (1, 2, 3, 4, 9, 10, 999):
        for level in (0.5, 0.9, 0.95, 0.999):
            expected = scipy.stats.t.ppf((1 + level) / 2, nu)
            assert band_factor(level, nu) == pytest.approx(expected, rel=1e-9)
    assert band_factor(0.95, 10**9) == pytest.approx(1.96, rel=1e-3)
    assert ScalarEstimate(1.0, 0.5, 3, 2).band(0.9) == pytest.approx((1 - 1.46, 1 + 1.46), abs=1e-3)


def test_bad_operators_are_answered_by_name():
    a = with_eigenvalues(VALUES)
    with pytest.raises(TypeError, match="give like=, such as the parameters, or a LinearOperator"):
        trace(product(a))
    with pytest.raises(TypeError, match="operator is a Tensor; expected a LinearOperator"):
        trace(a)
    with pytest.raises(ValueError, match="leave like out beside a LinearOperator"):
        trace(in_parts(a), like(8))
    with pytest.raises(ValueError, match="not symmetric"):
        trace(LinearOperator(like(8), product(a), symmetric=False))
    for level in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"level in \(0, 1\)"):
            ScalarEstimate(1.0, 0.5, 3, 2).band(level)
