import copy
import io
import logging
import math
import pickle
from functools import partial

import pytest
import torch
import torch.distributed as dist
from problems import closure_of, flat, problem
from test_ddp import in_two_processes
from torch import nn
from torch.optim import LBFGS as TorchLBFGS
from torch.optim import SGD, Adam

from hvpopt.optim.handover import Handover
from hvpopt.optim.newton_cg import NewtonCG
from hvpopt.optim.report import NewtonCGReport
from hvpopt.optim.sophia import SophiaG
from hvpopt.optim.stages import Stage

LBFGS = partial(TorchLBFGS, max_iter=4, line_search_fn="strong_wolfe")


def schedule():
    return [
        Stage(Adam, steps=3, lr=1e-2),
        Stage(LBFGS, steps=2),
        Stage(SophiaG, steps=5, update_every=3),
        Stage(NewtonCG, damping=0.1, max_cg_steps=5),
    ]


def run(optimizer, task, num_steps):
    closure = closure_of(optimizer, lambda: task.loss(task.net(task.x)))
    return [float(optimizer.step(closure).detach()) for _ in range(num_steps)]


def test_the_steps_are_those_of_the_optimizers_one_after_the_other():
    ours, theirs = problem("dropout"), problem("dropout")
    optimizer = Handover(ours.params, schedule())
    torch.manual_seed(1)
    losses = run(optimizer, ours, 13)
    torch.manual_seed(1)
    expected = []
    for make, num_steps in (
        (partial(Adam, lr=1e-2), 3),
        (LBFGS, 2),
        (partial(SophiaG, update_every=3), 5),
        (partial(NewtonCG, damping=0.1, max_cg_steps=5), 3),
    ):
        expected += run(make(theirs.params), theirs, num_steps)
    assert losses == expected
    assert torch.equal(flat(ours.params), flat(theirs.params))


def test_each_stage_calls_the_closure_as_it_does_alone():
    task = problem("mlp")
    optimizer = Handover(task.params, [Stage(Adam, steps=2), Stage(LBFGS, steps=1), Stage(SGD)])
    calls = []

    def loss():
        calls.append(1)
        return task.loss(task.net(task.x))

    counts = []
    for _ in range(4):
        calls.clear()
        optimizer.step(closure_of(optimizer, loss))
        counts.append(len(calls))
    assert counts[:2] == [1, 1]
    assert 2 <= counts[2] <= 5  # up to max_eval = 4 · 5/4
    assert counts[3] == 1


def scripted(losses):
    """A closure whose loss follows a script, whatever the parameters are."""
    w = nn.Parameter(torch.zeros(1))
    script = iter(losses)

    def closure():
        w.grad = None
        loss = w.sum() + next(script)
        loss.backward()
        return loss

    return w, closure


def num_steps_of_first_stage(losses, **options):
    w, closure = scripted(losses)
    optimizer = Handover([w], [Stage(SGD, lr=0.0, **options), Stage(SGD, lr=0.0)])
    for step in range(len(losses)):
        before = optimizer.optimizer
        optimizer.step(closure)
        if optimizer.optimizer is not before:
            return step
    return None


def test_a_stage_ends_when_the_mean_loss_of_a_window_falls_too_little():
    falling = [8, 8, 4, 4, 2, 2, 1, 1]
    assert num_steps_of_first_stage(falling, stall_tolerance=0.5, stall_window=2) == 4
    assert num_steps_of_first_stage(falling, stall_tolerance=0.49, stall_window=2) is None
    noisy = [8, 0, 4, 3, 2, 4, 2, 4, 9]  # means 4, 3.5, 3, 3
    assert num_steps_of_first_stage(noisy, stall_tolerance=0, stall_window=2) == 8
    assert num_steps_of_first_stage(noisy, stall_tolerance=0.13, stall_window=2) == 4
    negative = [-1, -2, -2.1, -2.1]
    assert num_steps_of_first_stage(negative, stall_tolerance=0.1, stall_window=1) == 3
    both = [8, 4, 2, 1, 0.5]
    assert num_steps_of_first_stage(both, steps=3, stall_tolerance=0, stall_window=1) == 3


def test_a_window_with_a_loss_that_is_not_finite_is_left_out():
    losses = [4, 4, math.nan, 1, math.inf, 1, 3, 3, 3, 3, 0]  # means 4, –, –, 3, 3
    assert num_steps_of_first_stage(losses, stall_tolerance=0.1, stall_window=2) == 10


def test_a_hand_over_writes_one_line(caplog):
    caplog.set_level(logging.INFO, logger="hvpopt")
    w, closure = scripted([2.0] * 6)
    stages = [
        Stage(SGD, steps=2, lr=0),
        Stage(Adam, stall_tolerance=0.1, stall_window=1),
        Stage(SGD),
    ]
    optimizer = Handover([w], stages)
    for _ in range(6):
        optimizer.step(closure)
    assert [record.getMessage() for record in caplog.records] == [
        "Adam takes over from SGD after 2 steps.",
        "SGD takes over from Adam after 2 steps (its loss stalled at 1.999).",
    ]


