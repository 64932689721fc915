"""Kronecker factors of unusual closures, of loaded optimizers, and over ranks."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from kronecker_cases import (
    factors,
    point_of,
    refreshed,
    run_with,
)
from problems import flat, problem
from ranks import in_two_processes
from torch import nn
from torch.utils.checkpoint import checkpoint

import hvpopt
from hvpopt.closure import ClosureOracle
from hvpopt.preconditioners.kronecker import Kronecker


def states_of(closure, params):
    states = [{} for _ in params]
    with ClosureOracle(closure, params) as oracle:
        Kronecker().refresh(point_of(oracle, params), states)
    return states


def test_checkpointed_layers_have_the_same_factors():
    task = problem("mlp")
    plain = refreshed(task, Kronecker())
    forward = lambda x: checkpoint(task.net, x, use_reentrant=False)  # noqa: E731
    for state, expected in zip(states_of(run_with(task, forward), task.params), plain, strict=True):
        torch.testing.assert_close(state, expected)


def test_under_autocast_the_factors_are_nearly_those_of_float32():
    task = problem("mlp", torch.float32)
    plain = refreshed(task, Kronecker())

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            return task.net(x).float()

    found = states_of(run_with(task, forward), task.params)
    for i in (0, 2, 4):
        for ours, expected in zip(factors(found[i]), factors(plain[i]), strict=True):
            assert (ours - expected).norm() < 0.05 * expected.norm()


def test_two_backward_passes_add_their_curvatures():
    task = problem("mlp")
    x, y = task.x, torch.arange(6) % 3

    def closure(*slices):
        def run():
            task.net.zero_grad()
            losses = []
            for rows in slices:
                losses.append(F.cross_entropy(task.net(x[rows]), y[rows], reduction="sum"))
                losses[-1].backward()
            return sum(losses)

        return run

    head, tail = slice(0, 3), slice(3, 6)
    both = states_of(closure(head, tail), task.params)
    first = factors(states_of(closure(head), task.params)[0])
    # of the second, the same generator goes on: only its inputs are known in advance
    a = torch.cat([x, torch.ones(6, 1)], 1)
    columns = [a[rows].T @ a[rows] / 3 for rows in (head, tail)]
    torch.testing.assert_close(first[1][0], columns[0])
    rows, mixed = factors(both[0])
    share = torch.linalg.lstsq(
        torch.stack([c.reshape(-1) for c in columns], 1), mixed.reshape(-1, 1)
    ).solution
    assert float(share.sum()) == pytest.approx(1.0)
    assert float(share.min()) > 0
    torch.testing.assert_close(
        mixed[0], float(share[0]) * columns[0] + float(share[1]) * columns[1]
    )
    assert rows[0].trace() > first[0][0].trace()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loaded_optimizer_goes_on_bit_for_bit(dtype):
    def optimizer_of(task):
        return hvpopt.NewtonCG(task.params, preconditioner=Kronecker(every=2), max_cg_steps=5)

    task = problem("transformer", dtype)
    optimizer = optimizer_of(task)
    for _ in range(3):
        optimizer.step(task.closure())
    twin = copy.deepcopy(task)
    other = optimizer_of(twin)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(3):
        optimizer.step(task.closure())
        other.step(twin.closure())
    assert torch.equal(flat(task.params), flat(twin.params))


def _rank_task(rank):
    task = problem("transformer")
    task.x = torch.cat([task.x, task.x])[3 * rank : 3 * rank + 3]
    task.loss = lambda z: F.cross_entropy(z, torch.arange(3))
    task.net = nn.parallel.DistributedDataParallel(task.net)
    return task


def _gathered(value):
    both = [None, None]
    torch.distributed.all_gather_object(both, value)
    return both


def _parallel_factors(rank):
    task, results = _rank_task(rank), []
    for local in (False, True):
        states = [{} for _ in task.params]
        with ClosureOracle(task.closure(), task.params, local=local) as oracle:
            Kronecker().refresh(point_of(oracle, task.params), states)
        results.append(states)

    def forward(x):  # on one of the ranks, the head's weight is hidden
        head = task.net.module.head
        with torch.nn.utils.stateless._reparametrize_module(
            head, {"weight": head.weight * 1.0} if rank else {}
        ):
            return task.net(x)

    results.append(states_of(run_with(task, forward), task.params))
    return _gathered(results)


def test_all_ranks_hold_the_mean_of_their_factors(tmp_path):
    (first, first_own, odd), (second, second_own, even) = in_two_processes(
        _parallel_factors, tmp_path
    )
    for one, two in zip(first + odd, second + even, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    for mean, own, other in zip(first, first_own, second_own, strict=True):
        if "diagonal" in mean["kronecker"]:
            parts = [s["kronecker"]["diagonal"] for s in (mean, own, other)]
            torch.testing.assert_close(parts[0], (parts[1] + parts[2]) / 2)
        elif "rows" in mean["kronecker"]:
            for m, a, b in zip(*map(factors, (mean, own, other)), strict=True):
                torch.testing.assert_close(m, (a + b) / 2)
    assert "diagonal" in odd[-2]["kronecker"]
    assert "rows" in odd[-4]["kronecker"]
