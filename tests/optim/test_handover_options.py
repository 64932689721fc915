"""The options, groups and schedulers of a schedule of optimizers, and what it refuses."""

from pathlib import Path

import hydra
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from problems import closure_of, problem
from test_handover import LBFGS, run, schedule, scripted
from torch import nn
from torch.optim import SGD, Adam, Muon

import hvpopt
from hvpopt.optim.handover import Handover
from hvpopt.optim.newton_cg import NewtonCG
from hvpopt.optim.smd import SMD
from hvpopt.optim.stages import Stage


def test_a_scheduler_acts_on_the_first_stage_alone():
    task = problem("mlp")
    optimizer = Handover(task.params, [Stage(Adam, steps=3, lr=0.1), Stage(SGD, lr=0.5)])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1**step)
    seen = []
    for _ in range(5):
        run(optimizer, task, 1)
        seen.append(optimizer.optimizer.param_groups[0]["lr"])
        scheduler.step()
    assert seen == pytest.approx([0.1, 0.01, 0.001, 0.5, 0.5])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-6)


def test_one_cycle_finds_the_first_stages_momentum():
    task = problem("mlp")
    optimizer = Handover(task.params, [Stage(Adam, steps=3), Stage(SGD)])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    betas = optimizer.optimizer.param_groups[0]["betas"]
    run(optimizer, task, 1)
    scheduler.step()
    assert optimizer.optimizer.param_groups[0]["betas"] != betas


def test_options_of_a_group_go_to_every_stage_but_its_learning_rate_to_the_first():
    task = problem("mlp")
    groups = [
        {"params": task.params[:2], "weight_decay": 0.1, "lr": 0.3},
        {"params": iter(task.params[2:])},
    ]
    optimizer = Handover(groups, [Stage(Adam, steps=1, lr=0.2), Stage(NewtonCG)])
    first, second = optimizer._optimizers
    assert [g["lr"] for g in first.param_groups] == [0.3, 0.2]
    assert [g["lr"] for g in second.param_groups] == [1.0, 1.0]
    assert [g["weight_decay"] for g in first.param_groups] == [0.1, 0]
    assert [g["weight_decay"] for g in second.param_groups] == [0.1, 0.0]
    assert optimizer.param_groups is first.param_groups
    run(optimizer, task, 3)


def test_named_parameters_keep_their_names():
    task = problem("mlp")
    optimizer = Handover(task.net.named_parameters(), [Stage(Adam, steps=1), Stage(SMD)])
    for stage in optimizer._optimizers:
        assert stage.param_groups[0]["param_names"][0] == "0.weight"


def test_a_late_group_trains_in_every_stage_and_a_refused_one_leaves_no_trace():
    task = problem("mlp")
    optimizer = Handover(task.params[:2], [Stage(Adam, steps=2), Stage(SMD, lr=0.01)])
    run(optimizer, task, 1)
    with pytest.raises(TypeError, match=r"Parameter number 0 has dtype torch\.complex64"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1, dtype=torch.complex64))]})
    assert [len(o.param_groups) for o in optimizer._optimizers] == [1, 1]
    optimizer.add_param_group({"params": iter(task.params[2:]), "lr": 0.05})
    assert [g["lr"] for g in optimizer._optimizers[0].param_groups] == [1e-3, 0.05]
    assert [g["lr"] for g in optimizer._optimizers[1].param_groups] == [0.01, 0.01]
    for _ in range(3):
        before = task.params[-1].detach().clone()
        run(optimizer, task, 1)
        assert not torch.equal(task.params[-1], before)


def test_a_late_group_is_refused_where_lbfgs_would_fail_on_it_later():
    task = problem("mlp")
    optimizer = Handover(task.params[:2], [Stage(Adam, steps=2), Stage(LBFGS)])
    with pytest.raises(ValueError, match="LBFGS, which has one parameter group only"):
        optimizer.add_param_group({"params": task.params[2:]})


def test_zero_grad_clears_every_gradient():
    task = problem("mlp")
    optimizer = Handover(task.params, schedule())
    task.closure()()
    optimizer.zero_grad()
    assert all(p.grad is None for p in task.params)


