"""The first damping, from trial steps."""

import math

import pytest
import torch
from problems import closure_of, problem
from test_newton_parts import EXACT
from torch import nn

import hvpopt
from hvpopt.optim.calibration import calibrated


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(0.1, 1.0), (1.0, 10.0), (1e3, 1e4), (1e-3, 1e-2), (1e9, 1.0), (0.0, 1e-4)],
)
def test_calibration_finds_where_the_model_is_trusted_but_not_timid(scale, expected):
    tried = []

    def ratio(damping):  # as of a model with an unforeseen term of the size ``scale``
        tried.append(damping)
        return damping / (damping + scale)

    found = calibrated(ratio, 1.0)
    assert len(tried) == len(set(tried)) <= 5
    assert found == pytest.approx(expected)


def test_calibration_halves_an_interval_that_it_overshoots_and_stops_at_nan():
    tried = []

    def steep(damping):
        tried.append(damping)
        return 1.0 if damping > 2.0 else -math.inf

    assert calibrated(steep, 1.0) == pytest.approx(math.sqrt(10))
    assert tried == pytest.approx([1.0, 10.0, math.sqrt(10)])
    assert calibrated(lambda damping: math.nan, 3.0) == 3.0
    assert calibrated(lambda damping: -math.inf, 3.0) == 3.0


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_automatic_damping_is_in_the_units_of_the_curvature(scale):
    found = []
    for factor in (1.0, scale):
        task = problem("mlp")
        optimizer = hvpopt.NewtonCG(task.params)
        optimizer.step(closure_of(optimizer, lambda: factor * task.loss(task.net(task.x))))  # noqa: B023
        found.append(optimizer.last_report.damping / factor)
    assert found[1] == pytest.approx(found[0])


def test_automatic_damping_is_found_at_the_first_step_and_adapts_from_there():
    task = problem("mlp")
    start = [p.detach().clone() for p in task.params]
    optimizer = hvpopt.NewtonCG(task.params, damping="auto", **EXACT)
    closure = closure_of(optimizer, lambda: task.loss(task.net(task.x)))
    optimizer.step(closure)
    used = optimizer.last_report.damping
    assert isinstance(optimizer.param_groups[0]["damping"], float)

    for p, before in zip(task.params, start, strict=True):
        p.data.copy_(before)
    same = hvpopt.NewtonCG(task.params, damping=used, **EXACT)
    same.step(closure_of(same, lambda: task.loss(task.net(task.x))))
    assert same.last_report.reduction_ratio > 0.5
    assert same.param_groups[0]["damping"] == optimizer.param_groups[0]["damping"]

    late = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer.add_param_group({"params": [late]})
    assert optimizer.param_groups[1]["damping"] == "auto"
    before = optimizer.param_groups[0]["damping"]
    optimizer.step(closure_of(optimizer, lambda: task.loss(task.net(task.x)) + (late**2).sum()))
    assert optimizer.last_report.damping == before
    assert optimizer.param_groups[1]["damping"] == optimizer.param_groups[0]["damping"]


@pytest.mark.parametrize("lr", [0.0, 0.01])
def test_a_warm_up_does_not_make_the_first_damping_timid_or_bold(lr):
    """A hundredth of a step agrees with any model, and none at all says nothing."""
    found = []
    for first in (lr, 1.0):
        task = problem("mlp")
        optimizer = hvpopt.NewtonCG(task.params, lr=first)
        optimizer.step(closure_of(optimizer, lambda: task.loss(task.net(task.x))))  # noqa: B023
        found.append(optimizer.last_report.damping)
    assert found[0] == found[1]
