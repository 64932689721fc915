"""The split of an unchanged closure into outputs and loss, seen by the GGN that it gives."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from problems import EXACT, flat, problem
from torch import Tensor, nn

from hvpopt.closure import ClosureOracle
from hvpopt.engines.split import SplitNotFoundError


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: F.nll_loss(F.log_softmax(z, 1), y),
        lambda z, y: nn.NLLLoss()(z.log_softmax(dim=-1), y),
        lambda z, y: nn.CrossEntropyLoss()(z, y),
        lambda z, y: F.cross_entropy(input=z, target=y, reduction="sum") / len(y),
        lambda z, y: F.cross_entropy(z, y, reduction="none").mean(),
        lambda z, y: F.kl_div(F.log_softmax(z, 1), F.one_hot(y, 3).double(), reduction="batchmean"),
    ],
)
@pytest.mark.parametrize("engine", EXACT)
def test_every_spelling_of_cross_entropy_gives_its_ggn(engine, loss):
    task = problem("mlp")
    expected = task.dense_ggn() @ flat(task.tangent())
    task.loss = lambda z: loss(z, torch.arange(6) % 3)
    with ClosureOracle(task.closure(), task.params, engine=engine) as oracle:
        product = oracle.trace_along(task.tangent(), "ggn")[2]
    torch.testing.assert_close(flat(product), expected)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_a_penalty_in_the_closure_adds_its_hessian(curvature):
    task = problem("mlp")
    plain = task.dense_ggn() if curvature == "ggn" else task.dense_hessian()

    def closure() -> Tensor:
        task.net.zero_grad()
        penalty = sum(p.square().sum() for p in task.params)
        loss = task.loss(task.net(task.x)) + 0.3 * penalty
        loss.backward()
        return loss

    v = task.tangent()
    with ClosureOracle(closure, task.params, engine="auto") as oracle:
        point = oracle.trace(curvature)
        product = point.product(v)
    torch.testing.assert_close(flat(product), plain @ flat(v) + 0.6 * flat(v))
    assert point.has_remainder == (curvature == "ggn")
    with ClosureOracle(closure, task.params) as oracle:  # the dual engine gives way to the graph
        torch.testing.assert_close(
            flat(oracle.trace_along(v, curvature)[2]), plain @ flat(v) + 0.6 * flat(v)
        )


def test_the_ggn_of_a_loss_of_two_outputs_keeps_their_cross_terms():
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(3, dtype=torch.float64))

    def closure() -> Tensor:
        w.grad = None
        loss = F.mse_loss(w.sin(), w.cos(), reduction="sum")
        loss.backward()
        return loss

    v = torch.randn(3, dtype=torch.float64)
    with ClosureOracle(closure, [w]) as oracle:
        (product,) = oracle.trace("ggn").product([v])
    slope = w.cos() + w.sin()  # of the residual sin w − cos w
    torch.testing.assert_close(product, (2 * slope**2 * v).detach())


def test_a_ggn_without_a_loss_function_names_the_remedy():
    task = problem("mlp")
    task.loss = lambda z: (z**2).mean()
    with ClosureOracle(task.closure(), task.params) as oracle:
        with pytest.raises(SplitNotFoundError, match=r"F\.mse_loss.*curvature='hessian'"):
            oracle.trace("ggn")


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

    def example():
        x = task.x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(task.net(x), y), x)
        return x.detach() + 0.1 * slope.sign()

    def closure():
        task.net.zero_grad()
        loss = F.cross_entropy(task.net(example()), y)
        loss.backward()
        return loss

    closure()
    expected, v = flat([p.grad for p in task.params]), task.tangent()
    with ClosureOracle(closure, task.params) as oracle:
        point = oracle.trace("ggn")
        torch.testing.assert_close(flat(point.grad), expected)
        product = flat(point.product(v))
    torch.testing.assert_close(product, replace(task, x=example()).dense_ggn() @ flat(v))


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
