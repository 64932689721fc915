import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from problems import closure_of, flat, problem
from torch import nn

import hvpopt
from hvpopt.optim.damping import levenberg_marquardt, reduction_ratio
from hvpopt.optim.line_search import armijo
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
    assert optimizer.param_groups[0]["damping"] == 1.5


def test_negative_curvature_is_reported_and_the_step_descends():
    w = nn.Parameter(torch.tensor([0.5, 0.1], dtype=torch.float64))
    optimizer = hvpopt.NewtonCG([w], damping=1e-3, curvature="hessian")

    def loss():
        return w[0] ** 2 - w[1] ** 2 + 0.25 * w[1] ** 4

    values = [float(optimizer.step(closure_of(optimizer, loss)).detach()) for _ in range(40)]
    assert all(b <= a for a, b in pairwise(values))
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


@pytest.mark.parametrize("where", ["loss", "gradient", "product"])
def test_what_is_not_finite_moves_nothing_and_ends_in_an_error(where):
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = hvpopt.NewtonCG(
        [w], curvature="hessian", max_consecutive_failures=3, engine="graph"
    )

    def loss():
        if where == "loss":
            return (w.sum() - 3).log()
        if where == "gradient":
            return (w - w.detach()).abs().sqrt().sum()
        return ((w - w.detach()).abs() ** 1.5).sum() + w.sum()

    before = w.detach().clone()
    closure = closure_of(optimizer, loss)
    outcome = getattr(Outcome, f"NONFINITE_{where.upper()}")
    for _ in range(2):
        optimizer.step(closure)
        assert optimizer.last_report.outcome is outcome
        assert torch.equal(w, before)
    with pytest.raises(FloatingPointError, match=r"3 steps of NewtonCG in a row failed\."):
        optimizer.step(closure)
    assert torch.equal(w, before)


def test_a_success_resets_the_count_of_failures():
    w = nn.Parameter(torch.ones(2))
    optimizer = hvpopt.NewtonCG([w], curvature="hessian", max_consecutive_failures=2)
    for bad in (True, False, True, False):
        optimizer.step(
            closure_of(optimizer, lambda: (w**2).sum() * (math.nan if bad else 1.0))  # noqa: B023
        )
    assert optimizer.last_report.outcome is Outcome.STEPPED


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("at_run", [1, 2, 3])
def test_an_exception_inside_a_step_leaves_parameters_and_state(error, at_run):
    task = problem("dropout")
    optimizer = hvpopt.NewtonCG(task.params)
    runs = []

    def loss():
        runs.append(1)
        if len(runs) == at_run and rises:
            raise error("stop")
        wall = 10.0 if rises and len(runs) == 2 else 0.0  # makes the search try a third time
        return task.loss(task.net(task.x)) + wall

    rises = False
    optimizer.step(closure_of(optimizer, loss))
    before = [p.detach().clone() for p in task.params]
    state = copy.deepcopy(optimizer.state_dict())
    rises = True
    runs.clear()
    with pytest.raises(error, match="stop"):
        optimizer.step(closure_of(optimizer, loss))
    assert all(map(torch.equal, task.params, before))
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)


def test_unused_and_frozen_parameters_stay_and_are_named(caplog):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    net.register_parameter("unused", nn.Parameter(torch.ones(2)))
    net[0].weight.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    optimizer = hvpopt.NewtonCG(net.parameters())
    x = torch.randn(5, 3)
    for _ in range(2):
        optimizer.step(closure_of(optimizer, lambda: F.mse_loss(net(x), torch.zeros(5, 2))))
    after = net.state_dict()
    assert torch.equal(after["unused"], before["unused"])
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert not torch.equal(after["1.weight"], before["1.weight"])
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [
        "Parameter 'unused' got no gradient from the closure: it stays as it is."
    ]


def test_a_loss_of_other_parameters_is_refused():
    w, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = hvpopt.NewtonCG([w], curvature="hessian", engine="graph")
    with pytest.raises(RuntimeError, match="No parameter of the optimizer got a gradient"):
        optimizer.step(closure_of(optimizer, lambda: (other**2).sum()))


