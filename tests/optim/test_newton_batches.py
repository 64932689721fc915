"""Newton-CG from one mini-batch to the next: the length of steps, the damping, when CG stops."""

import math

import pytest
import torch
import torch.nn.functional as F
from problems import closure_of
from test_newton_parts import EXACT
from torch import nn

import hvpopt
from hvpopt.optim.damping import balanced_radius, balanced_scale, damping_after
from hvpopt.optim.step import Step
from hvpopt.solvers.stopping import ResidualNorm


def test_on_other_batches_steps_follow_their_slope_along_the_last_step():
    torch.manual_seed(0)
    x, y = torch.randn(2, 20, 4, dtype=torch.float64), torch.randn(2, 20, dtype=torch.float64)
    w = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = hvpopt.NewtonCG([w], damping=0.5, weight_decay=0.1, **EXACT)

    def loss(i):
        return F.mse_loss(x[i] @ w, y[i])

    def gradient(i, at):
        return 2 * x[i].T @ (x[i] @ at - y[i]) / 20 + 0.1 * at

    before = w.detach().clone()
    optimizer.step(closure_of(optimizer, lambda: loss(0)))
    first = optimizer.last_report
    assert math.isnan(first.slope_ratio)
    assert first.reduction_ratio == pytest.approx(1.0)  # a quadratic
    step = w.detach() - before
    expected = float(gradient(1, w.detach()) @ step) / float(gradient(0, before) @ step)
    damping = optimizer.param_groups[0]["damping"]
    assert damping == pytest.approx(0.5 / 1.5)
    optimizer.step(closure_of(optimizer, lambda: loss(1)))
    report = optimizer.last_report
    assert report.slope_ratio == pytest.approx(expected)
    assert report.step_scale == pytest.approx(2.0 ** max(expected + 0.02, -2.0))  # a first one
    assert report.step_scale < 1
    newton = torch.linalg.solve(
        2 * x[1].T @ x[1] / 20 + (0.1 + damping) * torch.eye(4, dtype=torch.float64),
        0.9 * damping * step - gradient(1, before + step),
    )
    torch.testing.assert_close(w.detach() - before - step, report.step_scale * newton)

    optimizer.step(closure_of(optimizer, lambda: loss(1)))
    assert math.isnan(optimizer.last_report.slope_ratio)  # the same batch again


def test_the_scale_of_steps_follows_slopes_between_bounds():
    assert balanced_scale(0.5, math.nan, 3) == 0.5
    assert balanced_scale(0.5, -0.02, 3) == 0.5  # too far by what is tolerated
    assert balanced_scale(0.5, 0.5, 3, overshoot=0.1) == 0.5 * 2**0.3  # over the root of four
    assert balanced_scale(0.5, 1.0, 3) == 0.5 * 2**0.5
    assert balanced_scale(0.5, 1.0, 10**6) == 0.5 * 2**0.1
    assert balanced_scale(0.5, 1.0, 10**6, gain=0.2) == 0.5 * 2**0.2
    assert balanced_scale(0.5, -1e9, 3) == 0.125  # went too far
    assert balanced_scale(0.5, 1e9, 0) == 1.0
    assert balanced_scale(0.9, 1.0, 0) == 1.0  # and no further
    assert balanced_scale(0.5, -1.0, 3, gain=0.0) == 0.5


def test_on_other_batches_the_damping_falls_slowly_to_a_limit_and_grows_at_once():
    assert damping_after(1.0, 0.9, 0.0, 1, 2.0) == 0.5
    assert damping_after(1.0, 0.9, 0.0, 4, 2.0) == pytest.approx(2**-0.5)
    assert damping_after(1.0, 0.9, 0.0, 10**6, 2.0) == pytest.approx(2**-0.25)
    assert damping_after(1.0, 0.9, -0.5, 1, 2.0) == 1.0  # the last step went too far
    assert damping_after(1.0, 0.6, 0.5, 1, 2.0) == 1.0
    assert damping_after(1.0, 0.4, 0.5, 9, 2.0) == 4.0  # the model is wrong
    assert damping_after(1.0, 0.9, -1.5, 9, 2.0) == 4.0
    assert damping_after(1.0, -math.inf, 1.0, 9, 2.0) == 4.0
    assert damping_after(1.0, math.nan, 0.0, 9, 2.0) == 1.0
    assert damping_after(1e-3, 0.9, 0.0, 1, 2.0, 9e-4) == 9e-4
    assert damping_after(0.0, 0.1, -9.0, 1, 1.0) == 0.0


def test_on_the_same_batch_the_damping_grows_faster_than_it_falls():
    assert damping_after(1.0, 0.9, math.nan, 0, 2.0, 0.8) == 0.5
    assert damping_after(1.0, 0.4, math.nan, 9, 2.0) == 1.0
    assert damping_after(1.0, 0.1, math.nan, 9, 2.0) == 4.0
    assert damping_after(0.0, 0.1, math.nan, 9, 1.0) == 0.0


