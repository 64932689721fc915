"""Forcing terms: how accurately each Newton system is solved."""

import copy
import math

import pytest
import torch
from problems import closure_of
from torch import nn

import hvpopt
from hvpopt.optim.report import Outcome
from hvpopt.solvers.stopping import EisenstatWalker, SquareRoot


def smooth():
    """A strictly convex function that is no quadratic, with its derivatives by hand."""
    torch.manual_seed(0)
    root = torch.randn(8, 8).double()
    matrix = root @ root.T + 0.5 * torch.eye(8).double()
    w = nn.Parameter(torch.randn(8).double())

    def loss():
        return 0.5 * w @ matrix @ w + 0.25 * (w**4).sum() + w.sum()

    def grad():
        return matrix @ w.detach() + w.detach() ** 3 + 1

    def hessian():
        return matrix + torch.diag(3 * w.detach() ** 2)

    return w, loss, grad, hessian


def textbook_cg_steps(matrix, b, rtol):
    """How many steps of Hestenes and Stiefel's method the tolerance takes."""
    r, p, steps = b.clone(), b.clone(), 0
    while r.norm() > rtol * b.norm():
        alpha = (r @ r) / (p @ matrix @ p)
        new = r - alpha * matrix @ p
        p = new + (new @ new) / (r @ r) * p
        r, steps = new, steps + 1
    return steps


def test_eisenstat_and_walkers_terms_follow_a_hand_computed_trace():
    rule = EisenstatWalker()
    assert rule.rtol(5.0) == 0.5
    assert rule.rtol(4.0, 5.0, 0.5) == 0.5  # 0.9 · 0.64 = 0.576
    # 0.9 · 0.01 = 0.009, but 0.9 · 0.25 = 0.225 > 0.1
    assert rule.rtol(0.4, 4.0, 0.5) == pytest.approx(0.225)
    # 0.9 · 0.225² = 0.0456, which no longer counts
    assert rule.rtol(0.04, 0.4, 0.225) == pytest.approx(0.009)
    assert rule.rtol(1e-9, 0.04, 0.009) == 1e-12
    assert EisenstatWalker(gamma=0.5, power=1.5).rtol(1.0, 4.0, 0.1) == pytest.approx(0.0625)
    assert EisenstatWalker(cap=0.3).rtol(1.0, 1.0, 0.3) == 0.3


def test_the_square_root_is_capped_and_ends_at_rounding():
    rule = SquareRoot(cap=0.4)
    assert rule.rtol(9.0) == 0.4
    assert rule.rtol(0.04, last_norm=1.0, last_rtol=0.1) == pytest.approx(0.2)
    assert rule.rtol(1e-30) == 1e-12


@pytest.mark.parametrize(
    "make",
    [
        lambda p, stop: hvpopt.NewtonCG(
            p, damping=0.0, damping_factor=1.0, curvature="hessian", warm_start=0.0, cg_stop=stop
        ),
        lambda p, stop: hvpopt.TrustRegionNewtonCG(p, radius=1e6, cg_stop=stop),
    ],
)
@pytest.mark.parametrize("rule", [EisenstatWalker(), SquareRoot()])
def test_each_step_takes_as_many_steps_of_cg_as_its_tolerance_asks_for(make, rule):
    w, loss, grad, hessian = smooth()
    optimizer = make([w], rule)
    last_norm = last_rtol = None
    norms, counts = [], []
    for _ in range(12):
        norms.append(float(grad().norm()))
        if norms[-1] < 1e-9:
            break
        rtol = rule.rtol(norms[-1], last_norm, last_rtol)
        counts.append(textbook_cg_steps(hessian(), -grad(), rtol))
        optimizer.step(closure_of(optimizer, loss))
        assert optimizer.last_report.cg_steps == counts[-1]
        last_norm, last_rtol = norms[-1], rtol
    assert norms[-1] < 1e-9
    assert counts[0] <= 2 < max(counts)  # loose at first
    assert norms[-2] < 1e-2 * norms[-3]  # and fast in the end


def test_trial_solves_of_one_step_share_a_tolerance():
    w, loss, grad, _ = smooth()
    optimizer = hvpopt.NewtonCG([w], curvature="hessian", cg_stop=EisenstatWalker())
    norm = float(grad().norm())
    optimizer.step(closure_of(optimizer, loss))  # calibrates its damping by trial solves
    assert optimizer.state[w]["forcing"] == 0.5
    assert optimizer.state[w]["forcing_norm"] == pytest.approx(norm)


def test_a_resumed_run_goes_on_with_the_tolerance():
    def run(w, optimizer, loss, num_steps):
        for _ in range(num_steps):
            optimizer.step(closure_of(optimizer, loss))

    (w, loss, *_), (v, again, *_) = smooth(), smooth()
    one = hvpopt.NewtonCG([w], curvature="hessian", cg_stop=EisenstatWalker())
    run(w, one, loss, 3)
    two = hvpopt.NewtonCG([v], curvature="hessian", cg_stop=EisenstatWalker())
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    v.data.copy_(w.data)
    run(w, one, loss, 2)
    run(v, two, again, 2)
    assert torch.equal(w, v)
    assert one.last_report.outcome is Outcome.STEPPED
    fresh = hvpopt.NewtonCG([v], curvature="hessian", cg_stop=EisenstatWalker())
    run(v, fresh, again, 1)
    assert fresh.state[v]["forcing"] == 0.5
    assert one.state[w]["forcing"] < 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EisenstatWalker(gamma=0.0), "needs 0 < gamma ≤ 1, got 0.0"),
        (lambda: EisenstatWalker(power=1.0), "needs 1 < power ≤ 2, got 1.0"),
        (lambda: EisenstatWalker(cap=1.0), "EisenstatWalker needs 0 < cap < 1, got 1.0"),
        (lambda: SquareRoot(cap=0.0), "SquareRoot needs 0 < cap < 1, got 0.0"),
        (
            lambda: hvpopt.TrustRegionNewtonCG([nn.Parameter(torch.ones(1))], cg_stop=0.1),
            r"cg_stop=0\.1 is no stopping rule: expected one of hvpopt\.solvers\.stopping",
        ),
    ],
)
def test_what_is_out_of_range_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_gradient_of_nan_gives_no_tolerance_below_rounding():
    assert math.isfinite(EisenstatWalker().rtol(1.0, 0.0, 0.5))
