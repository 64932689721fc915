"""What a CUDA device must do as the CPU does."""

import pytest
import torch
from problems import PROBLEMS, flat, problem

import hvpopt
from hvpopt.closure import ClosureOracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _on_gpu(name):
    task = problem(name)
    task.net.cuda()
    task.x = task.x.cuda()
    loss = task.loss
    task.loss = lambda z: loss(z.cpu()).to(z.device)
    return task


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("engine", ["dual", "graph"])
@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "dropout"])
def test_products_are_those_of_the_cpu(name, engine, curvature):
    task, reference = _on_gpu(name), problem(name)
    dense = reference.dense_hessian() if curvature == "hessian" else reference.dense_ggn()
    v = reference.tangent()
    with ClosureOracle(task.closure(), task.params, engine=engine) as oracle:
        product = oracle.trace(curvature).product([x.cuda() for x in v])
    torch.testing.assert_close(flat(product).cpu(), dense @ flat(v), rtol=1e-8, atol=1e-10)


def test_dropout_is_the_same_in_every_run():
    task = _on_gpu("dropout")
    torch.manual_seed(0)
    task.closure()()
    expected = torch.rand(3, device="cuda")
    torch.manual_seed(0)
    with ClosureOracle(task.closure(), task.params) as oracle:
        point = oracle.trace()
        assert float(oracle.evaluate()) == float(point.loss)
    assert torch.equal(torch.rand(3, device="cuda"), expected)


@pytest.mark.parametrize("make", [hvpopt.NewtonCG, hvpopt.SMD])
def test_training_is_that_of_the_cpu(make):
    results = []
    for task in (problem("batchnorm"), _on_gpu("batchnorm")):
        optimizer = make(task.params)
        for _ in range(5):
            optimizer.step(task.closure())
        results.append(flat(task.params).cpu())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)