def test_the_radius_balances_slopes():
    assert balanced_radius(2.0, math.nan) == 2.0
    assert balanced_radius(2.0, 0.0) == 2.0
    assert balanced_radius(1.0, -50.0, factor=2.0) == 0.5  # went too far
    assert balanced_radius(1.0, 5.0, factor=32.0) == 2.0
    assert balanced_radius(1e30, 1.0) == 1e30


def test_on_noisy_batches_steps_become_short_and_the_parameters_settle():
    """Linear regression with batches as small as its dimension, where each batch can be fitted."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    truth, w = draw(8), nn.Parameter(torch.zeros(8, dtype=torch.float64))
    optimizer = hvpopt.NewtonCG([w])
    errors, dampings, scales = [], [], []
    for _ in range(300):
        x = draw(8, 8)
        y = x @ truth + draw(8)
        optimizer.step(closure_of(optimizer, lambda: F.mse_loss(x @ w, y)))  # noqa: B023
        errors.append(float((w.detach() - truth).norm()))
        dampings.append(optimizer.last_report.damping)
        scales.append(optimizer.last_report.step_scale)
    assert max(errors[-50:]) < 1.0 < float(truth.norm())
    assert max(scales[-100:]) < 0.2 < scales[0]
    assert min(dampings) == pytest.approx(3e-4 * dampings[0])
    assert dampings[-1] < 10 * min(dampings)


def step_of(state, grad):
    """A step at a point with this gradient, on a batch whose loss is new to it."""
    objective = type("At", (), {"value": 1.0, "eps": 1e-16, "grad": [grad]})()
    return Step(objective, [state], None, None)


def test_slopes_count_by_how_far_their_steps_went():
    """s = g′ᵀp over the mean gᵀp: steps that hardly moved do not outvote the others."""
    g, p = torch.tensor([2.0, 0.0]).double(), torch.tensor([3.0, 1.0]).double()
    state = {"objective": 9.0, "slope": -8.0, "update": p}
    assert step_of(state, g).mean_slope_ratio() == pytest.approx(6 / -8)
    state.update(num_batches=1, slope=-0.001)
    mean = (0.95 * -8.0 + -0.001) / 1.95
    assert step_of(state, g).mean_slope_ratio() == pytest.approx(6 / mean)
    before = dict(state)
    state["slope"] = 0.0  # after a rejected step
    assert math.isnan(step_of(state, g).mean_slope_ratio())
    state.update(slope=-8.0, objective=1.0)  # the same batch
    assert math.isnan(step_of(state, g).mean_slope_ratio())
    assert state["slopes"] == before["slopes"]


def test_a_much_longer_direction_than_the_last_ones_is_cut():
    """Batches ½ ‖w − c‖², whose Newton steps go to c."""
    targets = torch.randn(30, 2, generator=torch.Generator().manual_seed(0)).double()
    targets[20] *= 1e4
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = hvpopt.NewtonCG(
        [w], damping=0.0, damping_factor=1.0, scale_gain=0.0, curvature="hessian", **EXACT
    )
    at, usual = w.detach().clone(), None
    for i, c in enumerate(targets):
        size = float((c - at).norm())
        usual = size if usual is None else usual
        cut = min(1.0, 2 * usual / size) if i > 0 else 1.0
        usual = usual**0.9 * (cut * size) ** 0.1
        at = at + cut * (c - at)
        optimizer.step(closure_of(optimizer, lambda: 0.5 * (w - c).square().sum()))  # noqa: B023
        torch.testing.assert_close(w.detach(), at)
        assert optimizer.last_report.step_scale == pytest.approx(cut)
    assert float(at.norm()) < 10


def test_a_full_batch_is_never_cut():
    """Its directions grow and shrink with the progress, but are remembered for a first batch."""
    assert step_of({}, torch.ones(1)).cut(1.0) == 1.0
    state = {"usual": 1.0}
    assert step_of(state, torch.ones(1)).cut(1e6) == 1.0
    assert state["usual"] == pytest.approx(1e6**0.1)
    assert step_of({"usual": 1.0, "num_batches": 1}, torch.ones(1)).cut(0.0) == 1.0


def test_cg_does_not_solve_for_a_batchs_noise():
    """Martens' rule takes eleven steps at the least; with a rule of one's own nothing changes."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 40, 30).double(), torch.randn(2, 40).double()
    for stop, late in ((None, range(1, 8)), (ResidualNorm(rtol=1e-9), range(20, 60))):
        w = nn.Parameter(torch.zeros(30, dtype=torch.float64))
        optimizer = hvpopt.NewtonCG([w], preconditioner=None, warm_start=0.0, cg_stop=stop)
        for i in (0, 1):
            optimizer.step(closure_of(optimizer, lambda: F.mse_loss(x[i] @ w, y[i])))  # noqa: B023
            report = optimizer.last_report
            assert report.cg_steps > 10 if i == 0 else report.cg_steps in late
