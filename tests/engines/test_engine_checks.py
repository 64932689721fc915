"""What engines must not get wrong of the closures that they are given."""

import gc

import numpy
import pytest
import torch
import torch.nn.functional as F
from problems import closure_for
from torch import nn
from torch.utils.checkpoint import checkpoint

from hvpopt.closure import ClosureOracle


def products(loss, params, v, engine, curvature="hessian"):
    closure = closure_for(loss, params)
    with ClosureOracle(closure, params, engine=engine, leave_no_trace=True) as oracle:
        return oracle.trace(curvature).product(v)


def test_batch_norm_of_the_wrong_size_raises_torchs_error():
    net = nn.Sequential(nn.Linear(4, 30), nn.BatchNorm1d(2))
    x, params = torch.randn(8, 4), list(net.parameters())
    with pytest.raises(RuntimeError, match="should contain 30 elements not 2"):
        products(lambda: net(x).square().mean(), params, [p.data for p in params], "graph")


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("engine", ["graph", "dual"])
def test_a_trace_holds_no_graph_in_a_cycle(engine, curvature):
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    x, params = torch.randn(4, 3), list(net.parameters())
    v = [torch.ones_like(p) for p in params]

    def step():
        products(lambda: F.mse_loss(net(x), torch.ones(4, 2)), params, v, engine, curvature)

    def count():
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    step()
    gc.collect()
    gc.disable()
    try:
        before = count()
        for _ in range(3):
            step()
        assert count() == before
    finally:
        gc.enable()


def test_what_a_checkpointed_layer_computes_without_gradients_is_a_constant_there_too():
    torch.manual_seed(0)
    w, x = nn.Parameter(torch.randn(4, 4, dtype=torch.float64)), torch.randn(5, 4).double()

    def layer(h):
        h = h @ w
        with torch.no_grad():
            size = h.abs().amax()
        return (h / size).tanh()

    v = [torch.ones_like(w)]
    plain = products(lambda: layer(x).square().mean(), [w], v, "graph")

    def checkpointed():
        return checkpoint(layer, x, use_reentrant=False).square().mean()

    for engine in ("graph", "dual"):
        torch.testing.assert_close(products(checkpointed, [w], v, engine), plain)


def test_a_checkpointed_function_without_modules_serves_many_products():
    q = nn.Parameter(torch.randn(3).double())

    def loss():
        return checkpoint(lambda: F.huber_loss(q, torch.zeros_like(q)), use_reentrant=False)

    with ClosureOracle(closure_for(loss, [q]), [q], engine="graph") as oracle:
        point, v = oracle.trace(), [torch.ones_like(q)]
        torch.testing.assert_close(point.product(v), point.product(v))


@pytest.mark.parametrize("engine", ["auto", "graph", "dual"])
def test_a_penalty_without_a_gradient_at_the_point_is_not_dropped(engine):
    """At zero weights a quadratic penalty has a Hessian alone."""
    net = nn.Linear(3, 2).double()
    nn.init.zeros_(net.weight)
    x, params = torch.randn(4, 3).double(), list(net.parameters())
    v = [torch.ones_like(p) for p in params]

    def loss():
        return F.cross_entropy(net(x), torch.tensor([0, 1, 1, 0])) + 5 * net.weight.square().sum()

    expected = products(loss, params, v, "graph", "ggn")  # 10 v for the penalty
    closure = closure_for(loss, params)
    with ClosureOracle(closure, params, engine=engine, leave_no_trace=True) as oracle:
        if engine == "dual":
            with pytest.raises(ValueError, match="does not go through a loss function"):
                oracle.trace_along(v, "ggn")
        else:
            torch.testing.assert_close(oracle.trace_along(v, "ggn")[2], expected)
    assert (expected[0] - 10).abs().max() < 1


def test_buffers_of_scripted_modules_advance_once():
    net = torch.jit.script(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    x, params = torch.randn(5, 4), list(net.parameters())
    loss = closure_for(lambda: net(x).square().sum(), params)
    with ClosureOracle(loss, params, engine="graph") as oracle:
        oracle.trace().product([torch.ones_like(p) for p in params])
        oracle.evaluate()
    assert dict(net.named_buffers())["1.num_batches_tracked"] == 1


def test_numbers_drawn_before_the_first_run_do_not_change_what_later_runs_see():
    w = nn.Parameter(torch.ones(100))
    closure = closure_for(lambda: F.dropout(w, 0.5).sum(), [w])
    with ClosureOracle(closure, [w], engine="graph") as oracle:
        torch.randn(7)
        point = oracle.trace()
        assert oracle.evaluate() == point.loss


def test_mean_squares_from_integer_labels_have_products_by_every_engine():
    """½ Σ (w² − y)² has the second derivatives 6 w² − 2 y."""
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    loss = lambda: F.mse_loss(w**2, torch.tensor([1, 3]))  # noqa: E731
    for engine in ("graph", "dual"):
        (product,) = products(loss, [w], [torch.ones(2)], engine)
        torch.testing.assert_close(product, torch.tensor([4.0, 18.0]))


def test_strides_of_numpy_and_words_for_padding_are_taken_as_torch_takes_them():
    w = nn.Parameter(torch.randn(2, 1, 3))
    x, v = torch.randn(1, 1, 8), [torch.ones_like(w)]
    found, expected = (
        products(lambda s=s: F.conv1d(x, w, stride=s).square().sum(), [w], v, "graph")
        for s in (numpy.int64(2), 2)
    )
    torch.testing.assert_close(found, expected)
    for padding in ("same", "foo"):
        with pytest.raises((RuntimeError, ValueError), match=r"padding|Invalid"):
            products(lambda p=padding: F.conv1d(x, w, stride=2, padding=p).sum(), [w], v, "graph")


def test_gradients_of_channels_last_weights_keep_their_layout():
    net = nn.Conv2d(4, 6, 3, groups=2).to(memory_format=torch.channels_last)
    x, params = torch.randn(2, 4, 5, 5), list(net.parameters())
    with ClosureOracle(
        closure_for(lambda: net(x).square().sum(), params), params, engine="graph"
    ) as oracle:
        oracle.trace()
    assert net.weight.grad.stride() == net.weight.stride()
