"""Deterministic minimisation of functions with known minima, and of awkward ones."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hvpopt.experiments.classical import __main__ as table
from hvpopt.experiments.classical import functions

from hvpopt.minimization import MinimizeResult, minimize
from hvpopt.minimization.forcing import Forcing
from hvpopt.minimization.line_search import Ray, search
from hvpopt.minimization.objective import Objective
from hvpopt.minimization.result import Ending

METHODS = ["trust-ncg", "newton-cg"]
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


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


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


def test_the_counts_are_those_of_the_calls():
    calls = {"plain": 0, "graph": 0}

    def counted(x):
        calls["graph" if torch.is_grad_enabled() and x.requires_grad else "plain"] += 1
        return rosenbrock(x)

    for method in METHODS:
        calls.update(plain=0, graph=0)
        found = minimize(counted, vector(-1.2, 1.0), method=method)
        assert found.njev == calls["graph"] == found.nit + 1
        assert found.nfev == calls["plain"] + calls["graph"]
        assert found.nhev > found.nit


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


@pytest.mark.parametrize("method", METHODS)
def test_a_stalled_run_is_no_success(method):
    """The values rise along the gradient that autograd sees."""
    found = minimize(lambda x: (x - 2 * (x - 1).detach() * x).sum(), vector(3.0), method=method)
    assert not found.success
    found = minimize(lambda x: x.abs().sum() + x[0] ** 2, vector(1.0, 2.0), method=method)
    assert found.success == (float(found.jac.norm()) < 1e-7)


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


def test_pytrees_of_mixed_dtypes_keep_their_structure():
    x0 = {"a": torch.zeros(2, 3, dtype=torch.float64), "b": [torch.tensor(1.0)]}

    def f(p, target):
        return ((p["a"] - target) ** 2).sum() + (p["b"][0].double() + 2) ** 2

    found = minimize(f, x0, args=(5.0,))
    assert found.success
    np.testing.assert_allclose(found.x["a"], 5.0, atol=1e-4)
    np.testing.assert_allclose(found.x["b"][0], -2.0, atol=1e-4)
    assert found.x["b"][0].dtype == torch.float32
    assert found.jac["a"].shape == (2, 3)
    assert float(x0["a"].abs().sum()) == 0.0


def test_limits_are_kept_to_and_named():
    for method in METHODS:
        found = minimize(rosenbrock, vector(-1.2, 1.0), method=method, max_iter=3)
        assert (found.nit, found.success, found.status) == (3, False, 1)
        assert "max_iter" in found.message
        found = minimize(rosenbrock, vector(-1.2, 1.0), method=method, max_products=7)
        assert (found.nhev, found.success) == (7, False)
        assert "max_products" in found.message
        limits = {"max_inner_steps": 1, "max_iter": 20}
        found = minimize(rosenbrock, vector(-1.2, 1.0), method=method, **limits)
        assert found.nhev == found.nit


def test_a_looser_gtol_ends_earlier():
    loose = minimize(rosenbrock, vector(-1.2, 1.0), gtol=1.0)
    assert loose.success
    assert 1e-3 < float(loose.jac.norm()) <= 1.0
    assert loose.nit < minimize(rosenbrock, vector(-1.2, 1.0)).nit


def test_the_callback_sees_each_iteration_and_may_stop():
    seen: list[MinimizeResult] = []

    def callback(result):
        seen.append(result)
        if result.nit == 4:
            raise StopIteration

    found = minimize(rosenbrock, vector(-1.2, 1.0), callback=callback)
    assert [result.nit for result in seen] == [1, 2, 3, 4]
    assert all(np.diff([result.fun for result in seen]) < 0)
    assert (found.nit, found.success, found.status) == (4, False, 99)
    assert dataclasses.replace(seen[-1], status=99, message=found.message) == found
    assert not any(result.success for result in seen)


def test_interrupts_and_errors_of_f_pass_through():
    calls = 0

    def interrupted(x):
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        return rosenbrock(x)

    x0 = vector(-1.2, 1.0)
    with pytest.raises(KeyboardInterrupt):
        minimize(interrupted, x0)
    assert x0.tolist() == [-1.2, 1.0]
    assert torch.is_grad_enabled()
    assert minimize(interrupted, x0).success


def test_it_is_deterministic_and_leaves_the_random_generator_alone():
    state = torch.get_rng_state()
    results = [minimize(functions.monkey_saddle().f, vector(0.0, 0.0), seed=3) for _ in range(2)]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(results[0].x, results[1].x)


def test_no_gradient_is_left_and_no_grad_changes_nothing():
    x0 = vector(-1.2, 1.0).requires_grad_()
    with torch.no_grad():
        without = minimize(rosenbrock, x0)
    found = minimize(rosenbrock, x0)
    assert x0.grad is None
    assert not found.x.requires_grad
    assert torch.equal(found.x, without.x)


@pytest.mark.parametrize("forcing", ["sqrt", "eisenstat-walker", 0.01])
@pytest.mark.parametrize("method", METHODS)
def test_each_forcing_term_converges(forcing, method):
    found = minimize(rosenbrock, vector(-1.2, 1.0, 0.8), method=method, forcing=forcing)
    assert found.success


def test_eisenstat_and_walkers_second_choice_is_theirs():
    class At:
        def __init__(self, grad_norm):
            self.grad_norm = grad_norm

    rule = Forcing("eisenstat-walker")
    assert rule.rtol(At(100.0)) == 0.5
    assert rule.rtol(At(10.0)) == pytest.approx(max(0.9 * 0.01, 0.9 * 0.25))
    assert rule.rtol(At(1.0)) == pytest.approx(0.9 * 0.01)
    assert rule.rtol(At(0.5)) == pytest.approx(0.9 * 0.25)
    assert Forcing("sqrt").rtol(At(9.0)) == 0.5
    assert Forcing("sqrt").rtol(At(0.01)) == pytest.approx(0.1)
    assert Forcing(0.3).rtol(At(0.01)) == 0.3


def test_the_line_search_goes_back_to_the_minimum_of_a_parabola_and_on_by_doubling():
    ray = Ray(value=1.0, slope=-8.0, curvature=8.0, is_newton=True, noise=0.0)
    assert search(lambda t: (1 - 4 * t) ** 2, ray) == pytest.approx(0.25)
    long = Ray(value=0.0, slope=-1.0, curvature=1.0, is_newton=True, noise=0.0)
    assert search(lambda t: -t + 0.02 * t**2, long) == 32.0
    assert search(lambda t: -t, long) is Ending.UNBOUNDED
    assert search(lambda t: t, long) is Ending.STALLED
    assert search(lambda t: math.nan if t > 0.3 else -t, long) <= 0.3


def test_the_line_search_interpolates_by_a_cubic():
    """f' = (t − 0.3) (t + 0.05) / 0.015; f(1) and f(½) are above f(0), the third trial is exact."""
    trials = []

    def cubic(t):
        trials.append(t)
        return (t**3 / 3 - 0.125 * t**2 - 0.015 * t) / 0.015

    ray = Ray(value=0.0, slope=-1.0, curvature=1.0, is_newton=True, noise=0.0)
    assert search(cubic, ray) == pytest.approx(0.3)
    assert trials == [1.0, 0.5, pytest.approx(0.3)]