def test_sparse_gradients_are_refused_by_name():
    net = nn.Sequential(nn.Embedding(5, 2, sparse=True), nn.Flatten(), nn.Linear(4, 2))
    optimizer = hvpopt.NewtonCG(net.parameters(), engine="graph")
    before = copy.deepcopy(net.state_dict())
    ids = torch.tensor([[0, 1], [2, 3]])
    with pytest.raises(TypeError, match=r"'0\.weight' has a sparse gradient.*sparse=False"):
        optimizer.step(
            closure_of(optimizer, lambda: F.cross_entropy(net(ids), torch.tensor([0, 1])))
        )
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr=-1\.0 is out of range: expected a number at least 0"),
        ({"damping": -0.1}, r"damping=-0\.1"),
        ({"damping": "big"}, r"damping='big'"),
        ({"weight_decay": -1e-4}, r"weight_decay=-0\.0001"),
        ({"curvature": "fisher"}, r"curvature='fisher' is unknown: choose 'ggn' or 'hessian'"),
        ({"max_cg_steps": 0}, r"max_cg_steps=0"),
        ({"max_cg_steps": 2.7}, r"max_cg_steps=2\.7 is out of range: expected a whole number"),
        ({"lr": math.inf}, r"lr=inf is out of range"),
        ({"cg_stop": 1e-3}, r"cg_stop=0\.001 is no stopping rule"),
        ({"warm_start": 1.5}, r"warm_start=1\.5 is out of range: expected a number between"),
        ({"damping_factor": 0.5}, r"damping_factor=0\.5"),
        ({"backtracking": 1.0}, r"backtracking=1\.0"),
        ({"engine": "magic"}, r"engine='magic' is unknown"),
        ({"max_consecutive_failures": 0}, r"max_consecutive_failures=0"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        hvpopt.NewtonCG([nn.Parameter(torch.ones(2))], **options)


def test_parameters_of_the_wrong_kind_are_refused_by_name():
    good = nn.Parameter(torch.ones(2))
    complex_ = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"number 1 has dtype torch\.complex64.*view_as_real"):
        hvpopt.NewtonCG([good, complex_])
    with pytest.raises(TypeError, match=r"Parameter phase has dtype torch\.complex64"):
        hvpopt.NewtonCG([("weight", good), ("phase", complex_)])
    sparse = torch.eye(2).to_sparse().requires_grad_()
    with pytest.raises(TypeError, match="number 0 is sparse"):
        hvpopt.NewtonCG([sparse])
    optimizer = hvpopt.NewtonCG([good])
    with pytest.raises(ValueError, match="lr=-2"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": -2})
    assert len(optimizer.param_groups) == 1


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


def test_the_damping_follows_the_ratio():
    assert levenberg_marquardt(1.0, 0.2) == 1.5
    assert levenberg_marquardt(1.0, -math.inf) == 1.5
    assert levenberg_marquardt(1.0, 0.5) == 1.0
    assert levenberg_marquardt(1.0, 0.8) == pytest.approx(2 / 3)
    assert levenberg_marquardt(1.0, math.nan) == 1.0
    assert levenberg_marquardt(1.0, 0.8, factor=1.0) == 1.0
    assert levenberg_marquardt(1e-12, 0.9) == 1e-12


def test_the_ratio_tells_rises_noise_and_nonsense_apart():
    assert reduction_ratio(-1.0, -2.0) == 0.5
    assert reduction_ratio(0.1, -2.0) == -math.inf
    assert reduction_ratio(-0.1, 2.0) == -math.inf
    assert reduction_ratio(math.nan, -1.0) == -math.inf
    assert math.isnan(reduction_ratio(1e-9, -1e-9, noise=1e-8))


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


def test_the_ratio_after_backtracking_is_that_of_the_shorter_step():
    _, _, params, loss = quadratic()
    optimizer = hvpopt.NewtonCG(params, lr=1.995, damping=0.0, curvature="hessian", **EXACT)
    optimizer.step(closure_of(optimizer, loss))
    # twice Newton's step is as high as the start: a little less decreases, but too little
    assert optimizer.last_report.step_length == 0.5
    assert optimizer.last_report.reduction_ratio == pytest.approx(1.0)


def test_the_line_search_asks_less_of_shorter_steps_and_forgives_rounding():
    values = {1.0: 1.5, 0.5: 1.2, 0.25: 0.97}
    assert armijo(values.__getitem__, 1.0, -1.0, sufficient_decrease=0.1).step == 0.25
    assert armijo(lambda t: 1.0 + 1e-8, 1.0, -1e-12, noise=1e-7).step == 1.0


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


def test_nothing_to_train_is_named():
    w = nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = hvpopt.NewtonCG([w])
    with pytest.raises(RuntimeError, match="No parameter of the optimizer requires a gradient"):
        optimizer.step(lambda: None)
