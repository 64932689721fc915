"""The line search and the damping rule, by themselves."""

import math

import pytest
import torch.nn.functional as F
from problems import closure_of
from torch import nn

import hvpopt
from hvpopt.lightning.data import Digits
from hvpopt.optim.damping import damping_after, levenberg_marquardt, reduction_ratio
from hvpopt.optim.line_search import armijo


def test_the_damping_follows_the_ratio():
    assert levenberg_marquardt(1.0, 0.2) == 1.5
    assert levenberg_marquardt(1.0, -math.inf) == 1.5
    assert levenberg_marquardt(1.0, 0.5) == 1.0
    assert levenberg_marquardt(1.0, 0.8) == pytest.approx(2 / 3)
    assert levenberg_marquardt(1.0, math.nan) == 1.0
    assert levenberg_marquardt(1.0, 0.8, factor=1.0) == 1.0
    assert levenberg_marquardt(1e-12, 0.9) == 1e-12
    assert levenberg_marquardt(1.0, 0.2, factor=2.0, growth=4.0) == 4.0


def test_the_ratio_tells_rises_noise_and_nonsense_apart():
    assert reduction_ratio(-1.0, -2.0) == 0.5
    assert reduction_ratio(0.1, -2.0) == -math.inf
    assert reduction_ratio(-0.1, 2.0) == -math.inf
    assert reduction_ratio(math.nan, -1.0) == -math.inf
    assert math.isnan(reduction_ratio(1e-9, -1e-9, noise=1e-8))


def test_on_the_same_batch_the_damping_does_not_fall_where_it_has_no_part_in_the_step():
    after = lambda ratio, share: damping_after(1.0, ratio, math.nan, 0, share=share)  # noqa: E731
    assert after(0.9, 0.02) == pytest.approx(2 / 3)
    assert after(0.9, 0.005) == 1.0
    assert after(0.1, 0.005) == 2.25
    assert damping_after(1.0, 0.9, 0.0, 1, share=0.005) == pytest.approx(2 / 3)


def test_logistic_regression_with_a_penalty_converges_by_default():
    """Its Kronecker factors, far from the curvature's, must not lead CG astray as λ falls."""
    x, y = next(iter(Digits(batch_size=300).val_dataloader()))
    x, y = x.flatten(1).double(), y
    layer = nn.Linear(64, 10).double()
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = hvpopt.NewtonCG(layer.parameters())
    loss = lambda: F.cross_entropy(layer(x), y) + 5e-4 * layer.weight.square().sum()  # noqa: E731
    for _ in range(60):
        optimizer.step(closure_of(optimizer, loss))
    assert optimizer.last_report.grad_norm < 3e-5  # 1e-6 and less; it stood still at 8e-4


def test_the_line_search_takes_the_first_sufficient_decrease():
    tried = []

    def evaluate(t):
        tried.append(t)
        return math.nan if t > 0.6 else 1.0 - t + 1.5 * t**2

    found = armijo(evaluate, 1.0, -1.0, sufficient_decrease=0.1)
    # 1 − t + 1.5 t² ≤ 1 − 0.1 t  ⇔  t ≤ 0.6
    assert (found.step, tried) == (0.5, [1.0, 0.5])
    assert found.value == evaluate(0.5)
    assert math.isnan(found.first_value)
    none = armijo(lambda t: 2.0, 1.0, -1.0, max_evaluations=4)
    assert (none.step, none.value, none.num_evaluations) == (0.0, 1.0, 4)


def test_the_line_search_asks_less_of_shorter_steps_and_forgives_rounding():
    values = {1.0: 1.5, 0.5: 1.2, 0.25: 0.97}
    assert armijo(values.__getitem__, 1.0, -1.0, sufficient_decrease=0.1).step == 0.25
    assert armijo(lambda t: 1.0 + 1e-8, 1.0, -1e-12, noise=1e-7).step == 1.0