def test_the_state_of_a_stage_that_is_over_is_freed():
    task = problem("mlp")
    optimizer = Handover(task.params, [Stage(Adam, steps=2), Stage(SGD, lr=0.1, momentum=0.9)])
    run(optimizer, task, 2)
    first = optimizer.optimizer
    assert len(first.state) == len(task.params)
    run(optimizer, task, 1)
    assert len(first.state) == 0
    assert optimizer.state is optimizer.optimizer.state
    assert set(optimizer.state[task.params[0]]) == {"momentum_buffer"}


@pytest.mark.parametrize("how", ["state_dict", "file", "deepcopy", "pickle"])
@pytest.mark.parametrize("num_steps", [0, 2, 3, 4, 7, 11])
def test_a_run_resumed_in_any_stage_continues_bit_for_bit(num_steps, how):
    torch.manual_seed(0)
    whole = problem("dropout", torch.float32)
    one = Handover(whole.params, schedule())
    run(one, whole, num_steps)
    random, params = torch.get_rng_state(), [p.detach().clone() for p in whole.params]
    if how == "deepcopy":
        part, two = copy.deepcopy((whole, one))
    elif how == "pickle":
        part = problem("dropout", torch.float32)
        part.net, two = pickle.loads(pickle.dumps((whole.net, one)))
    else:
        part = problem("dropout", torch.float32)
        two = Handover(part.params, schedule())
        saved = copy.deepcopy(one.state_dict())
        if how == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        two.load_state_dict(saved)
        with torch.no_grad():
            for p, value in zip(part.params, params, strict=True):
                p.copy_(value)
    torch.set_rng_state(random)
    expected = run(one, whole, 6)
    torch.set_rng_state(random)
    assert run(two, part, 6) == expected
    assert torch.equal(flat(whole.params), flat(part.params))


def test_a_stall_that_was_seen_before_the_checkpoint_counts_after_it():
    stages = [Stage(SGD, lr=0.0, stall_tolerance=0.1, stall_window=2), Stage(SGD, lr=0.0)]
    w, closure = scripted([1.0] * 8)
    whole = Handover([w], stages)
    for num_steps in (1, 2, 3, 4):
        whole.step(closure)
        again = Handover([w], stages)
        again.load_state_dict(copy.deepcopy(whole.state_dict()))
        for step in range(num_steps, 5):
            assert again.optimizer is again._optimizers[0], step
            again.step(closure_of(again, lambda: w.sum() + 1))
        assert again.optimizer is again._optimizers[1]


def test_the_report_is_that_of_the_stage():
    task = problem("mlp")
    optimizer = Handover(task.params, [Stage(Adam, steps=1), Stage(NewtonCG)])
    run(optimizer, task, 1)
    assert optimizer.last_report is None
    assert optimizer.num_products == 0
    run(optimizer, task, 1)
    assert isinstance(optimizer.last_report, NewtonCGReport)
    assert optimizer.num_products == optimizer.last_report.num_products > 0


def test_a_stage_that_watches_the_loss_needs_a_closure():
    w = nn.Parameter(torch.ones(1))
    optimizer = Handover([w], [Stage(Adam, stall_tolerance=0.1), Stage(SGD)])
    with pytest.raises(TypeError, match="the stage Adam ends when its loss stalls"):
        optimizer.step()
    optimizer = Handover([w], [Stage(Adam, steps=1), Stage(SGD)])
    w.grad = torch.ones(1)
    assert optimizer.step() is None


def _steps_before_the_hand_over(rank):
    net = nn.parallel.DistributedDataParallel(nn.Linear(1, 1))
    script = iter([[1.0] * 7, [8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125]][rank])
    stages = [Stage(SGD, lr=0.0, stall_tolerance=0.3, stall_window=1), Stage(SGD, lr=0.0)]
    optimizer = Handover(net.parameters(), stages)
    loss = closure_of(optimizer, lambda: 0 * net(torch.ones(1, 1)).sum() + next(script))
    steps = 0
    while optimizer._position.stage == 0:
        optimizer.step(loss)
        steps += 1
    both = [torch.tensor(0), torch.tensor(0)]
    dist.all_gather(both, torch.tensor(steps))
    return both


@pytest.mark.slow  # two processes that import Lightning
def test_ranks_hand_over_in_the_same_step_by_the_mean_of_their_losses(tmp_path):
    """The means fall by 44, 40, 33 and 25 percent; alone, the first rank's would not fall."""
    assert in_two_processes(_steps_before_the_hand_over, tmp_path) == [6, 6]
