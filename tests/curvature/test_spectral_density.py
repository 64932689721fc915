"""Spectral densities against the semicircle law, Wishart matrices and dense eigenvalues."""

import math

import numpy as np
import pytest
import torch
from spectra import in_parts, like, product, seeded, wigner, with_eigenvalues

from hvpopt.curvature import effective_dimension, spectral_density
from hvpopt.solvers.rows import Rows


def semicircle_cdf(x: float) -> float:
    x = min(max(x, -2.0), 2.0)
    return 0.5 + x * math.sqrt(4 - x * x) / (4 * math.pi) + math.asin(x / 2) / math.pi


def marchenko_pastur_density(x: np.ndarray, ratio: float) -> np.ndarray:
    """Of X Xᵀ/m with X of n × m normal entries and n/m = ratio < 1."""
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    inside = np.clip((high - x) * (x - low), 0, None)
    return np.sqrt(inside) / (2 * np.pi * ratio * np.clip(x, 1e-12, None))


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_a_random_symmetric_matrix_has_the_semicircle(reorthogonalize):
    density = spectral_density(
        product(wigner(800)),
        like(800),
        num_probes=6,
        num_steps=30,
        reorthogonalize=reorthogonalize,
        generator=seeded(1),
    )
    for x in np.linspace(-1.8, 1.8, 9):
        share = density.share_below(float(x))
        # a node's own weight of 1/30 is what a step function can be off by
        assert abs(share.value - semicircle_cdf(x)) < 0.03
    assert density.range[0] == pytest.approx(-2, abs=0.05)
    assert density.range[1] == pytest.approx(2, abs=0.05)
    grid = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)
    expected = torch.sqrt(4 - grid**2) / (2 * math.pi)
    torch.testing.assert_close(density.evaluate(grid, 0.2), expected, atol=0.04, rtol=0)


def test_a_wishart_matrix_has_the_marchenko_pastur_law():
    x = torch.randn(400, 1600, generator=seeded(), dtype=torch.float64)
    density = spectral_density(
        product(x @ x.T / 1600), like(400), num_probes=8, num_steps=25, generator=seeded()
    )
    grid = torch.linspace(0.5, 2.0, 7, dtype=torch.float64)
    fine = np.linspace(0, 3, 6001)
    law = marchenko_pastur_density(fine, 0.25)
    kernel = np.exp(-(((grid.numpy()[:, None] - fine) / 0.15) ** 2) / 2) / (
        0.15 * math.sqrt(2 * math.pi)
    )
    smoothed = torch.from_numpy(kernel @ law * (fine[1] - fine[0]))
    torch.testing.assert_close(density.evaluate(grid, 0.15), smoothed, atol=0.04, rtol=0)


def test_means_of_polynomials_are_those_of_the_probes():
    """Σⱼ wⱼ θⱼᵈ = zᵀAᵈz / n up to the degree 2m − 1."""
    a = wigner(30)
    for reorthogonalize in (True, False):
        density = spectral_density(
            product(a),
            like(30),
            num_probes=3,
            num_steps=5,
            reorthogonalize=reorthogonalize,
            generator=seeded(2),
        )
        probes = Rows(product(a), like(30)).signs(3, seeded(2))
        for degree in range(10):
            power = torch.linalg.matrix_power(a, degree)
            expected = torch.stack([z @ power @ z / 30 for z in probes])
            found = (density.weights * density.nodes**degree).sum(1)
            torch.testing.assert_close(found, expected)


def test_all_eigenvalues_of_a_small_matrix_are_nodes_with_their_shares_on_average():
    values = [-1.0, 2.0, 2.0, 5.0, 9.0]
    a = with_eigenvalues(values)
    density = spectral_density(product(a), like(5), num_probes=300, generator=seeded())
    mass, edges = density.histogram(torch.tensor([-2.0, 0.0, 3.0, 7.0, 10.0]))
    assert edges.tolist() == [-2.0, 0.0, 3.0, 7.0, 10.0]
    torch.testing.assert_close(mass, torch.tensor([0.2, 0.4, 0.2, 0.2]).double(), atol=0.03, rtol=0)
    assert density.num_products <= 5 * 300
    torch.testing.assert_close(density.weights.sum(1), torch.ones(300).double())


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_a_multiple_of_the_identity_is_one_node(reorthogonalize):
    for factor in (0.0, -3.0):
        density = spectral_density(
            lambda v, factor=factor: [factor * v[0]], like(6), reorthogonalize=reorthogonalize
        )
        assert density.range == pytest.approx((factor, factor))
        assert density.share_below(factor + 1e-9).value == pytest.approx(1.0)
        mass, edges = density.histogram(3)
        assert mass.tolist() == pytest.approx([0.0, 1.0, 0.0])
        assert edges[0] < factor < edges[-1]
        assert density.evaluate(torch.tensor([factor])).isfinite().all()