def test_bad_calls_are_answered_by_name():
    x0 = vector(-1.2, 1.0)
    with pytest.raises(ValueError, match="method='bfgs' is unknown: choose 'trust-ncg' or"):
        minimize(rosenbrock, x0, method="bfgs")
    for name in ("max_iter", "max_products", "max_inner_steps"):
        for bad in (0, -1, 2.5, True):
            with pytest.raises(ValueError, match=f"{name}={bad} is out of range: give an int"):
                minimize(rosenbrock, x0, **{name: bad})
    with pytest.raises(ValueError, match="gtol=0 is out of range: give a positive number"):
        minimize(rosenbrock, x0, gtol=0)
    with pytest.raises(TypeError, match="callback is a int; expected a function"):
        minimize(rosenbrock, x0, callback=3)
    with pytest.raises(ValueError, match="forcing='loose' is unknown: choose 'sqrt'"):
        minimize(rosenbrock, x0, forcing="loose")
    with pytest.raises(ValueError, match=r"forcing=1\.5 is out of range"):
        minimize(rosenbrock, x0, forcing=1.5)
    with pytest.raises(TypeError, match=r"x0 is torch.int64; expected real floating point"):
        minimize(rosenbrock, torch.tensor([1, 2]))
    with pytest.raises(TypeError, match=r"x0 is complex"):
        minimize(rosenbrock, x0.to(torch.complex128))
    with pytest.raises(TypeError, match=r"x0\[0\] is a float; expected a tensor"):
        minimize(rosenbrock, [1.0, 2.0])
    with pytest.raises(ValueError, match="x0 hold no tensor"):
        minimize(rosenbrock, [])
    with pytest.raises(ValueError, match="x0 has no entries"):
        minimize(rosenbrock, torch.zeros(0))
    with pytest.raises(ValueError, match=r"f returned a tensor of shape \(2,\)"):
        minimize(lambda x: x**2, x0)
    with pytest.raises(TypeError, match="f returned a float; expected a scalar tensor"):
        minimize(lambda x: 1.0, x0)
    with pytest.raises(ValueError, match=r"not finite at x0: f\(x0\) = inf"):
        minimize(lambda x: (x**2).sum() * math.inf, x0)
    with pytest.raises(ValueError, match=r"not finite at x0: f\(x0\) = 0.0, .* = inf"):
        minimize(lambda x: x.sqrt().sum(), vector(0.0))


def test_every_ending_is_a_sentence_and_only_convergence_is_success():
    assert all(len(ending.sentence.split()) > 3 for ending in Ending if ending.code != 7)
    assert {ending for ending in Ending if ending.code == 0} == {Ending.CONVERGED, Ending.ROUNDING}


def test_noise_is_that_of_the_least_precise_dtype():
    objective = Objective(lambda x: x.float().sum(), vector(1.0), (), None)
    assert objective.rounding == torch.finfo(torch.float64).eps
    objective.expand(objective.start)
    assert objective.rounding == torch.finfo(torch.float32).eps


def test_a_function_that_differentiates_inside_is_minimised():
    def f(p):
        x = torch.linspace(0, 1, 9, dtype=torch.float64).requires_grad_()
        u = p[0] * x + p[1] * x**2
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return ((slope - x.cos()) ** 2).mean()

    for method in METHODS:
        assert minimize(f, vector(0.0, 0.0), method=method).success


def test_a_fall_without_end_from_a_saddle_is_no_saddle():
    found = minimize(lambda x: x[0] ** 2 - torch.expm1(x[1] ** 2), vector(1.0, 0.0))
    assert (found.success, found.status) == (False, Ending.NOT_FINITE.code)
