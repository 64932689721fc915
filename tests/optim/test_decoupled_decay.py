"""Weight decay that stays out of the objective, as in AdamW."""

import math

import pytest
import torch
from problems import closure_of
from torch import nn

import hvpopt
from hvpopt.optim.report import Outcome
from hvpopt.solvers.stopping import ResidualNorm

STOP = ResidualNorm(rtol=1e-13)
MAKE = {
    "newton_cg": lambda groups, **options: hvpopt.NewtonCG(
        groups, damping=0.5, curvature="hessian", cg_stop=STOP, decoupled_weight_decay=True,
        **options,
    ),
    "trust_region": lambda groups, **options: hvpopt.TrustRegionNewtonCG(
        groups, radius=100.0, cg_stop=STOP, decoupled_weight_decay=True, **options
    ),
}  # fmt: skip
DAMPING = {"newton_cg": 0.5, "trust_region": 0.0}
both = pytest.mark.parametrize("name", MAKE)


def quadratic():
    torch.manual_seed(0)
    root = torch.randn(6, 6).double()
    matrix, centre = root @ root.T + torch.eye(6).double(), torch.randn(6).double()
    a, b = nn.Parameter(torch.ones(2).double()), nn.Parameter(torch.ones(4).double())

    def loss():
        d = torch.cat([a, b]) - centre
        return 0.5 * d @ matrix @ d

    return matrix, centre, a, b, loss


@both
def test_each_group_shrinks_by_its_own_rate_after_a_step_without_decay(name):
    matrix, centre, a, b, loss = quadratic()
    groups = [{"params": [a], "lr": 0.5, "weight_decay": 0.2}, {"params": [b], "weight_decay": 0.1}]
    optimizer = MAKE[name](groups)
    optimizer.step(closure_of(optimizer, loss))
    lr = torch.tensor([0.5] * 2 + [1.0] * 4).double()
    shrink = torch.tensor([1 - 0.5 * 0.2] * 2 + [1 - 0.1] * 4).double()
    damped = matrix + DAMPING[name] * torch.eye(6).double()
    start = torch.ones(6).double()
    newton = -lr * torch.linalg.solve(damped, matrix @ (start - centre))
    torch.testing.assert_close(torch.cat([a, b]).detach(), shrink * (start + newton))
    assert optimizer.last_report.reduction_ratio == pytest.approx(1.0)
    assert optimizer.last_report.objective == pytest.approx(
        float(0.5 * (start - centre) @ matrix @ (start - centre))
    )


@both
def test_a_full_batch_is_known_again_after_the_decay(name):
    *_, a, b, loss = quadratic()
    optimizer = MAKE[name]([a, b], weight_decay=0.1)
    for _ in range(4):
        optimizer.step(closure_of(optimizer, loss))
        assert math.isnan(optimizer.last_report.slope_ratio)


@both
def test_a_decay_costs_one_evaluation_and_none_where_there_is_none(name):
    counts = []
    for decay in (0.0, 0.1):
        *_, a, b, loss = quadratic()
        optimizer = MAKE[name]([a, b], weight_decay=decay)
        optimizer.step(closure_of(optimizer, loss))
        counts.append(optimizer.last_report.num_closure_runs)
    assert counts[1] == counts[0] + 1


@both
def test_a_step_that_is_rejected_or_fails_decays_nothing(name):
    w = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = MAKE[name]([w], weight_decay=0.5, max_evaluations=2)
    before, wall = w.detach().clone(), 100.0

    def loss():
        moved = not torch.equal(w.detach(), before)
        return (w**2).sum() + (wall if moved else 0.0)

    optimizer.step(closure_of(optimizer, loss))
    assert optimizer.last_report.outcome is Outcome.REJECTED
    assert torch.equal(w, before)
    optimizer.step(closure_of(optimizer, lambda: (w**2).sum() * math.nan))
    assert torch.equal(w, before)
    wall = 0.0
    optimizer.step(closure_of(optimizer, loss))
    assert optimizer.last_report.outcome is Outcome.STEPPED


@both
def test_unused_parameters_and_a_learning_rate_of_zero_stay(name):
    w, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = MAKE[name]([w, unused], weight_decay=0.5)
    optimizer.step(closure_of(optimizer, lambda: ((w - 3) ** 2).sum()))
    assert unused.tolist() == [1.0, 1.0]
    still = nn.Parameter(torch.ones(2))
    optimizer = MAKE[name]([still], lr=0.0, weight_decay=0.5)
    optimizer.step(closure_of(optimizer, lambda: ((still - 3) ** 2).sum()))
    assert still.tolist() == [1.0, 1.0]


@both
def test_the_flag_is_a_flag(name):
    w = nn.Parameter(torch.ones(2))
    cls = hvpopt.NewtonCG if name == "newton_cg" else hvpopt.TrustRegionNewtonCG
    with pytest.raises(ValueError, match="decoupled_weight_decay='yes': expected True or False"):
        cls([w], decoupled_weight_decay="yes")
