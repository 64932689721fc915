"""The classical test functions, and how they are minimised."""

import numpy as np
import pytest
import torch
from hvpopt.experiments.classical import __main__ as table
from hvpopt.experiments.classical import functions
from minimized import METHODS, vector

from hvpopt.minimization import minimize

SMALL = [t for t in functions.all_functions() if t.n <= 100]
STARTS = {  # Moré, Garbow and Hillstrom's tables, and arithmetic
    "Rosenbrock, n = 2": 24.2,
    "extended Rosenbrock, n = 10": 121.0,
    "Himmelblau": 170.0,
    "Beale": 14.203125,
    "Powell singular": 215.0,
    "Powell badly scaled": 1.135262,
    "Meyer, scaled": 1693.6080,
    "Wood": 19192.0,
    "Brown badly scaled": 999998000003.0,
    "Freudenstein-Roth": 400.5,
    "helical valley": 2500.0,
    "Broyden tridiagonal, n = 10": 21.0,
    "saddle quartic": 1.0,
    "monkey saddle": 0.0,
}


@pytest.mark.parametrize("name", STARTS)
def test_the_classical_functions_start_where_the_tables_say(name):
    (function,) = [t for t in functions.all_functions() if t.name == name]
    assert float(function.f(function.x0())) == pytest.approx(STARTS[name], rel=1e-6)


@pytest.mark.parametrize("function", SMALL, ids=lambda t: t.name)
def test_the_classical_minimizers_are_stationary_points_of_the_stated_value(function):
    for minimizer in function.minimizers:
        x = vector(*minimizer).requires_grad_()
        value = function.f(x)
        (gradient,) = torch.autograd.grad(value, x)
        value = value.detach()
        scale = 1e5 if function.name == "Powell badly scaled" else 1.0  # rounded to seven digits
        assert float(value) == pytest.approx(function.minimum, abs=1e-8)
        assert float(gradient.norm()) < 1e-3 * scale


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("function", [t for t in SMALL if t.n < 100], ids=lambda t: t.name)
def test_the_classical_minima_are_found_by_both_methods(function, method):
    found = minimize(function.f, function.x0(), method=method)
    assert found.success
    assert found.status == 0
    assert found.message.startswith("converged")
    if function.name == "Powell badly scaled":  # a curved valley where f and its gradient are tiny
        assert found.fun < 1e-8
        return
    reached = [function.minimum, *function.local_minima]
    assert min(abs(found.fun - value) for value in reached) < 1e-8
    assert found.min_eigenvalue > -1e-6
    x = found.x.clone().requires_grad_()
    value = function.f(x)
    (gradient,) = torch.autograd.grad(value, x)
    assert found.fun == float(value.detach())
    np.testing.assert_allclose(found.jac, gradient, atol=1e-9)
    np.testing.assert_array_equal(function.x0(), vector(*function.start))


@pytest.mark.parametrize(("n", "fewer_than"), [(2, 29), (10, 85), (100, 452)])
def test_rosenbrock_takes_fewer_iterations_than_pytorch_minimizes_trust_ncg(n, fewer_than):
    function = functions.rosenbrock(n)
    found = minimize(function.f, function.x0())
    assert found.nit < fewer_than
    assert found.fun < 1e-13
    np.testing.assert_allclose(found.x, 1.0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "n"), [("trust-ncg", 1000), ("newton-cg", 100)])
def test_rosenbrock_in_many_variables(method, n):
    function = functions.rosenbrock(n)
    found = minimize(function.f, function.x0(), method=method)
    assert found.success
    assert found.fun < 1e-13


@pytest.mark.parametrize("method", METHODS)
def test_it_needs_no_more_iterations_than_scipy_on_the_classical_functions(method):
    """With SciPy's method of the same name, the gradient tolerance ours, and our products."""
    optimize = pytest.importorskip("scipy.optimize")
    ours = theirs = 0
    for function in (functions.beale(), functions.helical_valley(), functions.himmelblau()):

        def value(x, f=function.f):
            return float(f(torch.from_numpy(x)))

        def gradient(x, f=function.f):
            return torch.func.grad(f)(torch.from_numpy(x.copy())).numpy()

        def product(x, p, f=function.f):
            point, direction = torch.from_numpy(x.copy()), torch.from_numpy(p.copy())
            return torch.func.jvp(torch.func.grad(f), (point,), (direction,))[1].numpy()

        options = {"xtol": 1e-10} if method == "newton-cg" else {"gtol": 1.5e-8}
        result = optimize.minimize(
            value, function.start, method=method, jac=gradient, hessp=product, options=options
        )
        found = minimize(function.f, function.x0(), method=method)
        assert found.fun == pytest.approx(result.fun, abs=1e-12)
        ours, theirs = ours + found.nit, theirs + result.nit
    assert ours <= theirs


def test_the_table_holds_our_figures_and_scipys(capsys, monkeypatch):
    pytest.importorskip("scipy")
    beale = functions.beale()
    monkeypatch.setattr(table, "all_functions", lambda: (beale, functions.rosenbrock(1000)))
    monkeypatch.setattr("sys.argv", ["classical"])
    table.main()
    head, _, row = capsys.readouterr().out.splitlines()
    found = minimize(beale.f, beale.x0())
    assert head.startswith("| function | trust-ncg | newton-cg | SciPy's newton-cg |")
    assert row.startswith(f"| Beale | {found.nit}/{found.nfev}/{found.nhev} {found.fun:.1e} |")
    assert table.cell(3, 4, 5, 0.5, success=False) == "3/4/5 5.0e-01 failed"
