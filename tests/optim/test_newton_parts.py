"""The parts of a Newton step: CG's iterates, calibration, validation, saddles, preconditioning."""

import copy
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from problems import closure_of, flat, problem
from torch import nn

import hvpopt
from hvpopt.closure import ClosureOracle
from hvpopt.optim.model import DampedModel, best_trial
from hvpopt.optim.objective import Objective, clipping
from hvpopt.optim.report import Outcome
from hvpopt.optim.saddle import escaped
from hvpopt.preconditioners.base import Preconditioner
from hvpopt.solvers.cg import cg
from hvpopt.solvers.curvature import least_curvature
from hvpopt.solvers.stopping import ResidualNorm

EXACT = {
    "cg_stop": ResidualNorm(rtol=1e-13),
    "warm_start": 0.0,
    "cg_backtracking": False,
    "preconditioner": None,
}


def seeded():
    return torch.Generator().manual_seed(0)


def saddle(w):
    """Minima at (0, ±√2), a saddle at the origin."""
    return w[0] ** 2 - w[1] ** 2 + 0.25 * w[1] ** 4


class Opened:
    """An objective of a function of one list of parameters, for as long as a test wants."""

    def __init__(self, params, loss, curvature="hessian", decay=0.0):
        self.params, self.start = params, [p.detach().clone() for p in params]
        self.oracle = ClosureOracle(lambda: self.closure(loss), params)
        self.curvature, self.decay = curvature, decay

    def closure(self, loss):
        for p in self.params:
            p.grad = None
        value = loss()
        value.backward()
        return value

    def __enter__(self):
        self.no_grad = torch.no_grad()
        self.no_grad.__enter__()
        self.oracle.__enter__()
        point = self.oracle.trace(self.curvature)
        decay = [self.decay] * len(self.params)
        return Objective(self.oracle, point, self.params, self.start, decay)

    def __exit__(self, *error):
        self.oracle.__exit__(*error)
        self.no_grad.__exit__(*error)


@torch.no_grad()
def test_the_best_of_cgs_iterates_is_taken_by_the_objective_itself():
    """An ill-conditioned quadratic with a wall: CG's early iterates stay inside of it."""
    torch.manual_seed(0)
    scales = torch.logspace(0, 4, 60, dtype=torch.float64)
    target = torch.randn(60, dtype=torch.float64) / scales.sqrt()
    w = nn.Parameter(torch.zeros(60, dtype=torch.float64))

    def loss():
        inside = 0.5 * (scales * (w - target) ** 2).sum()
        return inside + 1e3 * torch.relu(w.abs() - 0.05).pow(3).sum()

    with Opened([w], loss) as objective:
        model = DampedModel(objective, [0.0])
        stop = ResidualNorm(rtol=1e-12)
        solution = model.minimized(x0=None, stop=stop, max_steps=60, keep_iterates=True)
        values = {0: objective.value}
        for kept in solution.iterates:
            w.copy_(kept.value[0])
            values[kept.num_steps] = float(loss())
        best, last_value = best_trial(model, [1.0], solution)
        w_best = w.detach().clone()
    walk, steps = math.inf, None  # from the last back while it falls, by hand
    for n in sorted(values, reverse=True)[:-1]:
        if not values[n] < walk - 1e-3 * abs(walk - values[0]) and walk < math.inf:
            break
        walk, steps = values[n], n
    assert steps < solution.num_steps  # the test has a point
    assert (best.num_steps, best.value) == (steps, pytest.approx(walk))
    assert last_value == pytest.approx(values[solution.num_steps])
    torch.testing.assert_close(w_best, best.update[0])
    dense = torch.diag(scales)  # at zero the wall has no curvature
    expected = float(best.update[0] @ dense @ best.update[0])
    assert best.curved == pytest.approx(expected)


