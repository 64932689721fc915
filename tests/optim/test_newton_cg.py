"""Newton-CG's steps against dense solutions, and what it reports of them."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from problems import closure_of, flat, problem
from torch import nn

import hvpopt
from hvpopt.optim.report import Outcome
from hvpopt.solvers.result import Status
from hvpopt.solvers.stopping import ResidualNorm

EXACT = {
    "cg_stop": ResidualNorm(rtol=1e-13),
    "warm_start": 0.0,
    "cg_backtracking": False,
    "preconditioner": None,
}


def quadratic(seed=0, n=6):
    """½ (w−c)ᵀ A (w−c) with A symmetric positive definite, w in two tensors."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, generator=generator, dtype=torch.float64)
    A = root @ root.T + torch.eye(n, dtype=torch.float64)
    c = torch.randn(n, generator=generator, dtype=torch.float64)
    w = nn.Parameter(torch.zeros(n - 2, dtype=torch.float64))
    b = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def loss():
        d = torch.cat([w, b]) - c
        return 0.5 * d @ A @ d

    return A, c, [w, b], loss


def test_one_undamped_step_solves_a_quadratic():
    A, c, params, loss = quadratic()
    optimizer = hvpopt.NewtonCG(params, damping=0.0, curvature="hessian", **EXACT)
    returned = optimizer.step(closure_of(optimizer, loss))
    torch.testing.assert_close(flat(params), c, rtol=0, atol=1e-10)
    torch.testing.assert_close(returned, 0.5 * c @ A @ c)
    report = optimizer.last_report
    assert report.outcome is Outcome.STEPPED
    assert report.reduction_ratio == pytest.approx(1.0)
    assert report.num_closure_runs == 3  # the engine's probe, the trace, an evaluation
    optimizer.step(closure_of(optimizer, loss))
    assert optimizer.last_report.num_closure_runs <= 2 + 10


def test_a_damped_step_with_decay_solves_the_damped_normal_equations():
    A, c, params, loss = quadratic()
    with torch.no_grad():
        for p in params:
            p.fill_(0.5)
    start = flat(params)
    groups = [
        {"params": params[:1], "lr": 1.0, "damping": 0.3, "weight_decay": 0.2},
        {"params": params[1:], "lr": 0.5, "damping": 0.7, "weight_decay": 0.0},
    ]
    optimizer = hvpopt.NewtonCG(groups, curvature="hessian", **EXACT)
    optimizer.step(closure_of(optimizer, loss))
    decay = torch.diag(torch.tensor([0.2] * 4 + [0.0] * 2, dtype=torch.float64))
    damping = torch.diag(torch.tensor([0.3] * 4 + [0.7] * 2, dtype=torch.float64))
    lr = torch.tensor([1.0] * 4 + [0.5] * 2, dtype=torch.float64)
    B, g = A + decay, A @ (start - c) + decay @ start
    update = lr * torch.linalg.solve(B + damping, -g)
    torch.testing.assert_close(flat(params), start + update)

    report = optimizer.last_report
    value = lambda w: 0.5 * (w - c) @ A @ (w - c) + 0.5 * w @ decay @ w  # noqa: E731
    actual = value(start + update) - value(start)
    predicted = g @ update + 0.5 * update @ B @ update  # without damping
    assert report.objective == pytest.approx(float(value(start)))
    assert report.objective_after == pytest.approx(float(value(start + update)))
    assert report.reduction_ratio == pytest.approx(float(actual / predicted))
    assert report.update_norm == pytest.approx(float(update.norm()))
    assert [g["damping"] for g in optimizer.param_groups] == pytest.approx([0.2, 0.7 / 1.5])


def test_the_ratio_of_a_step_with_one_lr_uses_the_undamped_curvature():
    _, _, params, loss = quadratic()
    optimizer = hvpopt.NewtonCG(params, lr=0.8, damping=2.0, curvature="hessian", **EXACT)
    optimizer.step(closure_of(optimizer, loss))
    # on a quadratic the undamped model is exact whatever the step
    assert optimizer.last_report.reduction_ratio == pytest.approx(1.0, abs=1e-9)


def test_the_ggn_step_is_that_of_the_dense_matrix():
    task = problem("mlp")
    dense, optimizer = task.dense_ggn(), hvpopt.NewtonCG(task.params, damping=0.5, **EXACT)
    start = flat(task.params)
    optimizer.step(closure_of(optimizer, lambda: task.loss(task.net(task.x))))
    g = flat([p.grad for p in task.params])
    step = torch.linalg.solve(dense + 0.5 * torch.eye(len(g), dtype=g.dtype), -g)
    length = optimizer.last_report.step_length
    torch.testing.assert_close(flat(task.params), start + length * step, rtol=1e-7, atol=1e-9)


