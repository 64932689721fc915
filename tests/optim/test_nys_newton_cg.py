import pytest
import torch
from problems import closure_of, problem

import hvpopt
from hvpopt.preconditioners import Nystrom
from hvpopt.solvers.stopping import RelativeProgress


def test_the_preset_is_newton_cg_with_its_options():
    def trained(make):
        task = problem("mlp")
        optimizer = make(task.params)
        for _ in range(4):
            optimizer.step(closure_of(optimizer, lambda: task.loss(task.net(task.x))))
        return task.params, optimizer

    ours, preset = trained(lambda p: hvpopt.NysNewtonCG(p, damping=0.1, rank=8, every=2, seed=3))
    theirs, _ = trained(
        lambda p: hvpopt.NewtonCG(
            p, damping=0.1, curvature="hessian", preconditioner=Nystrom(rank=8, every=2),
            max_cg_steps=1000, cg_stop=RelativeProgress(), momentum=0.0, damping_factor=1.0,
            sufficient_decrease=0.1, seed=3,
        )
    )  # fmt: skip
    assert all(map(torch.equal, ours, theirs))
    assert preset.param_groups[0]["damping"] == 0.1  # it stays
    assert preset.last_report.objective_after < preset.last_report.objective


def test_its_options_are_checked_too():
    w = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="rank=0"):
        hvpopt.NysNewtonCG([w], rank=0)
    with pytest.raises(ValueError, match=r"damping=-1\.0 is out of range"):
        hvpopt.NysNewtonCG([w], damping=-1.0)
