"""Minima of functions with saddles, without bounds, with walls, kinks and rounding."""

import math

import numpy as np
import pytest
import torch
from hvpopt.experiments.classical import functions
from minimized import METHODS, rosenbrock, vector

from hvpopt.minimization import minimize
from hvpopt.minimization.result import Ending


def test_a_quadratic_takes_one_iteration():
    diagonal = torch.logspace(-1, 2, 8, dtype=torch.float64)
    found = minimize(lambda x: 0.5 * x @ (diagonal * x) - x.sum(), torch.ones_like(diagonal))
    assert (found.nit, found.success) == (1, True)
    np.testing.assert_allclose(found.x, 1 / diagonal, rtol=1e-7)
    assert found.min_eigenvalue == pytest.approx(0.1)


@pytest.mark.parametrize("method", METHODS)
def test_a_saddle_to_which_the_gradient_leads_is_left(method):
    function = functions.saddle_quartic()
    found = minimize(function.f, function.x0(), method=method)
    np.testing.assert_allclose(found.x.abs(), [0.0, math.sqrt(2)], atol=1e-7)
    assert found.success
    assert found.min_eigenvalue == pytest.approx(2.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("f", "x0", "minimum"),
    [
        (lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4, (0.0, 0.0), -1.0),
        (lambda x: torch.cos(x).sum(), (0.0, 0.0, 0.0), -3.0),
        (lambda x: (x**6 - x**4).sum(), (0.0, 0.0), -8 / 27),
        (lambda x: x[0] ** 4 / 4 + x[0] ** 3 / 3 + x[1] ** 2, (0.0, 1.0), -1 / 12),
        (functions.monkey_saddle().f, (0.0, 0.0), -27 / 256),
        (lambda x: x[0] ** 4 - x[1] ** 4 + x[1] ** 6, (0.0, 0.0), -4 / 27),
    ],
    ids=["saddle", "maximum", "flat maximum", "inflection", "monkey saddle", "flat saddle"],
)
def test_a_stationary_start_that_is_no_minimum_moves_on(f, x0, minimum, method):
    found = minimize(f, vector(*x0), method=method)
    assert found.success
    assert found.fun == pytest.approx(minimum, abs=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_a_saddle_that_cannot_be_left_is_no_success(method):
    """f is that of a saddle to second order, but its values forbid every step off it."""

    def f(x):
        wall = 1e3 * x[1].detach().abs()
        return x[0] ** 2 - x[1] ** 2 + wall

    found = minimize(f, vector(1.0, 0.0), method=method)
    assert not found.success
    assert found.status == Ending.SADDLE.code
    assert "saddle point" in found.message
    assert found.min_eigenvalue == pytest.approx(-2.0)


def test_a_fall_without_end_from_a_saddle_is_no_saddle():
    found = minimize(lambda x: x[0] ** 2 - torch.expm1(x[1] ** 2), vector(1.0, 0.0))
    assert (found.success, found.status) == (False, Ending.NOT_FINITE.code)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("f", "x0"),
    [
        (lambda x: (vector(1.0, 2.0) * x).sum(), (0.0, 0.0)),
        (lambda x: -(x**2).sum(), (1.0, 1.0)),
        (lambda x: -(x**2).sum(), (0.0, 0.0)),
        (lambda x: -(x**4).sum(), (1.0, 1.0)),
        (lambda x: (x**3).sum(), (1.0, 1.0)),
    ],
    ids=["linear", "concave", "maximum", "quartic", "cubic"],
)
def test_a_function_without_a_lower_bound_is_named(f, x0, method):
    found = minimize(f, vector(*x0), method=method)
    assert (found.success, found.status) == (False, Ending.UNBOUNDED.code)
    assert "unbounded below" in found.message
    assert math.isfinite(found.fun)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("f", [lambda x: 0 * x.sum() + 3, lambda x: torch.tensor(3.0)])
def test_a_constant_is_at_its_minimum_everywhere(f, method):
    found = minimize(f, vector(1.0, 2.0), method=method)
    assert (found.success, found.nit, found.fun) == (True, 0, 3.0)
    assert found.min_eigenvalue == 0.0


