import copy
import math

import pytest
import torch
import torch.nn.functional as F
from problems import closure_of, flat, problem
from test_newton_parts import Dense, saddle
from torch import nn

import hvpopt
from hvpopt.optim.report import Outcome
from hvpopt.solvers.result import Status
from hvpopt.solvers.stopping import ResidualNorm

EXACT = {"cg_stop": ResidualNorm(rtol=1e-12)}


def quadratic(seed=0, n=6):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, generator=generator, dtype=torch.float64)
    A = root @ root.T + torch.eye(n, dtype=torch.float64)
    c = torch.randn(n, generator=generator, dtype=torch.float64)
    w = nn.Parameter(torch.zeros(n, dtype=torch.float64))
    return A, c, w, lambda: 0.5 * (w - c) @ A @ (w - c)


def test_a_wide_region_takes_newtons_step_and_keeps_its_radius():
    _A, c, w, loss = quadratic()
    optimizer = hvpopt.TrustRegionNewtonCG([w], radius=100.0, **EXACT)
    optimizer.step(closure_of(optimizer, loss))
    torch.testing.assert_close(w.detach(), c, rtol=0, atol=1e-9)
    report = optimizer.last_report
    assert report.reduction_ratio == pytest.approx(1.0)
    assert (report.radius, report.step_length) == (100.0, 1.0)
    assert optimizer.state[w]["radius"] == 100.0


def test_a_narrow_region_is_kept_to_and_grows_while_the_model_is_right():
    _A, _c, w, loss = quadratic()
    optimizer = hvpopt.TrustRegionNewtonCG([w], radius=0.01, **EXACT)
    radii, norms = [], []
    for _ in range(5):
        optimizer.step(closure_of(optimizer, loss))
        radii.append(optimizer.last_report.radius)
        norms.append(optimizer.last_report.update_norm)
        assert optimizer.last_report.cg_status is Status.BOUNDARY
    assert radii == pytest.approx([0.01, 0.02, 0.04, 0.08, 0.16])
    assert norms == pytest.approx(radii)


def test_the_first_radius_is_the_length_of_cauchys_step():
    A, c, w, loss = quadratic()
    optimizer = hvpopt.TrustRegionNewtonCG([w], **EXACT)
    optimizer.step(closure_of(optimizer, loss))
    g = -A @ c
    assert optimizer.last_report.radius == pytest.approx(float(g.norm() ** 3 / (g @ A @ g)))


def test_a_refused_step_is_tried_again_closer_and_then_given_up_exactly():
    w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = hvpopt.TrustRegionNewtonCG([w], radius=8.0, max_evaluations=4)
    before, tried = w.detach().clone(), []

    def loss():
        moved = (w.detach() - before).norm()
        if moved > 0:
            tried.append(float(moved))
        return (w**2).sum() + (100.0 if moved > limit else 0.0)

    limit = 0.0
    optimizer.step(closure_of(optimizer, loss))
    newton = math.sqrt(5)  # Newton's step is inside of the first region
    assert tried == pytest.approx([newton, newton / 4, newton / 16, newton / 64])
    assert optimizer.last_report.outcome is Outcome.REJECTED
    assert torch.equal(w, before)
    assert optimizer.state[w]["radius"] == pytest.approx(newton / 256)

    limit = 0.3
    again = hvpopt.TrustRegionNewtonCG([w], radius=8.0)
    again.step(closure_of(again, loss))
    assert again.last_report.outcome is Outcome.STEPPED
    assert again.last_report.update_norm == pytest.approx(newton / 16)
    assert again.last_report.reduction_ratio == pytest.approx(1.0)


@pytest.mark.parametrize("start", [(0.0, 0.0), (1.0, 0.0), (0.5, 0.1)])
def test_saddles_are_left_for_a_minimum(start):
    w = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = hvpopt.TrustRegionNewtonCG([w], grad_tolerance=1e-9)
    for _ in range(60):
        optimizer.step(closure_of(optimizer, lambda: saddle(w)))
    assert optimizer.last_report.outcome is Outcome.CONVERGED
    assert w.detach().abs().tolist() == pytest.approx([0.0, math.sqrt(2)], abs=1e-7)


def test_a_curved_valley_is_followed_to_its_end():
    w = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    optimizer = hvpopt.TrustRegionNewtonCG([w], **EXACT)
    closure = closure_of(optimizer, lambda: 100 * (w[1] - w[0] ** 2) ** 2 + (1 - w[0]) ** 2)
    for _ in range(40):
        optimizer.step(closure)
    torch.testing.assert_close(w.detach(), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-9)


