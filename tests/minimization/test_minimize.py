"""The call of minimize: its counts, limits, callback and structure, and what it leaves behind."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hvpopt.experiments.classical import functions
from minimized import METHODS, rosenbrock, vector

from hvpopt.minimization import MinimizeResult, minimize


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