def backwards(x):
    """Σ x, whose gradient is −1 to autograd."""
    return (2 * x.detach() - x + (x - x.detach()) ** 2).sum()


@pytest.mark.parametrize(
    ("f", "x0", "method"),
    [
        (backwards, (3.0,), "trust-ncg"),
        (backwards, (3.0,), "newton-cg"),
        (lambda x: x.abs().sum() + x[0] ** 2, (1.0, 2.0), "newton-cg"),
    ],
    ids=["wrong gradient, trust-ncg", "wrong gradient, newton-cg", "kink, newton-cg"],
)
def test_a_stalled_run_is_no_success(f, x0, method):
    found = minimize(f, vector(*x0), method=method)
    assert (found.success, found.status) == (False, Ending.STALLED.code)
    assert "stalled: no step decreases f" in found.message
    assert found.fun <= float(f(vector(*x0)))


@pytest.mark.parametrize("method", METHODS)
def test_rounding_in_f_does_not_stop_it_before_the_gradient_is_small(method):
    for shift in (1e6, 1e10):
        found = minimize(lambda x, s=shift: rosenbrock(x) + s, vector(-1.2, 1.0), method=method)
        assert found.success
        np.testing.assert_allclose(found.x, 1.0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_it_ends_where_the_model_promises_less_than_the_rounding_of_f(method):
    """The gradient's own rounding is far above the tolerance."""
    found = minimize(lambda x: 1e12 * rosenbrock(x) + 1.0, vector(-1.2, 1.0), method=method)
    assert found.success
    np.testing.assert_allclose(found.x, 1.0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("f", "x0", "minimizer"),
    [
        (lambda x: (x - x.log()).sum(), (10.0, 0.1), 1.0),
        (lambda x: (x.sqrt() + 1 / x).sum(), (100.0,), 4 ** (1 / 3)),
        (lambda x: torch.where(x < 3, math.inf, (x - 4) ** 2).sum(), (300.0,), 4.0),
    ],
    ids=["log", "sqrt", "wall"],
)
def test_steps_into_what_is_not_finite_are_shortened(f, x0, minimizer, method):
    found = minimize(f, vector(*x0), method=method)
    assert found.success
    np.testing.assert_allclose(found.x, minimizer, rtol=1e-6)


class NanGradient(torch.autograd.Function):
    """The identity, whose gradient is NaN below −1/2."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.where(x < -0.5, math.nan, g)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_to_a_gradient_that_is_not_finite_is_shortened(method):
    f = lambda x: (NanGradient.apply(x) ** 4).sum() / 4 + (x**2).sum() / 200 + x.sum() / 20  # noqa: E731
    found = minimize(f, vector(2.0), method=method)
    assert math.isfinite(found.fun)
    assert torch.isfinite(found.jac).all()
    assert float(found.x) >= -0.5
    assert found.success
    below = minimize(
        lambda x: NanGradient.apply(x).sum() + x.sum() ** 2, vector(1.0), method=method
    )
    assert not below.success or float(below.x) >= -0.5


@pytest.mark.parametrize("method", METHODS)
def test_a_product_that_is_not_finite_is_a_clean_failure(method):
    """|x − c|^1.5 has a gradient at c, but its second derivative is infinite."""
    start = vector(1.0, 2.0)

    def f(x):
        return (x**2).sum() + (x * (x - x.detach()).abs() ** 1.5).sum()

    found = minimize(f, start, method=method)
    assert (found.success, found.nit) == (False, 0)
    assert found.status == Ending.NOT_FINITE.code
    assert torch.equal(found.x, start)


def test_float32_converges_to_the_precision_of_float32():
    for method in METHODS:
        found = minimize(rosenbrock, torch.tensor([-1.2, 1.0]), method=method)
        assert found.success
        assert found.x.dtype == torch.float32
        np.testing.assert_allclose(found.x, 1.0, atol=2e-3)


def test_a_function_that_differentiates_inside_is_minimised():
    def f(p):
        x = torch.linspace(0, 1, 9, dtype=torch.float64).requires_grad_()
        u = p[0] * x + p[1] * x**2
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return ((slope - x.cos()) ** 2).mean()

    for method in METHODS:
        assert minimize(f, vector(0.0, 0.0), method=method).success
