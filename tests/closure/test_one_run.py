"""What a closure's further runs must not leave behind."""

import copy
import random
from collections import defaultdict, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain_runs import as_after_one_plain_run
from problems import EXACT, PROBLEMS, problem
from torch import nn

import hvpopt
from hvpopt.closure import ClosureOracle
from hvpopt.isolation import World
from hvpopt.silence import _SilentLogger


@pytest.mark.parametrize("engine", [*EXACT, "finite_difference"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_trace_leaves_the_world_as_one_plain_run_does(name, engine):
    with as_after_one_plain_run(name) as task:
        with ClosureOracle(task.closure(), task.params, engine=engine) as oracle:
            point = oracle.trace()
            point.product(task.tangent())
            torch.testing.assert_close(oracle.evaluate(), point.loss, rtol=0, atol=0)
            point.product(task.tangent(2))


def test_evaluations_elsewhere_see_the_same_dropout_mask():
    task = problem("dropout")
    with ClosureOracle(task.closure(), task.params) as oracle:
        point = oracle.trace()
        values = [float(oracle.evaluate()) for _ in range(3)]
        with torch.no_grad():
            task.params[0].add_(0.1)
        moved = float(oracle.evaluate())
    assert values == [float(point.loss)] * 3
    assert moved != values[0]


class Hoarder(nn.Module):
    """Keeps state in every way that a module can."""

    count = 0  # of the class, until the first call

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.history = {"loss": []}
        self.by_name = defaultdict(list)
        self.cycle = [1]
        self.cycle.append(self.cycle)
        self.queue = deque(maxlen=3)
        self.array = np.zeros(2)
        self.generator = torch.Generator().manual_seed(1)
        self.numpy_generator = np.random.default_rng(2)
        self.register_buffer("calls", torch.zeros(()))
        self.last = None

    def forward(self, x):
        self.count += 1
        self.late = getattr(self, "late", 0) + 1
        self.calls += 1
        self.array += 1
        self.queue.append(self.count)
        noise = torch.rand((), generator=self.generator) + self.numpy_generator.random()
        z = self.layer(x) * (1 + 0.1 * noise + 0.1 * random.random())
        self.history["loss"].append(float(noise))
        self.by_name["z"].append(1)
        self.last = z
        self.eval()
        return z

    def seen(self):
        return {
            "count": (self.count, self.late, int(self.calls), self.array.tolist()),
            "lists": (list(self.queue), self.history, dict(self.by_name)),
            "generators": (self.generator.get_state().tolist(), self.numpy_generator.random()),
            "last": self.last.detach(),
            "training": self.training,
            "random": random.random(),
        }


@pytest.mark.parametrize("engine", ["auto", "dual", "graph", "finite_difference"])
def test_a_module_that_keeps_state_in_every_way_sees_one_run(engine):
    def one(run):
        torch.manual_seed(0)
        random.seed(0)
        net = Hoarder()
        x = torch.randn(5, 3)

        def closure():
            net.zero_grad()
            loss = F.cross_entropy(net(x), torch.tensor([0, 1, 2, 0, 1]))
            loss.backward()
            return loss

        run(closure, net)
        return net.seen()

    def several(closure, net):
        params = list(net.parameters())
        with ClosureOracle(closure, params, engine=engine) as oracle:
            point = oracle.trace()
            point.product([torch.ones_like(p) for p in params])
            assert oracle.evaluate() == point.loss

    assert str(one(several)) == str(one(lambda closure, net: closure()))


def test_further_runs_end_at_their_last_backward():
    task = problem("mlp")
    plain, after = task.closure(), []

    def closure():
        loss = plain()
        after.append(1)
        return loss

    with ClosureOracle(closure, task.params, engine="graph") as oracle:
        oracle.trace()
        oracle.evaluate()
        oracle.evaluate()
    assert len(after) == 1


def test_a_skipped_first_batch_still_ran_once():
    task = problem("batchnorm")

    def closure():
        task.net(task.x)

    optimizer = hvpopt.NewtonCG(task.params)
    assert optimizer.step(closure) is None
    assert optimizer.last_report.outcome.name == "SKIPPED"
    assert int(task.net[1].num_batches_tracked) == 1


def test_copied_optimizers_go_on():
    task = problem("mlp")
    optimizer = hvpopt.NewtonCG(task.params)
    optimizer.step(task.closure())
    twin = copy.deepcopy(optimizer)
    assert twin.last_report == optimizer.last_report
    assert len(twin.state) == len(optimizer.state)
    with pytest.raises(RuntimeError, match="No parameter of the optimizer got a gradient"):
        twin.step(task.closure())  # it has copies of the parameters, on which no loss depends


def test_a_silent_logger_says_where_it_logs_and_takes_the_rest():
    class Logger:
        log_dir = "runs/1"
        experiment = object()

    quiet = _SilentLogger(Logger())
    assert quiet.log_dir == "runs/1"
    quiet.experiment["loss"].append(1.0)
    quiet.experiment["loss"] = 2.0
    with quiet.experiment.run() as run:
        run.log(1)
    with pytest.raises(AttributeError):
        quiet.nothing  # noqa: B018


def test_the_module_that_lightnings_strategy_calls_is_known_before_the_first_run():
    module, wrapper = nn.Linear(2, 2), nn.Sequential()
    vars(module)["_trainer"] = SimpleNamespace(strategy=SimpleNamespace(model=wrapper))
    world = World(lambda: module, list(module.parameters()))
    assert any(m is wrapper for m in world.modules)
