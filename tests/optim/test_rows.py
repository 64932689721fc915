"""Gradient and Gauss-Newton matrix of a part of a batch's rows, against those rows alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from problems import closure_of, flat, problem
from torch import nn
from torch.utils.checkpoint import checkpoint

import hvpopt
from hvpopt.closure import ClosureOracle
from hvpopt.closure.rows import Rows
from hvpopt.optim.report import Outcome


def labels(num_rows):
    return torch.arange(num_rows) % 3


def dense(name, rows):
    """The GGN and the gradient of the loss of some rows alone."""
    task = problem(name)
    y = labels(len(task.x))[rows]
    task.x = task.x[rows]
    if name != "tied":  # whose loss is a mean over all entries
        task.loss = lambda z: F.cross_entropy(z, y)
    task.closure()()
    return task.dense_ggn(), flat([p.grad for p in task.params])


@pytest.mark.parametrize("engine", ["auto", "graph", "dual"])
@pytest.mark.parametrize("name", ["mlp", "transformer", "lstm", "tied"])
def test_gradient_and_ggn_of_a_part_are_those_of_its_rows(name, engine):
    task, rows = problem(name), Rows(0.4, seed=3)
    num_rows, v = len(task.x), task.tangent()
    with ClosureOracle(task.closure(), task.params, engine=engine) as oracle:
        whole = oracle.trace("ggn", rows=rows)
        parts = {which: oracle.of_part(whole, which) for which in ("part", "rest")}
        # in turns, as their graph is one
        products = {w: [flat(p.product(v)), flat(whole.product(v))] for w, p in parts.items()}
    everything = torch.arange(num_rows)
    assert len(rows.indices(num_rows, "part")) == round(0.4 * num_rows)
    both = torch.cat([rows.indices(num_rows, which) for which in parts])
    assert torch.equal(both.sort().values, everything)
    matrix, grad = dense(name, everything)
    torch.testing.assert_close(flat(whole.grad), grad)
    for which, point in parts.items():
        part_matrix, part_grad = dense(name, rows.indices(num_rows, which))
        torch.testing.assert_close(flat(point.grad), part_grad)
        torch.testing.assert_close(products[which][0], part_matrix @ flat(v))
        torch.testing.assert_close(products[which][1], matrix @ flat(v))
        assert point.loss == whole.loss


@pytest.mark.parametrize("setting", ["checkpointed", "bf16", "two backwards", "hooks"])
def test_parts_are_right_in_unusual_closures(setting):
    task, rows = problem("mlp", torch.float32), Rows(0.5, seed=1)
    v, found, handles = task.tangent(), [], []
    for is_unusual in (False, True):

        def closure(is_unusual=is_unusual):
            task.net.zero_grad()
            if is_unusual and setting == "checkpointed":
                body = checkpoint(task.net[:-1], task.x, use_reentrant=False)
                loss = task.loss(task.net[-1](body))
            elif is_unusual and setting == "bf16":
                with torch.autocast("cpu", torch.bfloat16):
                    loss = task.loss(task.net(task.x))
            elif is_unusual and setting == "two backwards":
                (0.3 * task.loss(task.net(task.x))).backward()
                loss = 0.7 * task.loss(task.net(task.x))
            else:
                loss = task.loss(task.net(task.x))
            loss.backward()
            return loss

        if is_unusual and setting == "hooks":
            handles = [p.register_hook(seen.append) for p in task.params]
            seen.clear()
        with ClosureOracle(closure, task.params, engine="graph") as oracle:
            whole = oracle.trace("ggn", rows=rows)
            part = oracle.of_part(whole, "part")
            found.append((flat(part.grad), flat(part.product(v))))
    assert len(seen) == len(handles)  # by the gradient alone
    tolerance = 3e-2 if setting == "bf16" else 1e-5
    for ours, plain in zip(found[1], found[0], strict=True):
        assert (ours - plain).norm() < tolerance * plain.norm()


seen = []


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["nll", "two losses", "penalty", "weights", "sequence"])
def test_the_part_and_the_rest_add_up_whatever_the_loss(loss, reduction):
    torch.manual_seed(0)
    net = nn.Linear(4, 6).double()
    x, y, extra = torch.randn(10, 4).double(), labels(10), torch.randn(20, 4).double()

    def value():
        z = net(x)
        if loss == "nll":
            return F.nll_loss(z.log_softmax(1), y, reduction=reduction)
        if loss == "sequence":
            return F.cross_entropy(z.reshape(10, 3, 2), y[:, None].expand(10, 2))
        if loss == "weights":
            y[0] = -100  # is ignored
            return F.cross_entropy(z, y, torch.rand(6).double(), reduction=reduction)
        main = F.cross_entropy(z, y, reduction=reduction)
        if loss == "penalty":
            return main + (net.weight**4).sum()
        return main + 3 * F.mse_loss(net(extra), torch.zeros(20, 6).double(), reduction=reduction)

    params, rows = list(net.parameters()), Rows(0.3, seed=1)
    v = [torch.randn_like(p) for p in params]

    def closure():
        net.zero_grad()
        torch.manual_seed(0)
        out = value()
        out.backward()
        return out

    with ClosureOracle(closure, params) as oracle:
        whole = oracle.trace("ggn", rows=rows)
        part, rest = (oracle.of_part(whole, which) for which in ("part", "rest"))
        found = [[flat(p.product(v)), flat(p.grad)] for p in (whole, part, rest)]
    for total, of_part, of_rest in zip(*found, strict=True):
        torch.testing.assert_close(0.3 * of_part + 0.7 * of_rest, total)
        assert not torch.allclose(of_part, total)


@pytest.mark.parametrize(
    "loss",
    [
        lambda w: F.mse_loss(w.square().sum(), torch.ones(())),
        lambda w: F.mse_loss(w[None], torch.ones(1, 3)),
        lambda w: F.cross_entropy(w, torch.tensor(1)),
        lambda w: F.nll_loss(w.log_softmax(0), torch.tensor(1)),
    ],
)
def test_a_loss_of_one_row_is_in_every_part(loss):
    """The last batch of an epoch, perhaps."""
    w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    closure = closure_of(torch.optim.SGD([w]), lambda: loss(w))
    with ClosureOracle(closure, [w]) as oracle:
        whole = oracle.trace("ggn", rows=Rows(0.5, seed=0))
        points = [whole, *(oracle.of_part(whole, which) for which in ("part", "rest"))]
        found = [(p.grad[0], p.product([torch.ones(3)])[0]) for p in points]
    for grad, product in found:
        torch.testing.assert_close(grad, w.grad)
        torch.testing.assert_close(product, found[0][1])
    optimizer = hvpopt.NewtonCG([w], curvature_fraction=0.5, debiased=True)
    optimizer.step(closure_of(optimizer, lambda: loss(w)))
    assert optimizer.last_report.outcome is Outcome.STEPPED


def test_an_oracle_says_when_there_are_no_rows():
    task = problem("mlp")
    with pytest.raises(ValueError, match=r"fraction=1 is out of range: expected 0 < fraction < 1"):
        Rows(1, seed=0)
    with ClosureOracle(task.closure(), task.params) as oracle:
        with pytest.raises(ValueError, match="curvature='hessian': rows have parts of the GGN"):
            oracle.trace("hessian", rows=Rows(0.5, seed=0))
        point = oracle.trace("ggn")
        with pytest.raises(RuntimeError, match=r"had no rows: trace\('ggn', rows=Rows"):
            oracle.of_part(point, "part")
    assert math.isfinite(point.loss)