def test_hooks_of_the_step_are_called_once_in_every_stage():
    task = problem("mlp")
    optimizer = Handover(task.params, [Stage(Adam, steps=1), Stage(NewtonCG)])
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    run(optimizer, task, 2)
    assert called == ["before", "after"] * 2


def test_the_state_of_another_schedule_is_refused():
    task = problem("mlp")
    optimizer = Handover(task.params, [Stage(Adam, steps=1), Stage(NewtonCG)])
    other = Handover(task.params, [Stage(Adam, steps=1), Stage(SMD)])
    with pytest.raises(ValueError, match=r"\['Adam', 'SMD'\], and this is a Handover of \['Adam',"):
        optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="The state is of no Handover"):
        optimizer.load_state_dict(Adam(task.params).state_dict())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda w: [], ValueError, r"stages=\[\]: expected at least one"),
        (lambda w: [Adam], TypeError, r"stages\[0\] is a type, expected a hvpopt\.Stage"),
        (lambda w: [Stage(Adam), Stage(SGD)], ValueError, r"stages\[0\] never hands over"),
        (lambda w: [Stage(Adam, steps=3)], ValueError, r"stages\[0\] is the last stage and has"),
        (lambda w: {"a": None}, ValueError, r"stages={'a': None}: expected at least one"),
        (lambda w: {"a": Stage(Adam), "b": Stage(SGD)}, ValueError, r"stages\['a'\] never hands"),
        (lambda w: [Stage(Adam, steps=0)], ValueError, "steps=0 is out of range"),
        (lambda w: [Stage(Adam, stall_tolerance=-1)], ValueError, "stall_tolerance=-1 is out of"),
        (lambda w: [Stage(Adam, stall_window=0)], ValueError, "stall_window=0 is out of range"),
        (lambda w: [Stage(Adam([w]))], TypeError, "got a Adam, expected a class such as"),
        (lambda w: [Stage(lambda groups: groups)], TypeError, "A stage made a list, expected"),
        (lambda w: [Stage(Adam, momentum=1)], TypeError, "unexpected keyword argument 'momentum'"),
        (lambda w: [Stage(Adam, steps=1), Stage(SMD, lr=-1)], ValueError, "lr=-1 is out of range"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_at_once(make, error, message):
    w = nn.Parameter(torch.ones(1))
    with pytest.raises(error, match=message):
        Handover([w], make(w))


def test_other_optimizers_of_torch_take_part():
    torch.manual_seed(0)
    net = nn.Linear(3, 2, bias=False)
    optimizer = Handover(net.parameters(), [Stage(Muon, steps=2), Stage(NewtonCG)])
    x = torch.randn(5, 3)
    loss = closure_of(optimizer, lambda: F.mse_loss(net(x), x[:, :2]))
    assert [optimizer.step(loss) for _ in range(4)][-1] < 1e-3


def test_it_says_which_stage_is_current():
    w, closure = scripted([1.0] * 2)
    optimizer = Handover([w], [Stage(Adam, steps=1), Stage(SGD)])
    assert "* Adam (" in repr(optimizer)
    optimizer.step(closure)
    optimizer.step(closure)
    assert "  Adam (" in repr(optimizer)
    assert "* SGD (" in repr(optimizer)


def test_the_configuration_makes_a_schedule():
    config = OmegaConf.load(Path(hvpopt.__file__).parents[1] / "conf/optimizer/handover.yaml")
    task = problem("mlp")
    optimizer = hydra.utils.instantiate(config, _convert_="all")(task.params)
    assert [type(o).__name__ for o in optimizer._optimizers] == ["Adam", "LBFGS", "NewtonCG"]
    assert [stage.steps for stage in optimizer._stages] == [1000, None, None]
    run(optimizer, task, 1)
    config.stages.lbfgs = None
    optimizer = hydra.utils.instantiate(config, _convert_="all")(task.params)
    assert [type(o).__name__ for o in optimizer._optimizers] == ["Adam", "NewtonCG"]


def test_a_stage_says_what_it_is():
    assert repr(Stage(torch.optim.Adam, steps=3, lr=0.1)) == "Stage(Adam, steps=3, lr=0.1)"
