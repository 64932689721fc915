"""Forcing terms, line search, rounding and endings, each alone."""

import math

import pytest
import torch
from minimized import METHODS, rosenbrock, vector

from hvpopt.minimization import minimize
from hvpopt.minimization.forcing import Forcing
from hvpopt.minimization.line_search import Ray, search
from hvpopt.minimization.objective import Objective
from hvpopt.minimization.result import Ending


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


def test_every_ending_is_a_sentence_and_only_convergence_is_success():
    assert all(len(ending.sentence.split()) > 3 for ending in Ending if ending.code != 7)
    assert {ending for ending in Ending if ending.code == 0} == {Ending.CONVERGED, Ending.ROUNDING}


def test_noise_is_that_of_the_least_precise_dtype():
    objective = Objective(lambda x: x.float().sum(), vector(1.0), (), None)
    assert objective.rounding == torch.finfo(torch.float64).eps
    objective.expand(objective.start)
    assert objective.rounding == torch.finfo(torch.float32).eps
