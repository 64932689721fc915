"""Products through modules that torch.compile or TorchScript has made."""

import pytest
import torch
from differences import hessian_product
from model_checks import EVERY, Model, check_products, classifier, relative_error, seeded
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from hvpopt import products


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model() -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.GELU(), nn.Dropout(0.3), nn.Linear(5, 3)
    )
    return classifier(net, torch.randn(6, 4, dtype=torch.float64))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("in_place", [True, False])
def test_products_through_a_compiled_module(in_place, backend):
    task = model()
    if in_place:
        task.net.compile(backend=backend)
    else:
        task.net = torch.compile(task.net, backend=backend, fullgraph=True)
    task.closure()  # compiled now
    task.net.zero_grad()
    check_products(task)


def test_products_leave_what_is_compiled_as_it_is():
    counter = CompileCounter()
    task = model()
    compiled = torch.compile(task.net, backend=counter)
    task.pick, task.inputs, task.net = lambda z: z, task.inputs, compiled
    task.closure()
    frames = counter.frame_count
    assert frames > 0
    for engine in EVERY:
        with seeded(task.closure, task.params, engine=engine) as oracle:
            oracle.trace().product(task.tangent())
    assert counter.frame_count == frames
    task.closure()
    assert counter.frame_count == frames


def test_products_of_a_compiled_training_step():
    task = model()

    @torch.compile(backend="eager")
    def step() -> Tensor:
        return task.loss(task.net(*task.inputs))

    def closure() -> Tensor:
        task.net.zero_grad()
        loss = step()
        loss.backward()
        return loss

    v = task.tangent()
    expected, ggn = task.hessian(v).value, task.ggn(v).value
    for engine in EVERY:
        with seeded(closure, task.params, engine=engine) as oracle:
            assert relative_error(oracle.trace().product(v), expected) < 1e-8
        with seeded(closure, task.params, engine=engine) as oracle:
            assert relative_error(oracle.trace("ggn").product(v), ggn) < 1e-8


def test_a_compiled_functional_product():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    task = classifier(net, torch.randn(6, 4, dtype=torch.float64))
    named = {name: p.detach() for name, p in net.named_parameters()}
    v = task.tangent()

    def value(params: dict[str, Tensor]) -> Tensor:
        return task.loss(task.functional_output(params))

    compiled = torch.compile(lambda p, t: products.hvp(value, p, t), backend="eager")
    product = compiled(named, dict(zip(named, v, strict=True)))
    assert relative_error(list(product.values()), task.hessian(v).value) < 1e-8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning")  # inductor's own
def test_products_through_a_module_that_inductor_compiled():
    task = model()
    task.net = torch.compile(task.net)
    task.closure()
    task.net.zero_grad()
    expected = model()
    v = task.tangent()
    reference = hessian_product(expected.closure, expected.params, v, expected.net).value
    for engine in EVERY:
        with seeded(task.closure, task.params, engine=engine) as oracle:
            assert relative_error(oracle.trace().product(v), reference) < 1e-8


@pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("runs", [0, 3], ids=["cold", "warm"])
@pytest.mark.parametrize("way", ["script", "trace"])
def test_products_through_torchscript(way, runs):
    """Warm, its optimizing executor hides operations from forward mode."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3))
    x = torch.randn(6, 4, dtype=torch.float64)
    made = torch.jit.script(net.double()) if way == "script" else torch.jit.trace(net.double(), x)
    plain, task = Model(net, (x,), classifier(net, x).loss), classifier(made, x)
    for _ in range(runs):
        task.closure()
    net.zero_grad()
    made.zero_grad()
    v = task.tangent()
    for curvature in ("hessian", "ggn"):
        estimate = plain.hessian(v) if curvature == "hessian" else plain.ggn(v)
        for engine in ("auto", "graph"):
            with seeded(task.closure, task.params, engine=engine) as oracle:
                product = oracle.trace(curvature).product(v)
            assert relative_error(product, estimate.value) < 1e-8, engine
            with seeded(task.closure, task.params, engine=engine) as oracle:
                product = oracle.trace_along(v, curvature)[2]
            assert relative_error(product, estimate.value) < 1e-8, engine
        with seeded(task.closure, task.params, engine="dual") as oracle:
            if way == "script" and runs:
                with pytest.raises(RuntimeError, match="engine='graph'"):
                    oracle.trace_along(v, curvature)
            else:
                product = oracle.trace_along(v, curvature)[2]
                assert relative_error(product, estimate.value) < 1e-8
