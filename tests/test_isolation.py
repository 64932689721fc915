"""What a closure's further runs must not leave behind."""

import copy
import gc
import random
import weakref
from collections import defaultdict, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import flat, problem
from torch import nn
from torch.utils.checkpoint import checkpoint

import hvpopt
from hvpopt.closure import ClosureOracle, NoBackwardError
from hvpopt.isolation import World
from hvpopt.silence import _SilentLogger


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


def two_parts():
    torch.manual_seed(0)
    body, head = nn.Linear(4, 4), nn.Linear(4, 3)
    x = torch.randn(6, 4, requires_grad=True)
    parts = [body]  # in a list, where nobody looks for modules

    def closure():
        for p in (*body.parameters(), *head.parameters(), x):
            p.grad = None
        loss = F.cross_entropy(head(parts[0](x).tanh()), torch.arange(6) % 3)
        loss.backward()
        return loss

    return [*body.parameters(), x], list(head.parameters()), closure


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("engine", ["auto", "dual", "graph", "finite_difference"])
def test_leaves_outside_the_optimizer_get_their_plain_gradients(engine, curvature):
    if (engine, curvature) == ("finite_difference", "ggn"):
        pytest.skip("finite differences have no GGN")
    others, params, closure = two_parts()
    closure()
    expected = [p.grad.clone() for p in others]
    for p in others:
        p.grad = None
    for trace in (True, False):
        with ClosureOracle(closure, params, engine=engine) as oracle:
            v = [torch.ones_like(p) for p in params]
            if trace:
                point = oracle.trace(curvature)
                point.product(v)
                oracle.evaluate()
            else:
                oracle.trace_along(v, curvature)
        torch.testing.assert_close([p.grad for p in others], expected)


def test_losses_of_losses_keep_their_gradient_and_their_ggn():
    task = problem("mlp")
    y = torch.arange(6) % 3

    def loss(z):
        each = F.cross_entropy(z, y, reduction="none")
        return F.mse_loss(each, torch.zeros_like(each)) + F.mse_loss(z, torch.ones_like(z))

    task.loss = loss
    task.closure()()
    expected = flat([p.grad for p in task.params])
    v = task.tangent()
    for engine in ("graph", "dual"):
        with ClosureOracle(task.closure(), task.params, engine=engine) as oracle:
            point = oracle.trace("ggn")
            torch.testing.assert_close(flat(point.grad), expected)
            torch.testing.assert_close(flat(point.product(v)), task.dense_ggn() @ flat(v))


def test_gradients_inside_the_closure_work_under_the_ggn():
    """An adversarial example: the loss's gradient by the input, then the loss there."""
    task = problem("mlp")
    y = torch.arange(6) % 3

    def closure():
        task.net.zero_grad()
        x = task.x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(task.net(x), y), x)
        loss = F.cross_entropy(task.net(x.detach() + 0.1 * slope.sign()), y)
        loss.backward()
        return loss

    closure()
    expected = flat([p.grad for p in task.params])
    with ClosureOracle(closure, task.params) as oracle:
        point = oracle.trace("ggn")
        torch.testing.assert_close(flat(point.grad), expected)
        assert flat(task.tangent()) @ flat(point.product(task.tangent())) > 0


def test_functional_transforms_inside_the_closure_work_under_the_ggn():
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))

    def closure():
        w.grad = None
        inner = torch.func.grad(lambda u: F.mse_loss(u, torch.zeros_like(u)))(w)  # w, as n = 2
        loss = F.mse_loss(inner, torch.ones_like(inner))
        loss.backward()
        return loss

    with ClosureOracle(closure, [w]) as oracle:
        (product,) = oracle.trace("ggn").product([torch.ones_like(w)])
    torch.testing.assert_close(product, torch.ones_like(w))