def test_the_damped_model_is_that_of_cg_on_the_whole_system():
    task = problem("mlp")
    with Opened(task.params, lambda: task.loss(task.net(task.x)), "ggn", 0.3) as objective:
        model = DampedModel(objective, [0.7] * len(task.params))
        solution = model.minimized(
            x0=None, stop=ResidualNorm(rtol=1e-12), max_steps=500, keep_iterates=False
        )
        g = flat(objective.grad)
    matrix = task.dense_ggn()
    d = torch.linalg.solve(matrix + (0.3 + 0.7) * torch.eye(len(g), dtype=g.dtype), -g)
    torch.testing.assert_close(flat(solution.value), d, rtol=1e-6, atol=1e-9)
    curved = float(d @ (matrix @ d) + 0.3 * d @ d)
    assert model.undamped_curvature(solution.value, solution.model_value) == pytest.approx(curved)


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("start", [(0.0, 0.0), (1.0, 0.0)])
def test_a_saddle_is_left_and_never_called_converged(curvature, start):
    w = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = hvpopt.NewtonCG([w], damping=1e-3, curvature=curvature, grad_tolerance=1e-8)

    def loss():  # a squared error for the GGN to see; its other term has no curvature there
        return F.mse_loss(w[:1], torch.zeros(1, dtype=w.dtype)) - w[1] ** 2 + w[1] ** 4 / 4

    for _ in range(60):
        optimizer.step(closure_of(optimizer, loss))
        if optimizer.last_report.outcome is Outcome.CONVERGED:
            break
    assert optimizer.last_report.outcome is Outcome.CONVERGED
    assert w.detach().abs().tolist() == pytest.approx([0.0, math.sqrt(2)], abs=1e-6)


def test_the_most_negative_curvature_is_that_of_the_dense_hessian():
    torch.manual_seed(0)
    root = torch.randn(8, 8, dtype=torch.float64)
    matrix = root + root.T
    w = nn.Parameter(torch.zeros(8, dtype=torch.float64))
    with Opened([w], lambda: 0.5 * w @ matrix @ w, decay=0.1) as objective:
        least = least_curvature(objective.product, [w], tolerance=1e-3, generator=seeded())
        value, vector = least.value, least.vector
        search = escaped(objective, value, vector)
    values, vectors = torch.linalg.eigh(matrix)
    assert value == pytest.approx(float(values[0]) + 0.1, rel=1e-4)
    assert abs(float(vector[0] @ vectors[:, 0])) == pytest.approx(1.0, rel=1e-4)
    assert search.value == pytest.approx(0.5 * value, rel=1e-3)

    with Opened([w], lambda: 0.5 * w @ (root @ root.T) @ w) as objective:
        least = least_curvature(objective.product, [w], tolerance=1e-3, generator=seeded())
        assert not least.is_negative


@dataclass(frozen=True)
class Dense(Preconditioner):
    """The inverse of the very matrix, for one parameter."""

    every: int = 3
    breaks: bool = False

    def is_ready(self, states):
        return all("matrix" in state for state in states)

    def refresh(self, point, states):
        seen.append(point.seed)
        if self.breaks:
            return
        eye = torch.eye(point.params[0].numel(), dtype=point.params[0].dtype)
        states[0]["matrix"] = torch.stack([point.product([e])[0] for e in eye])

    def solve(self, r, states, shift):
        matrix = states[0]["matrix"]
        return [torch.linalg.solve(matrix + shift[0] * torch.eye(len(matrix)).to(matrix), r[0])]


seen: list[int] = []


def test_a_preconditioner_is_refreshed_when_due_and_sees_damping_and_decay():
    torch.manual_seed(0)
    x = torch.randn(30, 6, dtype=torch.float64) * torch.logspace(-3, 0, 6, dtype=torch.float64)
    y = torch.randn(30, dtype=torch.float64)
    w = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    seen.clear()
    optimizer = hvpopt.NewtonCG(
        [w], damping=1e-4, weight_decay=1e-3, preconditioner=Dense(), seed=7,
        cg_stop=ResidualNorm(rtol=1e-10),
    )  # fmt: skip
    closure = closure_of(optimizer, lambda: F.mse_loss(x @ w, y))
    for _ in range(5):
        optimizer.step(closure)
        assert optimizer.last_report.cg_steps <= 1  # the inverse is exact
    assert seen == [7, 10]

    other = nn.Parameter(w.detach().clone())
    resumed = hvpopt.NewtonCG([other], preconditioner=Dense(), seed=7)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    closure = closure_of(resumed, lambda: F.mse_loss(x @ other, y))
    for _ in range(2):
        resumed.step(closure)
    assert seen == [7, 10, 13]


