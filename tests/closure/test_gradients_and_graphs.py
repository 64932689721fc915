"""Gradients, hooks and graphs around a trace are those of one plain run."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from problems import flat, problem
from torch import nn

import hvpopt
from hvpopt.closure import ClosureOracle


def test_the_graph_outlives_evaluations_of_a_network_with_buffers():
    task = problem("batchnorm")
    v = task.tangent()
    with ClosureOracle(task.closure(), task.params, engine="graph") as oracle:
        point = oracle.trace()
        before = point.product(v)
        oracle.evaluate()
        assert torch.equal(flat(point.product(v)), flat(before))


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


def test_hooks_on_parameters_fire_once_a_run_and_leave_products_alone():
    task, plain = problem("mlp"), problem("mlp")
    calls = []
    task.params[0].register_hook(lambda g: calls.append(1) or g.clamp(-1e-3, 1e-3))
    v = task.tangent()
    with ClosureOracle(task.closure(), task.params, engine="graph") as oracle:
        point = oracle.trace()
        products = [flat(point.product(v)) for _ in range(3)]
    assert len(calls) == 1
    for product in products:
        torch.testing.assert_close(product, plain.dense_hessian() @ flat(v))
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