def test_hooks_on_parameters_fire_once_a_run_and_leave_products_alone():
    task, plain = problem("mlp"), problem("mlp")
    calls = []
    task.params[0].register_hook(lambda g: calls.append(1) or g.clamp(-1e-3, 1e-3))
    v = task.tangent()
    with ClosureOracle(task.closure(), task.params, engine="graph") as oracle:
        point = oracle.trace()
        products = [flat(point.product(v)) for _ in range(3)]
    assert len(calls) == 1
    torch.testing.assert_close(products[0][20:], (plain.dense_hessian() @ flat(v))[20:])
    assert float(task.params[0].grad.abs().max()) <= 1e-3


@pytest.mark.parametrize("engine", ["graph", "dual", "finite_difference"])
def test_hooks_that_wait_for_a_gradient_see_it_once(engine):
    task = problem("mlp")
    seen = []
    task.params[0].register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    with ClosureOracle(task.closure(), task.params, engine=engine) as oracle:
        oracle.trace().product(task.tangent())
        oracle.evaluate()
    torch.testing.assert_close(seen, [task.params[0].grad])


@pytest.mark.parametrize("make", [hvpopt.NewtonCG, hvpopt.SMD])
@pytest.mark.parametrize("engine", ["graph", "dual"])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_no_graph_outlives_its_step_in_a_cycle_or_in_the_returned_loss(make, engine, curvature):
    task = problem("mlp")
    optimizer = make(task.params, curvature=curvature, engine=engine)
    nodes = []

    def closure():
        task.net.zero_grad()
        z = task.net(task.x)
        nodes.append(weakref.ref(z))
        loss = task.loss(z)
        loss.backward()
        return loss

    gc.collect()
    gc.disable()
    try:
        returned = optimizer.step(closure)
        assert not returned.requires_grad
        assert [ref() for ref in nodes] == [None] * len(nodes)
    finally:
        gc.enable()


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


@pytest.mark.parametrize("engine", ["graph", "dual"])
def test_checkpointed_recurrent_layers_have_products(engine):
    task, plain = problem("lstm"), problem("lstm")
    lstm = task.net.lstm

    def closure():
        task.net.zero_grad()
        hidden = checkpoint(lstm, task.x, use_reentrant=False)[0][:, -1]
        loss = task.loss(task.net.head(hidden))
        loss.backward()
        return loss

    with ClosureOracle(closure, task.params, engine=engine) as oracle:
        product = oracle.trace().product(task.tangent())
    torch.testing.assert_close(flat(product), plain.dense_hessian() @ flat(plain.tangent()))


@pytest.mark.parametrize("engine", ["graph", "dual", "finite_difference"])
def test_a_retained_graph_is_retained(engine):
    task = problem("mlp")

    def closure():
        task.net.zero_grad()
        z = task.net(task.x)
        task.loss(z).backward(retain_graph=True)
        (0.1 * (z**2).mean()).backward(torch.tensor(2.0, dtype=z.dtype))

    with ClosureOracle(closure, task.params, engine=engine) as oracle:
        product = oracle.trace().product(task.tangent())
    loss = task.loss
    task.loss = lambda z: loss(z) + 0.2 * (z**2).mean()
    expected = task.dense_hessian() @ flat(task.tangent())
    torch.testing.assert_close(flat(product), expected, rtol=1e-6, atol=1e-8)


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


def test_a_skipped_first_batch_still_ran_once():
    task = problem("batchnorm")

    def closure():
        task.net(task.x)

    optimizer = hvpopt.NewtonCG(task.params)
    assert optimizer.step(closure) is None
    assert optimizer.last_report.outcome.name == "SKIPPED"
    assert int(task.net[1].num_batches_tracked) == 1


def test_an_unfrozen_layer_is_probed_anew():
    torch.manual_seed(0)
    bag, head = nn.EmbeddingBag(10, 4), nn.Linear(4, 3)
    bag.requires_grad_(False)
    ids, y = torch.randint(10, (6, 3)), torch.arange(6) % 3
    optimizer = hvpopt.SMD(
        [*bag.parameters(), *head.parameters()], curvature="hessian", overshoot_guard=False
    )

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(bag(ids)), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    bag.requires_grad_(True)
    before = bag.weight.detach().clone()
    optimizer.step(closure)
    assert not torch.equal(before, bag.weight)


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
