"""Products of closures against dense matrices, whatever the network is wrapped in."""

import pytest
import torch
import torch.nn.functional as F
from problems import EXACT, PROBLEMS, flat, problem
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hvpopt.closure import ClosureOracle


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("engine", EXACT)
@pytest.mark.parametrize("name", PROBLEMS)
def test_products_of_both_engines_are_those_of_the_dense_matrix(name, engine, curvature):
    task = problem(name)
    dense = task.dense_hessian() if curvature == "hessian" else task.dense_ggn()
    v = task.tangent()
    torch.manual_seed(0)
    with ClosureOracle(task.closure(), task.params, engine=engine) as oracle:
        point = oracle.trace(curvature)
        product = point.product(v)
    torch.manual_seed(0)
    with ClosureOracle(task.closure(), task.params, engine=engine) as oracle:
        loss, grad, along = oracle.trace_along(v, curvature)
    torch.testing.assert_close(flat(product), dense @ flat(v), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(flat(along), dense @ flat(v), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(loss, point.loss)
    torch.testing.assert_close(flat(grad), flat(point.grad))


@pytest.mark.parametrize("name", PROBLEMS)
def test_finite_differences_approximate_the_dense_hessian(name):
    task = problem(name)
    v = task.tangent()
    torch.manual_seed(0)
    with ClosureOracle(task.closure(), task.params, engine="finite_difference") as oracle:
        product = oracle.trace().product(v)
    expected = task.dense_hessian() @ flat(v)
    # error of order h² with h = eps^(1/3) = 6e-6
    torch.testing.assert_close(flat(product), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["mlp", "batchnorm", "transformer"])
def test_the_hessian_is_symmetric_in_float32(name):
    task = problem(name, torch.float32)
    u, v = task.tangent(1), task.tangent(2)
    with ClosureOracle(task.closure(), task.params) as oracle:
        product = oracle.trace().product
        left, right = flat(u) @ flat(product(v)), flat(v) @ flat(product(u))
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


class Checkpointed(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


@pytest.mark.parametrize(
    ("engine", "curvature"),
    [("dual", "hessian"), ("graph", "hessian"), ("graph", "ggn"), ("auto", "ggn")],
)
def test_activation_checkpointing_changes_no_product(engine, curvature):
    task, checked = problem("mlp"), problem("mlp")
    checked.net = Checkpointed(checked.net)
    products = []
    for each in (task, checked):
        with ClosureOracle(each.closure(), each.params, engine=engine) as oracle:
            products.append(flat(oracle.trace_along(task.tangent(), curvature)[2]))
    torch.testing.assert_close(*products)


@pytest.mark.parametrize("engine", EXACT)
def test_several_backward_calls_in_a_closure_add_up(engine):
    task = problem("mlp")
    halves = task.x[:3], task.x[3:]
    targets = (torch.arange(6) % 3).split(3)

    def closure() -> None:
        task.net.zero_grad()
        for x, y in zip(halves, targets, strict=True):
            (F.cross_entropy(task.net(x), y) / 2).backward()

    v = task.tangent()
    with ClosureOracle(closure, task.params, engine=engine) as oracle:
        point = oracle.trace()
        product, value = point.product(v), oracle.evaluate()
    torch.testing.assert_close(flat(product), task.dense_hessian() @ flat(v))
    torch.testing.assert_close(value, point.loss)
    with ClosureOracle(closure, task.params, engine="graph") as oracle:
        product = oracle.trace("ggn").product(v)
    torch.testing.assert_close(flat(product), task.dense_ggn() @ flat(v))


@pytest.mark.parametrize("engine", ["dual", "graph"])
def test_products_in_a_compiled_module_are_right(engine):
    task = problem("mlp")
    expected = task.dense_hessian() @ flat(task.tangent())
    compiled = torch.compile(task.net, backend="aot_eager")

    def closure() -> Tensor:
        task.net.zero_grad()
        loss = task.loss(compiled(task.x))
        loss.backward()
        return loss

    with ClosureOracle(closure, task.params, engine=engine) as oracle:
        product = oracle.trace().product(task.tangent())
    torch.testing.assert_close(flat(product), expected)


def test_bf16_autocast_products_are_within_its_precision():
    task = problem("mlp", torch.float32)
    exact = task.dense_hessian() @ flat(task.tangent())

    def closure() -> Tensor:
        task.net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = task.loss(task.net(task.x))
        loss.backward()
        return loss

    for engine in EXACT:
        with ClosureOracle(closure, task.params, engine=engine) as oracle:
            product = flat(oracle.trace().product(task.tangent()))
        assert product.dtype == torch.float32
        assert (product - exact).norm() < 0.03 * exact.norm()


def test_tangents_leave_the_graphs_of_others_valid():
    task = problem("mlp")
    v = task.tangent()
    loss = task.loss(task.net(task.x))
    grads = torch.autograd.grad(loss, task.params, create_graph=True)
    with ClosureOracle(task.closure(), task.params, engine="dual") as oracle:
        oracle.trace_along(v, "ggn")
    product = torch.autograd.grad(grads, task.params, v)
    torch.testing.assert_close(flat(product), task.dense_hessian() @ flat(v))


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
