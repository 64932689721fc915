"""Newton's methods where a step meets what it cannot use: parameters, state and λ stay in order."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from problems import closure_of
from torch import nn

import hvpopt
from hvpopt.closure import ClosureOracle
from hvpopt.optim.report import Outcome
from hvpopt.optim.step import Step
from hvpopt.preconditioners import Jacobi

BOTH = [
    lambda p: hvpopt.NewtonCG(p, curvature="hessian"),
    lambda p: hvpopt.TrustRegionNewtonCG(p),
]


def weight(*values):
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize("make", BOTH)
def test_a_closure_that_skips_a_trial_point_rejects_it_and_nothing_moves(make):
    w = weight(2.0)
    optimizer = make([w])

    def closure():
        optimizer.zero_grad()
        loss = (w**4).sum()
        if w.item() == 2.0:
            loss.backward()
        return loss

    optimizer.step(closure)
    assert w.item() == 2.0
    assert optimizer.last_report.outcome is Outcome.REJECTED


@pytest.mark.parametrize("make", BOTH)
def test_a_fall_to_minus_infinity_is_no_decrease(make):
    w = weight(1.0)
    optimizer = make([w])

    def loss():
        hole = torch.where(w.detach() > 0.5, 0.0, -math.inf)
        return (w**2).sum() + hole.sum()

    optimizer.step(closure_of(optimizer, loss))
    assert math.isfinite(optimizer.last_report.objective_after)
    assert w.item() > 0.5


@pytest.mark.parametrize(
    "make", [lambda p: hvpopt.NewtonCG(p, preconditioner=None), hvpopt.TrustRegionNewtonCG]
)
def test_accumulated_gradients_on_the_same_batches_are_the_same_function(make):
    torch.manual_seed(0)
    x, y = torch.randn(2, 20, 4, dtype=torch.float64), torch.randn(2, 20, dtype=torch.float64)
    w = weight(0.0, 0.0, 0.0, 0.0)
    optimizer = make([w])
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(x[0] @ w, y[0]).backward()

        def closure():
            loss = F.mse_loss(x[1] @ w, y[1])
            loss.backward()
            return loss

        optimizer.step(closure)
        assert math.isnan(optimizer.last_report.slope_ratio)


def test_without_a_likelihood_automatic_preconditioning_is_none():
    torch.manual_seed(0)
    x, y = torch.randn(40, 30, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    steps = []
    for preconditioner in ("auto", None):
        w = nn.Parameter(torch.zeros(30, dtype=torch.float64))
        optimizer = hvpopt.NewtonCG([w], damping=1e-6, preconditioner=preconditioner)
        for _ in range(2):
            optimizer.step(closure_of(optimizer, lambda: F.huber_loss(x @ w, y)))  # noqa: B023
        steps.append((optimizer.last_report.cg_steps, optimizer.param_groups[0]["damping"]))
    assert steps[0] == steps[1]


def test_the_product_of_an_earlier_trace_is_refused():
    w = weight(2.0)

    def closure():
        w.grad = None
        loss = F.mse_loss(w**2, torch.zeros(1, dtype=torch.float64))
        loss.backward()
        return loss

    with ClosureOracle(closure, [w]) as oracle:
        first = oracle.trace("ggn")
        second = oracle.trace("hessian")
        assert second.product([torch.ones_like(w)])[0].item() == pytest.approx(48.0)
        with pytest.raises(RuntimeError, match="later trace"):
            first.product([torch.ones_like(w)])


def test_a_rejected_step_raises_the_damping_however_little_it_missed():
    w = weight(1.0)
    optimizer = hvpopt.NewtonCG(
        [w], damping=1.0, curvature="hessian", max_evaluations=1, sufficient_decrease=0.9
    )
    optimizer.step(closure_of(optimizer, lambda: (w**2).sum()))
    assert optimizer.last_report.outcome is Outcome.REJECTED
    assert optimizer.param_groups[0]["damping"] == 1.5**2


def test_an_interrupt_at_the_end_of_a_step_leaves_the_damping(monkeypatch):
    w = weight(1.0)
    optimizer = hvpopt.NewtonCG([w], damping=1.0, curvature="hessian")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Step, "expect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure_of(optimizer, lambda: (w**2).sum()))
    assert w.item() == 1.0
    assert optimizer.param_groups[0]["damping"] == 1.0


def test_a_learning_rate_of_zero_stays_at_a_saddle():
    w = weight(0.0, 0.0)
    optimizer = hvpopt.NewtonCG([w], lr=0.0, curvature="hessian")
    optimizer.step(closure_of(optimizer, lambda: w[0] ** 2 - w[1] ** 2 + w[1] ** 4))
    assert w.tolist() == [0.0, 0.0]


def test_a_product_that_is_not_finite_leaves_the_radius():
    w = weight(1.0, 2.0)
    optimizer = hvpopt.TrustRegionNewtonCG([w], preconditioner=Jacobi(every=1000), engine="graph")
    broken = False

    def loss():
        extra = ((w - w.detach()).abs() ** 1.5).sum() if broken else 0.0
        return (w**2).sum() + (w**4).sum() + extra

    outcomes = []
    for broken in (False, True, False):  # noqa: B007 (the loss reads it)
        optimizer.step(closure_of(optimizer, loss))
        outcomes.append(optimizer.last_report.outcome)
    assert outcomes == [Outcome.STEPPED, Outcome.NONFINITE_PRODUCT, Outcome.STEPPED]


def net_steps(net, x, y, num_steps=2, between=lambda: None):
    optimizer = hvpopt.NewtonCG(net.parameters())
    for _ in range(num_steps):
        optimizer.step(closure_of(optimizer, lambda: F.cross_entropy(net(x), y)))
        between()
    return optimizer


def test_the_default_serves_int32_tokens_empty_parameters_and_added_matrices():
    torch.manual_seed(0)
    y = torch.tensor([0, 1, 2])

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.P = nn.Embedding(5, 4), nn.Parameter(torch.randn(3, 3))
            self.W, self.empty = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.zeros(0))

        def forward(self, x):
            return torch.addmm(self.P, self.embed(x), self.W.T) + self.empty.sum()

    x = torch.tensor([0, 3, 1], dtype=torch.int32)
    assert net_steps(Odd(), x, y).last_report.outcome is Outcome.STEPPED


def test_freezing_between_steps_regroups_what_is_preconditioned():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    x, y = torch.randn(6, 4), torch.randint(4, (6,))

    def freeze():
        net[0].bias.requires_grad_(False)
        net[2].weight.requires_grad_(False)

    assert net_steps(net, x, y, between=freeze).last_report.outcome is Outcome.STEPPED


def test_factors_come_back_in_their_own_precision():
    torch.manual_seed(0)
    net = nn.Linear(4, 3).bfloat16()
    x, y = torch.randn(8, 4).bfloat16(), torch.randint(3, (8,))
    optimizer = net_steps(net, x, y)
    resumed = hvpopt.NewtonCG(net.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    held = resumed.state[net.weight]["kronecker"]
    before = optimizer.state[net.weight]["kronecker"]
    torch.testing.assert_close(held, before, rtol=0, atol=0)
