"""Which engine serves a closure, and what the log says of it."""

import torch
import torch.nn.functional as F
from cubes import Once
from problems import flat, problem
from torch import Tensor, nn

import hvpopt
from hvpopt.closure import ClosureOracle
from hvpopt.engines.choice import EngineChoice


def test_the_engine_is_chosen_once_by_need_and_logged(caplog):
    caplog.set_level("INFO", "hvpopt")
    task, choice = problem("mlp"), EngineChoice()
    for _ in range(2):
        with ClosureOracle(task.closure(), task.params, engine=choice) as oracle:
            oracle.trace("ggn")
        with ClosureOracle(task.closure(), task.params, engine=choice) as oracle:
            oracle.trace_along(task.tangent(), "ggn")
            assert oracle.num_runs in (1, 2)  # the probe comes before the first run only
        with ClosureOracle(task.closure(), task.params, engine=choice) as oracle:
            oracle.trace_along(task.tangent(), "hessian")
    assert [r.message for r in caplog.records] == [
        "Products of the ggn by engine graph (best for many products).",
        "Products of the ggn by engine dual (best for one product).",
        "Products of the hessian by engine graph (best for one product).",
    ]


def test_the_dual_engine_becomes_thorough_where_it_must(caplog):
    caplog.set_level("INFO", "hvpopt")
    task = problem("mlp")  # SiLU's backward kernel has no forward-mode formula
    with ClosureOracle(task.closure(), task.params, engine="dual") as oracle:
        oracle.trace_along(task.tangent())
    assert "(dual failed: no forward mode of silu_backward in module '3' (SiLU))" in caplog.text
    assert "engine dual (thorough)" in caplog.text


def test_what_torch_cannot_differentiate_twice_falls_to_finite_differences(caplog):
    caplog.set_level("INFO", "hvpopt")

    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))

    def closure() -> Tensor:
        w.grad = None
        loss = Once.apply(w).sum()
        loss.backward()
        return loss

    v = torch.ones(2, dtype=torch.float64)
    with ClosureOracle(closure, [w]) as oracle:
        (product,) = oracle.trace().product([v])
    torch.testing.assert_close(product, 6 * w.detach(), rtol=1e-8, atol=0)
    assert "engine finite_difference (graph failed" in caplog.text


def test_the_ggn_is_the_graph_engines_for_many_products_and_the_dual_engines_for_one(caplog):
    caplog.set_level("INFO", "hvpopt")
    task = problem("batchnorm")
    with ClosureOracle(task.closure(), task.params) as oracle:
        product = oracle.trace("ggn").product(task.tangent())
        along = oracle.trace_along(task.tangent(), "ggn")[2]
    expected = task.dense_ggn() @ flat(task.tangent())
    torch.testing.assert_close(flat(product), expected)
    torch.testing.assert_close(flat(along), expected)
    assert "ggn by engine graph (best for many products)" in caplog.text
    assert "ggn by engine dual (best for one product)" in caplog.text


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
