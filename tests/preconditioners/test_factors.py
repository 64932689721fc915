"""The inverse of a Kronecker product with a shift, at its limits and at the limits of rounding."""

import pytest
import torch

from hvpopt.preconditioners.factors import Factors


def spd(n, seed=0, groups=1):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(groups, n, n, generator=generator, dtype=torch.float64)
    return root @ root.mT + 0.1 * torch.eye(n).double()


def dense(factors):
    """R ⊗ C of the first group."""
    sides = (torch.diag_embed(f) if f.dim() == 2 else f for f in (factors.rows, factors.columns))
    return torch.kron(*(side[0].contiguous() for side in sides))


@pytest.mark.parametrize("rows", [spd(3), spd(3).diagonal(dim1=-2, dim2=-1)])
@pytest.mark.parametrize("columns", [spd(4, 1), spd(4, 1).diagonal(dim1=-2, dim2=-1)])
def test_factors_multiply_as_their_kronecker_product(rows, columns):
    factors = Factors(rows, columns)
    x = torch.arange(12.0).double().reshape(1, 3, 4)
    torch.testing.assert_close((factors @ x).flatten(), dense(factors) @ x.flatten())


@pytest.mark.parametrize("shift", [1e-14, 1e14])
def test_where_one_of_the_two_is_negligible_the_inverse_is_the_others(shift):
    factors = Factors(spd(3), spd(4, 1))
    expected = torch.linalg.inv(dense(factors) + shift * torch.eye(12))
    error = dense(factors.inverse(shift)) - expected
    assert error.norm() < 1e-5 * expected.norm()


def test_in_between_it_is_below_the_inverse_of_the_sum_by_a_bounded_factor():
    """M = R⊗C + d + τ(R⊗κ + ρ⊗C) with both further terms positive."""
    factors, shift = Factors(spd(3), spd(4, 1)), 2.0
    M = torch.linalg.inv(dense(factors.inverse(shift)))
    more = M - dense(factors) - shift * torch.eye(12)
    rho, kappa = factors.rows[0].trace() / 3, factors.columns[0].trace() / 4
    share = (shift / (rho * kappa)) ** 0.5
    eyes = torch.eye(3).double(), torch.eye(4).double()
    expected = torch.kron(kappa * factors.rows[0], eyes[1])
    expected = expected + torch.kron(eyes[0], rho * factors.columns[0])
    torch.testing.assert_close(more, share * expected)


def test_each_group_has_a_split_of_its_own():
    rows, columns = spd(3, groups=2) * torch.tensor([1.0, 100.0])[:, None, None], spd(4, 1, 2)
    both = Factors(rows, columns).inverse(0.5)
    for g in range(2):
        alone = Factors(rows[g : g + 1], columns[g : g + 1]).inverse(0.5)
        torch.testing.assert_close(both.rows[g], alone.rows[0])
        torch.testing.assert_close(both.columns[g], alone.columns[0])


def test_rounding_that_makes_a_factor_indefinite_is_overcome():
    vectors, _ = torch.linalg.qr(spd(3)[0].float())
    indefinite = (vectors * torch.tensor([1.0, 1e-2, -1e-3])) @ vectors.T
    inverse = Factors(indefinite[None], torch.ones(1, 1)).inverse(0.0).rows[0]
    values = torch.linalg.eigvalsh(inverse.double())
    assert float(values.min()) == pytest.approx(1.0, rel=1e-3)
    assert 1e3 < float(values.max()) < 1e7


def test_factors_whose_product_underflows_leave_the_shift():
    tiny = Factors(1e-24 * spd(3).float(), 1e-24 * spd(4, 1).float())
    torch.testing.assert_close(dense(tiny.inverse(2.0)), torch.eye(12) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_shift_a_singular_factor_is_lifted_above_rounding(dtype):
    one = torch.ones(1, 5, 5, dtype=dtype)
    inverse = Factors(one, one[:, :2, :2]).inverse(0.0)
    for side in (inverse.rows[0], inverse.columns[0]):
        values = torch.linalg.eigvalsh(side)
        assert torch.isfinite(side).all()
        assert float(values.min()) > 0.1
        assert float(values.max()) < 1 / torch.finfo(dtype).eps


@pytest.mark.parametrize("which", ["rows", "columns", "both"])
def test_where_a_factor_vanishes_the_curvature_counts_as_one(which):
    rows = torch.zeros(1, 3, 3) if which != "columns" else spd(3).float()
    columns = torch.zeros(1, 2) if which != "rows" else torch.ones(1, 2)
    torch.testing.assert_close(dense(Factors(rows, columns).inverse(3.0)), torch.eye(6) / 4)