def test_the_region_has_the_norm_of_the_preconditioner():
    torch.manual_seed(0)
    x = torch.randn(30, 6, dtype=torch.float64) * torch.logspace(-2, 0, 6, dtype=torch.float64)
    y = torch.randn(30, dtype=torch.float64)
    w = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    hessian, g = 2 * x.T @ x / 30, -2 * x.T @ y / 30
    optimizer = hvpopt.TrustRegionNewtonCG(
        [w], radius=1e-3, preconditioner=Dense(), curvature="ggn", **EXACT
    )
    optimizer.step(closure_of(optimizer, lambda: F.mse_loss(x @ w, y)))
    along = g @ hessian @ g / (g @ g)
    metric = hessian + 1e-3 * along * torch.eye(6, dtype=torch.float64)
    p = w.detach()
    assert float((p @ metric @ p).sqrt()) == pytest.approx(1e-3)
    direction = -torch.linalg.solve(metric, g)
    assert float(p @ direction / (p.norm() * direction.norm())) == pytest.approx(1.0)


def test_each_group_has_its_learning_rate_and_decay_and_the_ratio_is_that_of_the_step():
    A, c, _, _ = quadratic()
    a = nn.Parameter(torch.full((2,), 0.5, dtype=torch.float64))
    b = nn.Parameter(torch.full((4,), 0.5, dtype=torch.float64))
    groups = [{"params": [a], "lr": 0.5, "weight_decay": 0.2}, {"params": [b]}]
    optimizer = hvpopt.TrustRegionNewtonCG(groups, radius=50.0, **EXACT)
    start = flat([a, b])

    def loss():
        d = torch.cat([a, b]) - c
        return 0.5 * d @ A @ d

    optimizer.step(closure_of(optimizer, loss))
    decay = torch.diag(torch.tensor([0.2] * 2 + [0.0] * 4, dtype=torch.float64))
    lr = torch.tensor([0.5] * 2 + [1.0] * 4, dtype=torch.float64)
    newton = -torch.linalg.solve(A + decay, A @ (start - c) + decay @ start)
    torch.testing.assert_close(flat([a, b]), start + lr * newton)
    assert optimizer.last_report.reduction_ratio == pytest.approx(1.0)


def test_on_other_batches_the_radius_settles():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    truth, w = draw(8), nn.Parameter(torch.zeros(8, dtype=torch.float64))
    optimizer = hvpopt.TrustRegionNewtonCG([w])
    errors, radii = [], []
    for _ in range(300):
        x = draw(16, 8)
        y = x @ truth + draw(16)
        optimizer.step(closure_of(optimizer, lambda: F.mse_loss(x @ w, y)))  # noqa: B023
        errors.append(float((w.detach() - truth).norm()))
        radii.append(optimizer.last_report.radius)
    assert max(errors[-50:]) < 0.8 < float(truth.norm())
    assert max(radii[-50:]) < 0.5 * radii[0]


def test_a_saved_optimizer_continues_bit_for_bit():
    def run(task, optimizer, num_steps):
        for _ in range(num_steps):
            optimizer.step(closure_of(optimizer, lambda: task.loss(task.net(task.x))))

    task = problem("mlp", torch.float32)
    optimizer = hvpopt.TrustRegionNewtonCG(task.params)
    run(task, optimizer, 3)
    saved = copy.deepcopy((task.net.state_dict(), optimizer.state_dict()))
    run(task, optimizer, 3)
    other = problem("mlp", torch.float32)
    other.net.load_state_dict(saved[0])
    resumed = hvpopt.TrustRegionNewtonCG(other.params, lr=0.9)
    resumed.load_state_dict(saved[1])
    run(other, resumed, 3)
    assert all(map(torch.equal, task.params, other.params))


def test_what_is_not_finite_moves_nothing():
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = hvpopt.TrustRegionNewtonCG([w], radius=1.0, engine="graph")
    before = w.detach().clone()
    optimizer.step(closure_of(optimizer, lambda: ((w - w.detach()).abs() ** 1.5).sum() + w.sum()))
    assert optimizer.last_report.outcome is Outcome.NONFINITE_PRODUCT
    assert torch.equal(w, before)
    with pytest.raises(ValueError, match=r"radius=-1 is out of range"):
        hvpopt.TrustRegionNewtonCG([w], radius=-1)
