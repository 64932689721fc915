"""What Newton-CG refuses, and failures that end in an error."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from problems import closure_of, problem
from torch import nn

import hvpopt
from hvpopt.optim.report import Outcome


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
        ({"momentum": -0.1}, r"momentum=-0\.1 is out of range: expected a number between"),
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


def test_nothing_to_train_is_named():
    w = nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = hvpopt.NewtonCG([w])
    with pytest.raises(RuntimeError, match="No parameter of the optimizer requires a gradient"):
        optimizer.step(lambda: None)