def test_a_preconditioner_that_comes_to_nothing_is_left_out():
    task = problem("mlp")
    optimizer = hvpopt.NewtonCG(task.params, preconditioner=Dense(breaks=True))
    optimizer.step(closure_of(optimizer, lambda: task.loss(task.net(task.x))))
    assert optimizer.last_report.outcome is Outcome.STEPPED
    with pytest.raises(TypeError, match=r"preconditioner is a str: expected one of"):
        hvpopt.NewtonCG(task.params, preconditioner="kronecker")
    with pytest.raises(TypeError, match=r"preconditioner is the class Dense: expected one of"):
        hvpopt.NewtonCG(task.params, preconditioner=Dense)


def test_clipping_is_told_from_accumulation_and_warned_of_once(caplog):
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([0.1, -2.0])
    assert clipping([a, b], [a, b]) == 1.0
    assert clipping([a / 2, b / 2], [a, b]) == pytest.approx(0.5)
    assert clipping([a.clamp(-1, 1), b.clamp(-1, 1)], [a, b]) < 1
    assert clipping([a + 1, b], [a, b]) == 1.0
    assert clipping([a / 2, b], [a, b]) == 1.0

    w = nn.Parameter(torch.ones(3))
    optimizer = hvpopt.NewtonCG([w])

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(w, torch.zeros(3))
        loss.backward()
        nn.utils.clip_grad_norm_([w], 0.1)
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert sum("reached NewtonCG clipped" in r.message for r in caplog.records) == 1


def test_the_curvature_of_a_model_with_several_learning_rates_is_that_of_the_update():
    torch.manual_seed(0)
    root = torch.randn(5, 5, dtype=torch.float64)
    matrix = root @ root.T + torch.eye(5, dtype=torch.float64)
    a = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    b = nn.Parameter(torch.ones(3, dtype=torch.float64))
    w = torch.cat
    with Opened([a, b], lambda: 0.5 * w([a, b]) @ matrix @ w([a, b])) as objective:
        model = DampedModel(objective, [0.1, 0.1])
        solution = cg(model.product, [-g for g in objective.grad], keep_iterates=True)
        with torch.no_grad():
            best, _ = best_trial(model, [1.0, 0.5], solution)
    update = flat(best.update)
    assert best.curved == pytest.approx(float(update @ matrix @ update))


@pytest.mark.parametrize("cls", [hvpopt.SMD, hvpopt.NewtonCG, hvpopt.TrustRegionNewtonCG])
def test_an_unused_parameter_stays_under_weight_decay(cls):
    w, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = cls([w, unused], weight_decay=0.5)
    optimizer.step(closure_of(optimizer, lambda: F.mse_loss(w, torch.zeros(2))))
    assert unused.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("cls", [hvpopt.SMD, hvpopt.NewtonCG, hvpopt.AdaHessian])
def test_a_copy_can_be_copied(cls):
    optimizer = cls([nn.Parameter(torch.ones(2))])
    assert type(copy.deepcopy(copy.deepcopy(optimizer))) is cls


@pytest.mark.parametrize("damping", ["auto", 1e-3])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_negative_curvature_is_followed_as_far_whatever_the_scale_of_the_loss(scale, damping):
    w = nn.Parameter(torch.tensor([0.5, 0.1], dtype=torch.float64))
    damping = damping if damping == "auto" else damping * scale
    optimizer = hvpopt.NewtonCG([w], damping=damping, curvature="hessian")
    for _ in range(8):
        optimizer.step(closure_of(optimizer, lambda: scale * saddle(w)))
    assert w.detach().abs().tolist() == pytest.approx([0.0, math.sqrt(2)], abs=1e-6)
