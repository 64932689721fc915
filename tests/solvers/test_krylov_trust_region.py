"""Trust-region steps in a Krylov space against dense solutions of the subproblem."""

import math

import numpy as np
import pytest
import torch
from matrices import Counted, definite, indefinite, symmetric, vector
from trust_regions import exact, model

from hvpopt.solvers import KrylovTrustRegion, Status, steihaug


@pytest.mark.parametrize("matrix", [definite, indefinite])
@pytest.mark.parametrize("radius", [1e-3, 0.1, 1.0, 3.0, 1e3])
@pytest.mark.parametrize("n", [1, 2, 3, 12])
def test_the_krylov_step_is_the_exact_minimiser(matrix, radius, n):
    a, b = matrix(n), vector(n)
    step = KrylovTrustRegion(Counted(a), [b]).step(radius, rtol=1e-11)
    expected = exact(a, b, radius)
    assert model(a, b, step.value[0]) == pytest.approx(model(a, b, expected), rel=1e-8)
    assert step.predicted_decrease == pytest.approx(-model(a, b, step.value[0]), rel=1e-8)
    assert step.norm == pytest.approx(float(step.value[0].norm()), rel=1e-9)
    assert step.norm <= radius * (1 + 1e-9)
    if radius < 1e3 or matrix is definite:
        np.testing.assert_allclose(step.value[0], expected, rtol=1e-5, atol=1e-9)


def test_it_is_never_worse_than_steihaug_and_often_better():
    gains = []
    for seed in range(10):
        a, b = indefinite(seed=seed), vector(12, seed=seed)
        truncated = steihaug(Counted(a), [b], 2.0)
        krylov = KrylovTrustRegion(Counted(a), [b]).step(2.0, rtol=1e-8)
        gains.append(krylov.predicted_decrease / truncated.predicted_decrease)
    assert min(gains) >= 1 - 1e-9
    assert max(gains) > 1.1


def test_a_smaller_radius_costs_no_product_and_a_larger_one_only_what_is_missing():
    a, b = indefinite(), vector(12)
    operator = Counted(a)
    region = KrylovTrustRegion(operator, [b])
    region.step(1.0, rtol=1e-6)
    products = operator.calls
    step = region.step(0.3, rtol=1e-6)
    assert operator.calls == products == region.num_products == step.num_products
    assert model(a, b, step.value[0]) == pytest.approx(model(a, b, exact(a, b, 0.3)), rel=1e-6)
    region.step(100.0, rtol=1e-6)
    assert products <= operator.calls <= 12


def test_the_nearly_hard_case_goes_to_the_boundary():
    """b has hardly anything along the negative eigenvector, which the solution is made of."""
    a = torch.diag(torch.tensor([-1.0, 1.0, 2.0], dtype=torch.float64))
    b = torch.tensor([1e-9, 1.0, 1.0], dtype=torch.float64)
    step = KrylovTrustRegion(Counted(a), [b]).step(5.0, rtol=1e-10)
    expected = torch.tensor([0.0, 1 / 2, 1 / 3], dtype=torch.float64)
    expected[0] = math.sqrt(25 - float(expected @ expected))
    assert model(a, b, step.value[0]) == pytest.approx(model(a, b, expected), rel=1e-6)
    assert step.status is Status.NEGATIVE_CURVATURE
    low, high = KrylovTrustRegion(Counted(a), [b]).eigenvalue_bounds
    assert math.isnan(low)
    assert math.isnan(high)


def test_a_scaled_region_is_the_plain_one_in_scaled_variables():
    a, b = indefinite(), vector(12)
    d = torch.logspace(-1, 1, 12, dtype=torch.float64)
    step = KrylovTrustRegion(Counted(a), [b], scaling=[d]).step(1.0, rtol=1e-11)
    scaled = exact(a / d[:, None] / d[None, :], b / d, 1.0)
    np.testing.assert_allclose(step.value[0], scaled / d, rtol=1e-6)
    assert step.norm == pytest.approx(float((d * step.value[0]).norm()))


def test_an_infinite_radius_gives_newtons_step_or_an_error():
    a, b = definite(), vector(12)
    step = KrylovTrustRegion(Counted(a), [b]).step(math.inf, rtol=1e-12)
    np.testing.assert_allclose(step.value[0], np.linalg.solve(a, b), rtol=1e-8)
    assert not step.is_on_boundary
    with pytest.raises(ValueError, match="unbounded below: give a finite radius"):
        KrylovTrustRegion(Counted(indefinite()), [b]).step(math.inf)


def test_the_fewest_steps_are_taken_unless_the_space_is_exhausted():
    operator = Counted(torch.eye(5, dtype=torch.float64))
    assert KrylovTrustRegion(operator, [vector(5)]).step(1e3, min_steps=2).num_products == 1
    a = symmetric(torch.linspace(1, 2, 12))
    assert KrylovTrustRegion(Counted(a), [vector(12)]).step(1e3, rtol=0.9).num_steps == 1
    step = KrylovTrustRegion(Counted(a), [vector(12)]).step(1e3, rtol=0.9, min_steps=2)
    assert step.num_steps == 2


def test_bad_calls_of_the_krylov_region_are_answered_by_name():
    a, b = Counted(definite(3)), vector(3)
    with pytest.raises(ValueError, match="max_steps ≥ 1, got 0"):
        KrylovTrustRegion(a, [b], max_steps=0)
    with pytest.raises(ValueError, match="scaling must be positive"):
        KrylovTrustRegion(a, [b], scaling=[-b.abs()])
    with pytest.raises(TypeError, match="real floating-point tensors"):
        KrylovTrustRegion(a, [torch.ones(3, dtype=torch.int64)])
    region = KrylovTrustRegion(a, [b])
    with pytest.raises(ValueError, match="positive radius, got 0"):
        region.step(0.0)
    with pytest.raises(ValueError, match="rtol must be positive, got 0"):
        region.step(1.0, rtol=0.0)