def test_the_tilt_gives_the_objective_the_gradient_of_all_micro_batches():
    """Two micro-batches by hand: Newton's step uses both gradients and the last curvature."""
    _, _, params, loss1 = quadratic(0)
    A2, c2, _, _ = quadratic(1)
    optimizer = hvpopt.NewtonCG(params, damping=0.0, curvature="hessian", **EXACT)
    loss1().backward()
    start_grad = flat([p.grad for p in params])

    def closure():  # does not clear: the gradients add up, as in Lightning's last micro-batch
        d = torch.cat(params) - c2
        value = 0.5 * d @ A2 @ d
        value.backward()
        return value

    optimizer.step(closure)
    g = start_grad + A2 @ (-c2)
    torch.testing.assert_close(flat(params), torch.linalg.solve(A2, -g))
    torch.testing.assert_close(flat([p.grad for p in params]), g)  # as plain SGD leaves it
    assert optimizer.last_report.reduction_ratio == pytest.approx(1.0)


def test_newton_converges_quadratically_on_a_convex_problem():
    torch.manual_seed(0)
    x = torch.randn(40, 5, dtype=torch.float64)
    y = torch.randint(2, (40,)).double()
    w = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = hvpopt.NewtonCG([w], damping=1e-12, weight_decay=0.1, curvature="hessian", **EXACT)
    norms = []
    for _ in range(8):
        optimizer.step(closure_of(optimizer, lambda: F.binary_cross_entropy_with_logits(x @ w, y)))
        norms.append(optimizer.last_report.grad_norm)
    assert norms[4] < 1e-9
    assert norms[3] < 10 * norms[2] ** 2


def test_training_past_convergence_stays_put_without_nan():
    _, c, params, loss = quadratic()
    optimizer = hvpopt.NewtonCG(params, curvature="hessian", grad_tolerance=1e-9)
    for _ in range(60):
        optimizer.step(closure_of(optimizer, loss))
    assert optimizer.last_report.outcome is Outcome.CONVERGED
    torch.testing.assert_close(flat(params), c, rtol=0, atol=1e-8)

    w = nn.Parameter(torch.zeros(3))  # the gradient is zero exactly
    optimizer = hvpopt.NewtonCG([w])
    for _ in range(3):
        optimizer.step(closure_of(optimizer, lambda: F.mse_loss(w, torch.zeros(3))))
    assert optimizer.last_report.outcome is Outcome.CONVERGED
    assert torch.equal(w, torch.zeros(3))


def test_smoke_a_network_fits_full_batch_in_float32_and_never_gets_nan():
    task = problem("mlp", torch.float32)
    optimizer = hvpopt.NewtonCG(task.params)
    losses = [
        float(optimizer.step(closure_of(optimizer, lambda: task.loss(task.net(task.x)))).detach())
        for _ in range(150)
    ]
    assert losses[-1] < 1e-6
    assert all(math.isfinite(x) for x in losses)
    assert all(b <= a + 1e-6 for a, b in pairwise(losses))


def test_a_step_without_decrease_is_rejected_and_everything_restored_exactly():
    w = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = hvpopt.NewtonCG([w], damping=1.0, curvature="hessian", max_evaluations=3)
    calls = []

    def closure():
        optimizer.zero_grad()
        calls.append(1)
        loss = (w**2).sum() + (0.0 if len(calls) <= 2 else 100.0)  # probe and trace see no wall
        loss.backward()
        return loss

    before = w.detach().clone()
    optimizer.step(closure)
    report = optimizer.last_report
    assert report.outcome is Outcome.REJECTED
    assert torch.equal(w, before)
    assert report.step_length == 0.0
    assert report.reduction_ratio == -math.inf
    assert optimizer.param_groups[0]["damping"] == 1.5**2


