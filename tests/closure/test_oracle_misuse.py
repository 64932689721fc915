"""Closures, parameters and options of an oracle that cannot work are named."""

import copy

import pytest
import torch
import torch.nn.functional as F
from problems import problem
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hvpopt
from hvpopt.closure import ClosureOracle, NoBackwardError
from hvpopt.engines.ranks import ShardedModuleError


def test_an_error_in_the_closure_is_the_closures_own():
    task = problem("mlp")
    task.x = task.x[:, :3]
    before = copy.deepcopy(task.net.state_dict())
    with ClosureOracle(task.closure(), task.params) as oracle:
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            oracle.trace()
    assert all(torch.equal(before[k], v) for k, v in task.net.state_dict().items())


@pytest.mark.parametrize("engine", ["dual", "graph", "finite_difference", "auto"])
def test_a_closure_without_backward_is_named(engine):
    task = problem("mlp")
    with ClosureOracle(lambda: task.loss(task.net(task.x)), task.params, engine=engine) as oracle:
        with pytest.raises(NoBackwardError, match=r"never called loss\.backward\(\)"):
            oracle.trace()


def test_a_loss_that_is_no_scalar_is_named():
    task = problem("mlp")
    task.loss = lambda z: z
    closure = task.closure()
    with ClosureOracle(closure, task.params) as oracle:
        with pytest.raises(ValueError, match=r"shape \(6, 3\).*real scalar loss"):
            oracle.trace()


def test_unknown_names_are_refused():
    task = problem("mlp")
    with pytest.raises(ValueError, match="engine='fast' is unknown: choose one of 'auto'"):
        ClosureOracle(task.closure(), task.params, engine="fast")
    with ClosureOracle(task.closure(), task.params) as oracle:
        with pytest.raises(ValueError, match=r"'kfac' is unknown.* 'empirical_fisher', or"):
            oracle.trace("kfac")
    with pytest.raises(ValueError, match=r"Finite differences.* not the GGN"):
        with ClosureOracle(task.closure(), task.params, engine="finite_difference") as oracle:
            oracle.trace("ggn")


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([], ValueError, r"no parameters: .* list\(model\.parameters\(\)\)"),
        ([{"params": []}], TypeError, "number 0 is a dict, where a tensor is expected"),
        ([nn.Parameter(torch.ones(1)), 2.0], TypeError, "number 1 is a float"),
        (
            [nn.Parameter(torch.ones(2, 3), requires_grad=False)],
            ValueError,
            r"number 0 \(shape \(2, 3\)\) has requires_grad=False: leave it out, or unfreeze",
        ),
    ],
)
def test_parameters_that_cannot_be_differentiated_by_are_refused(params, error, message):
    with pytest.raises(error, match=message):
        ClosureOracle(lambda: None, params)


def test_an_oracle_works_inside_its_context_only():
    task = problem("mlp")
    oracle = ClosureOracle(task.closure(), task.params)
    with pytest.raises(RuntimeError, match="context manager"):
        oracle.trace()
    with oracle:
        point = oracle.trace()
    with pytest.raises(RuntimeError, match="released"):
        point.product(task.tangent())


def test_sharded_modules_are_refused():
    class FullyShardedDataParallel(nn.Linear):
        pass

    torch.manual_seed(0)
    net = FullyShardedDataParallel(2, 2)

    def closure() -> Tensor:
        loss = net(torch.ones(1, 2)).sum()
        loss.backward()
        return loss

    with ClosureOracle(closure, list(net.parameters())) as oracle:
        with pytest.raises(ShardedModuleError, match="strategy='ddp'"):
            oracle.trace()


def test_reentrant_checkpointing_is_refused_by_name():
    block = nn.Linear(3, 3)

    def closure():
        block.zero_grad()
        x = torch.ones(2, 3, requires_grad=True)
        loss = F.mse_loss(checkpoint(block, x, use_reentrant=True), torch.zeros(2, 3))
        loss.backward()
        return loss

    optimizer = hvpopt.NewtonCG(block.parameters())
    with pytest.raises(RuntimeError, match=r"use_reentrant=True.*use use_reentrant=False"):
        optimizer.step(closure)


def test_backward_by_inputs_is_refused():
    task = problem("mlp")

    def closure():
        task.loss(task.net(task.x)).backward(inputs=task.params[:1])

    with ClosureOracle(closure, task.params) as oracle:
        with pytest.raises(ValueError, match=r"requires_grad_.False."):
            oracle.trace()


@pytest.mark.parametrize("make", [hvpopt.NewtonCG, hvpopt.SMD])
@pytest.mark.parametrize("engine", ["auto", "graph", "dual"])
def test_a_forgotten_backward_is_named_at_the_first_step(make, engine):
    task = problem("mlp")
    optimizer = make(task.params, engine=engine)
    with pytest.raises(NoBackwardError, match=r"never called loss\.backward\(\)"):
        optimizer.step(lambda: task.loss(task.net(task.x)))
