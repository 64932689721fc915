"""Newton-CG's momentum against dense solutions, and how accurately it solves by default."""

import pytest
import torch
import torch.nn.functional as F
from problems import closure_of, flat, problem
from torch import nn

import hvpopt
from hvpopt.closure import ClosureOracle
from hvpopt.optim.cg_options import CGOptions
from hvpopt.optim.model import DampedModel
from hvpopt.optim.objective import Objective
from hvpopt.optim.report import Outcome
from hvpopt.preconditioners import Kronecker
from hvpopt.solvers.stopping import EisenstatWalker, RelativeProgress, ResidualNorm, Worthwhile

EXACT = {
    "cg_stop": ResidualNorm(rtol=1e-13),
    "warm_start": 0.0,
    "cg_backtracking": False,
    "preconditioner": None,
    "curvature": "hessian",
    "damping_factor": 1.0,
}


def quadratic(n=6):
    """½ (w−c)ᵀ A (w−c) with A symmetric positive definite, w in two tensors."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(n, n, generator=generator, dtype=torch.float64)
    A, c = root @ root.T + 0.1 * torch.eye(n).double(), torch.randn(n, generator=generator).double()
    params = [nn.Parameter(torch.zeros(size, dtype=torch.float64)) for size in (n - 2, 2)]

    def loss():
        d = torch.cat(params) - c
        return 0.5 * d @ A @ d

    return A, c, params, loss


def test_each_step_is_drawn_to_a_part_of_the_last_one():
    A, c, params, loss = quadratic()
    groups = [{"params": params[:1], "damping": 3.0}, {"params": params[1:], "damping": 5.0}]
    optimizer = hvpopt.NewtonCG(groups, momentum=0.8, **EXACT)
    damping = torch.diag(torch.tensor([3.0] * 4 + [5.0] * 2).double())
    w, last = torch.zeros(6).double(), torch.zeros(6).double()
    for _ in range(4):
        optimizer.step(closure_of(optimizer, loss))
        last = torch.linalg.solve(A + damping, 0.8 * damping @ last - A @ (w - c))
        w = w + last
        assert optimizer.last_report.step_length == 1
        # on a quadratic the model without damping is exact
        assert optimizer.last_report.reduction_ratio == pytest.approx(1.0)
        torch.testing.assert_close(flat(params), w)


def test_without_damping_momentum_changes_nothing():
    found = []
    for momentum in (0.0, 0.9):
        task = problem("mlp")
        options = {**EXACT, "curvature": "ggn", "cg_stop": ResidualNorm(rtol=1e-3)}
        optimizer = hvpopt.NewtonCG(task.params, damping=0.0, momentum=momentum, **options)
        for _ in range(3):
            optimizer.step(closure_of(optimizer, lambda: task.loss(task.net(task.x))))  # noqa: B023
        found.append(flat(task.params))
    assert torch.equal(*found)


def test_after_a_rejected_step_there_is_no_momentum():
    A, c, params, loss = quadratic()
    optimizer = hvpopt.NewtonCG(params, damping=3.0, max_evaluations=2, **EXACT)
    optimizer.step(closure_of(optimizer, loss))
    wall = []

    def blocked():
        wall.append(1)
        return loss() + (100.0 if len(wall) > 1 else 0.0)

    optimizer.step(closure_of(optimizer, blocked))
    assert optimizer.last_report.outcome is Outcome.REJECTED
    before = flat(params)
    optimizer.step(closure_of(optimizer, loss))
    damping = optimizer.last_report.damping
    step = torch.linalg.solve(A + damping * torch.eye(6).double(), A @ (c - before))
    torch.testing.assert_close(flat(params), before + step)


def test_accumulated_gradients_have_no_momentum():
    A, c, params, loss = quadratic()
    optimizer = hvpopt.NewtonCG(params, damping=3.0, **EXACT)
    matrix, w = A + 3.0 * torch.eye(6).double(), torch.zeros(6).double()
    for _ in range(3):
        optimizer.zero_grad()
        (0.5 * torch.cat(params).sum()).backward()  # another micro-batch

        def closure():
            value = loss()
            value.backward()
            return value

        optimizer.step(closure)
        w = w - torch.linalg.solve(matrix, A @ (w - c) + 0.5)
        assert optimizer.last_report.step_length == 1
        torch.testing.assert_close(flat(params), w)


@torch.no_grad()
def test_the_centred_model_is_that_of_the_dense_matrix():
    task = problem("mlp")
    generator = torch.Generator().manual_seed(3)
    centre = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in task.params]

    def closure():
        for p in task.params:
            p.grad = None
        value = task.loss(task.net(task.x))
        value.backward()
        return value

    start = [p.detach().clone() for p in task.params]
    with ClosureOracle(closure, task.params) as oracle:
        objective = Objective(oracle, oracle.trace("ggn"), task.params, start, [0.0] * len(start))
        model = DampedModel(objective, [0.7] * len(start), None, centre)
        stop = ResidualNorm(rtol=1e-12)
        solution = model.minimized(x0=None, stop=stop, max_steps=500, keep_iterates=False)
        g = flat(objective.grad)
    matrix = task.dense_ggn()
    eye = torch.eye(len(g), dtype=g.dtype)
    d = torch.linalg.solve(matrix + 0.7 * eye, 0.7 * flat(centre) - g)
    torch.testing.assert_close(flat(solution.value), d, rtol=1e-6, atol=1e-9)
    away = d - flat(centre)
    value = g @ d + 0.5 * d @ matrix @ d + 0.35 * (away @ away - flat(centre) @ flat(centre))
    assert solution.model_value == pytest.approx(float(value))
    curved = float(d @ matrix @ d)
    assert model.undamped_curvature(solution.value, solution.model_value) == pytest.approx(curved)


def test_a_step_that_does_not_show_in_the_loss_leaves_the_damping():
    """F is 1 to the last bit, while the model predicts a fall by ten times the rounding."""
    w = nn.Parameter(torch.ones(1))
    size = 20 * 4 * torch.finfo(torch.float32).eps

    def loss():
        value = size * (w**2).sum()
        return value + (1.0 - value).detach()

    options = {"curvature": "hessian", "damping": 1e-3 * size, "momentum": 0.0}
    optimizer = hvpopt.NewtonCG([w], **options)
    optimizer.step(closure_of(optimizer, loss))
    report = optimizer.last_report
    assert (report.objective, report.objective_after) == (1.0, 1.0)
    assert report.outcome is Outcome.STEPPED
    assert torch.tensor(report.reduction_ratio).isnan()
    assert optimizer.param_groups[0]["damping"] == options["damping"]


def residual_closure(params, create_graph=True):
    x = torch.linspace(0, 1, 5, dtype=torch.float64).reshape(-1, 1).requires_grad_()
    w, b = params

    def closure():
        for p in params:
            p.grad = None
        u = torch.tanh(x @ w + b)
        slope, *_ = torch.autograd.grad(u.sum(), x, create_graph=create_graph, retain_graph=True)
        loss = F.mse_loss(u + slope, torch.ones_like(u))
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("goes_on", [True, False])
def test_derivatives_that_the_closure_goes_on_with_are_seen(goes_on):
    params = [nn.Parameter(torch.full(shape, 0.3).double()) for shape in ((1, 1), (1,))]
    with ClosureOracle(residual_closure(params, goes_on), params) as oracle:
        assert oracle.trace("ggn").takes_derivatives == goes_on
    with ClosureOracle(closure_of_a_fit(params), params) as oracle:
        assert not oracle.trace("ggn").takes_derivatives


def closure_of_a_fit(params):
    def closure():
        loss = F.mse_loss(params[0].sum() + params[1], torch.ones(1).double())
        loss.backward()
        return loss

    return closure


class At:
    """A step, as far as the options look at it."""

    def __init__(self, num_batches=0, takes_derivatives=False):
        self.num_batches, self.objective = num_batches, self
        self.takes_derivatives = takes_derivatives


def test_solutions_are_as_accurate_as_a_step_is_dear():
    usual = CGOptions(None, None, None, plain=False)
    assert (usual.warm_start, usual.damping_factor) == (0.0, 3.0)
    assert usual.stop(At()) == Worthwhile(1.0)
    assert usual.stop(At(takes_derivatives=True)) == Worthwhile(10.0)
    plain = CGOptions(None, None, None, plain=True)
    assert (plain.warm_start, plain.damping_factor) == (0.95, 1.5)
    assert plain.stop(At(takes_derivatives=True)) == RelativeProgress()
    assert plain.stop(At(num_batches=3)) == Worthwhile(12.0)
    given = CGOptions(EisenstatWalker(), 0.5, 3.0, plain=True)
    assert given.stop(At(3, takes_derivatives=True)) == EisenstatWalker()
    assert (given.warm_start, given.damping_factor) == (0.5, 3.0)


def test_a_physics_informed_closure_is_solved_more_accurately():
    steps = {}
    for own in (None, Worthwhile(1.0)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1)).double()
        x = torch.linspace(-3, 3, 50).double().reshape(-1, 1).requires_grad_()
        optimizer = hvpopt.NewtonCG(net.parameters(), cg_stop=own)

        def loss(net=net, x=x):
            u = net(x)
            slope, *_ = torch.autograd.grad(u.sum(), x, create_graph=True)
            return F.mse_loss(slope, torch.sin(2 * x))

        for _ in range(10):
            optimizer.step(closure_of(optimizer, loss))
        steps[own] = optimizer.last_report.cg_steps
    assert steps[None] > steps[Worthwhile(1.0)]


def refreshes(num_steps, *, preconditioner="auto", takes_derivatives=False):
    """How often the factors of a network's first weight were renewed."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    optimizer = hvpopt.NewtonCG(net.parameters(), preconditioner=preconditioner)
    x = torch.randn(20, 2, dtype=torch.float64, requires_grad=takes_derivatives)

    def loss():
        u = net(x)
        if takes_derivatives:
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            u = u + slope[:, :1]
        return F.mse_loss(u, x.detach().prod(1, keepdim=True))

    for _ in range(num_steps):
        optimizer.step(closure_of(optimizer, loss))
    return optimizer.state[net[0].weight]["kronecker"]["num_refreshes"]


def test_factors_are_renewed_less_often_where_the_closure_takes_derivatives():
    assert refreshes(7) == 4  # at steps 0, 2, 4, 6
    assert refreshes(7, takes_derivatives=True) == 3  # at steps 0, 3, 6
    for takes in (False, True):  # what is given stays
        assert refreshes(7, preconditioner=Kronecker(every=6), takes_derivatives=takes) == 2