def test_negative_curvature_is_reported_and_the_step_descends():
    w = nn.Parameter(torch.tensor([0.5, 0.1], dtype=torch.float64))
    optimizer = hvpopt.NewtonCG([w], damping=1e-3, curvature="hessian")

    def loss():
        return w[0] ** 2 - w[1] ** 2 + 0.25 * w[1] ** 4

    values = [float(optimizer.step(closure_of(optimizer, loss)).detach()) for _ in range(40)]
    assert all(b <= a + 1e-15 for a, b in pairwise(values))
    assert values[-1] == pytest.approx(-1.0, abs=1e-6)  # the minima are at (0, ±√2)
    w.data = torch.tensor([0.5, 0.1], dtype=torch.float64)
    fresh = hvpopt.NewtonCG([w], damping=1e-3, curvature="hessian")
    fresh.step(closure_of(fresh, loss))
    assert fresh.last_report.cg_status is Status.NEGATIVE_CURVATURE


def test_a_warm_start_uses_the_last_solution():
    _, _, params, loss = quadratic()
    for warm_start, expected in ((0.0, 6), (1.0, 0)):
        optimizer = hvpopt.NewtonCG(
            params, lr=0.0, curvature="hessian", damping_factor=1.0, warm_start=warm_start,
            cg_stop=ResidualNorm(rtol=1e-8),
        )  # fmt: skip
        for _ in range(2):  # lr = 0 keeps the point, so that the solution is the same
            optimizer.step(closure_of(optimizer, loss))
        assert optimizer.last_report.cg_steps == expected


@pytest.mark.parametrize("make", [hvpopt.NewtonCG, hvpopt.SMD])
def test_a_saved_optimizer_continues_bit_for_bit(make, tmp_path):
    def run(task, optimizer, num_steps):
        for _ in range(num_steps):
            optimizer.step(closure_of(optimizer, lambda: task.loss(task.net(task.x))))

    torch.manual_seed(0)
    task = problem("mlp", torch.float32)
    optimizer = make(task.params)
    run(task, optimizer, 3)
    torch.save({"net": task.net.state_dict(), "o": optimizer.state_dict()}, tmp_path / "state.pt")
    run(task, optimizer, 3)

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other = problem("mlp", torch.float32)
    other.net.load_state_dict(saved["net"])
    resumed = make(other.params, lr=0.9)
    resumed.load_state_dict(saved["o"])
    run(other, resumed, 3)
    assert all(map(torch.equal, task.params, other.params))


def test_the_products_of_a_step_are_counted_once_each():
    task = problem("mlp")
    optimizer = hvpopt.NewtonCG(task.params, damping=1.0, warm_start=0.0)
    closure = closure_of(optimizer, lambda: task.loss(task.net(task.x)))
    optimizer.step(closure)
    report = optimizer.last_report
    assert report.num_products == report.cg_steps
    runs = []
    optimizer.step(lambda: (runs.append(1), closure())[1])
    assert len(runs) == optimizer.last_report.num_closure_runs
    assert optimizer.num_closure_runs == report.num_closure_runs + len(runs)


def test_the_ratio_after_backtracking_is_that_of_the_shorter_step():
    _, _, params, loss = quadratic()
    optimizer = hvpopt.NewtonCG(params, lr=1.995, damping=0.0, curvature="hessian", **EXACT)
    optimizer.step(closure_of(optimizer, loss))
    # twice Newton's step is as high as the start: a little less decreases, but too little
    assert optimizer.last_report.step_length == 0.5
    assert optimizer.last_report.reduction_ratio == pytest.approx(1.0)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_a_newton_step_does_not_depend_on_the_scale_of_the_loss(scale):
    torch.manual_seed(0)
    w = nn.Parameter(torch.zeros(4))
    x, y = torch.randn(10, 4), torch.randn(10)
    optimizer = hvpopt.NewtonCG([w], damping=0.0, **EXACT)
    optimizer.step(closure_of(optimizer, lambda: F.mse_loss(x @ w, y) * scale))
    assert optimizer.last_report.outcome is Outcome.STEPPED
    expected = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    torch.testing.assert_close(w.detach(), expected, rtol=1e-3, atol=1e-4)


def test_a_learning_rate_of_zero_changes_nothing_and_keeps_the_damping():
    _, _, params, loss = quadratic()
    optimizer = hvpopt.NewtonCG(params, lr=0.0, damping=1.0, curvature="hessian")
    before = flat(params).clone()
    for _ in range(3):
        optimizer.step(closure_of(optimizer, loss))
    assert torch.equal(flat(params), before)
    assert optimizer.param_groups[0]["damping"] == 1.0


def test_a_fixed_damping_stays_zero():
    _, _, params, loss = quadratic()
    optimizer = hvpopt.NewtonCG(params, damping=0.0, damping_factor=1.0, curvature="hessian")
    optimizer.step(closure_of(optimizer, loss))
    assert optimizer.param_groups[0]["damping"] == 0.0