def test_without_reorthogonalisation_copies_of_an_outlier_share_its_weight():
    a = with_eigenvalues([100.0, *np.linspace(0, 1, 79)]).float()
    like32 = [torch.zeros(80)]
    found = [
        spectral_density(product(a), like32, num_steps=40, reorthogonalize=r, generator=seeded())
        for r in (True, False)
    ]
    outliers = [int((d.nodes[0] > 50).sum()) for d in found]
    assert outliers[0] == 1 < outliers[1]
    for density in found:
        share = 1 - density.share_below(50.0).value
        assert share == pytest.approx(1 - found[0].share_below(50.0).value, rel=1e-4)


def test_the_density_integrates_to_one_and_its_spread_shrinks_with_probes():
    a = wigner(200)
    few, many = (
        spectral_density(product(a), like(200), num_probes=p, num_steps=20, generator=seeded())
        for p in (4, 64)
    )
    grid = torch.linspace(-4, 4, 2001)
    for sigma in (None, 0.1):
        assert float(torch.trapezoid(few.evaluate(grid, sigma), grid.double())) == pytest.approx(
            1, abs=1e-6
        )
    inner = torch.linspace(-1, 1, 21)
    ratio = float(few.spread(inner, 0.2).mean() / many.spread(inner, 0.2).mean())
    assert ratio == pytest.approx(4.0, rel=0.3)
    single = spectral_density(product(a), like(200), num_probes=1, generator=seeded())
    assert bool(single.spread(inner).isinf().all())


def test_a_histogram_holds_all_and_edges_leave_out_what_is_outside():
    density = spectral_density(product(wigner(100)), like(100), generator=seeded())
    mass, edges = density.histogram(10)
    assert len(mass) == 10
    assert len(edges) == 11
    assert float(mass.sum()) == pytest.approx(1.0)
    half, _ = density.histogram(torch.tensor([0.0, 1.0, 3.0]))
    assert float(half.sum()) == pytest.approx(1 - density.share_below(0.0).value)


def test_runs_go_in_step_so_that_an_operator_is_given_all_probes_at_once():
    for reorthogonalize in (True, False):
        calls = []
        density = spectral_density(
            in_parts(wigner(40), num_calls=calls),
            num_probes=5,
            num_steps=8,
            reorthogonalize=reorthogonalize,
        )
        assert calls == [5] * 8
        assert density.num_products == 40


def test_the_mean_of_a_function_is_a_trace_within_its_band():
    values = torch.linspace(0, 3, 300, dtype=torch.float64)
    a = with_eigenvalues(values)
    held = 0
    for seed in range(100):
        density = spectral_density(
            product(a), like(300), num_probes=8, num_steps=20, generator=seeded(seed)
        )
        low, high = density.expectation(torch.exp).band(0.9)
        held += low <= float(values.exp().mean()) <= high
    assert 80 <= held <= 98


def test_the_effective_dimension_is_the_sum_over_eigenvalues():
    values = torch.cat((torch.logspace(2, -4, 60), torch.zeros(40))).double()
    a = with_eigenvalues(values)
    for damping in (0.01, 1.0):
        exact = float((values / (values + damping)).sum())
        found = effective_dimension(
            product(a), like(100), damping=damping, num_probes=30, num_steps=60, generator=seeded()
        )
        assert abs(found.value - exact) < 3 * found.standard_error
        assert found.standard_error < 0.05 * exact
        assert found.num_products == 30 * 60


def test_products_that_are_not_finite_show_in_the_density():
    for reorthogonalize in (True, False):
        density = spectral_density(
            lambda v: [v[0] * math.nan], like(5), reorthogonalize=reorthogonalize
        )
        assert bool(density.nodes.isnan().all())
        assert math.isnan(density.share_below(0.0).value)
    assert math.isnan(effective_dimension(lambda v: [v[0] * math.nan], like(5), damping=1.0).value)


def test_bad_calls_for_densities_are_answered_by_name():
    a = product(torch.eye(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="num_probes=0 is out of range"):
        spectral_density(a, like(3), num_probes=0)
    with pytest.raises(ValueError, match="num_steps=0 is out of range"):
        spectral_density(a, like(3), num_steps=0)
    density = spectral_density(a, like(3))
    with pytest.raises(ValueError, match="sigma > 0, got 0"):
        density.evaluate(torch.zeros(1), 0.0)
    with pytest.raises(ValueError, match="bins=0 is out of range"):
        density.histogram(0)
    with pytest.raises(ValueError, match="edges of bins must ascend"):
        density.histogram(torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"damping=0\.0 is out of range"):
        effective_dimension(a, like(3), damping=0.0)
    with pytest.raises(ValueError, match=r"an eigenvalue of -1 or less, .* take the GGN or Fisher"):
        effective_dimension(product(-torch.eye(3, dtype=torch.float64)), like(3), damping=1.0)
