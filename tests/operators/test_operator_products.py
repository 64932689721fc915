"""Products of curvature operators against dense matrices."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from operator_cases import OPERATORS, close, cross_entropy_of, of_problem, ragged, ten_examples
from problems import PROBLEMS, flat, problem
from torch import nn
from torch.func import functional_call

from hvpopt.operators import HessianOperator


@pytest.fixture
def data():
    return ten_examples()


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_an_operator_is_the_dense_matrix(name, kind):
    task = problem(name)
    op, dense = of_problem(task, kind)
    close(op.to_dense(), dense)
    v = flat(task.tangent())
    close(op @ v, dense @ v)


@pytest.mark.parametrize("engine", ["dual", "graph", "finite_difference"])
def test_every_engine_is_available(engine):
    op, dense = of_problem(problem("dropout"), engine=engine)
    v = flat(problem("dropout").tangent())
    tolerance = 1e-7 if engine == "finite_difference" else 1e-9
    for _ in range(2):
        close(op @ v, dense @ v, rtol=tolerance, atol=tolerance)


def test_a_single_batch_is_traced_once(data):
    net, calls = problem("mlp").net, []

    def loss(batch):
        calls.append(1)
        return F.cross_entropy(net(batch[0]), batch[1])

    op = HessianOperator(loss, net.parameters(), [data], engine="graph")
    v = problem("mlp").tangent()
    for _ in range(3):
        op @ v
    op.loss(), op.gradient(), op.to_dense()
    assert len(calls) == 1
    op.close()
    op @ v
    assert len(calls) == 2
    kept = HessianOperator(loss, net.parameters(), ragged(data), engine="graph", retain_graphs=True)
    calls.clear()
    for _ in range(3):
        kept @ v
    assert len(calls) == 3
    several = HessianOperator(loss, net.parameters(), ragged(data), engine="graph")
    calls.clear()
    several.to_dense()  # 64 vectors, one run a batch
    assert len(calls) == 3


def test_what_changes_is_traced_anew(data):
    task = problem("batchnorm")
    net, x, y = task.net, task.x.clone(), torch.arange(6) % 3
    batches = [(x, y)]
    loss = cross_entropy_of(net)
    op = HessianOperator(loss, net.parameters(), batches)
    v = task.tangent()

    def check():
        close(flat(op @ v), flat(HessianOperator(loss, net.parameters(), list(batches)) @ v))
        return flat(op @ v)

    seen = [check()]
    with torch.no_grad():
        net[0].weight.add_(0.1)
    seen.append(check())
    x[0].mul_(2)
    seen.append(check())
    batches[0] = (x.flip(0), y)
    seen.append(check())
    net.eval()
    seen.append(check())
    net[1].running_var.mul_(3)
    seen.append(check())
    net[0].bias.data = net[0].bias.data + 1
    seen.append(check())
    for i, product in enumerate(seen):
        for other in seen[:i]:
            assert not torch.allclose(product, other)


def test_a_block_is_the_dense_block_and_differentiates_by_it_alone():
    task = problem("mlp")
    op, dense = of_problem(task)
    close(op.block(task.net[2]).to_dense(), dense[25:49, 25:49])
    close(op.block([0, 1]).to_dense(), dense[:25, :25])
    assert op.block(slice(0, 2)).params == task.params[:2]
    close(op.block(1).gradient()[0], op.gradient()[1])


def test_operators_of_one_model_add_up():
    task = problem("mlp")
    H, hessian = of_problem(task)
    G, ggn = of_problem(task, "ggn")
    v = flat(task.tangent())
    close((0.9 * G + 0.1 * H).damped(0.5) @ v, 0.9 * ggn @ v + 0.1 * hessian @ v + 0.5 * v)


def test_scipy_finds_the_dense_eigenvalues():
    op, dense = of_problem(problem("batchnorm"))
    found = scipy.sparse.linalg.eigsh(op.to_scipy(), k=3, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(found), torch.linalg.eigvalsh(dense)[-3:].numpy())


def test_a_complex_vector_of_scipy_keeps_its_imaginary_part(data):
    net, (x, _) = nn.Linear(4, 2).double(), data
    op = HessianOperator(lambda x: net(x).pow(4).mean(), net.parameters(), [x])
    a, b = np.arange(10.0), np.ones(10)
    found = op.to_scipy() @ (a + 1j * b)
    dense = op.to_dense().numpy()
    np.testing.assert_allclose(found, dense @ a + 1j * (dense @ b))


def test_an_operator_works_inside_no_grad_and_inference_mode():
    op, dense = of_problem(problem("lstm"))
    v = flat(problem("lstm").tangent())
    with torch.no_grad():
        close(op @ v, dense @ v)
    op.close()
    task = problem("lstm")
    with torch.inference_mode():
        batch = task.x.clone()
        other = HessianOperator(lambda x: task.loss(task.net(x)), task.params, [batch])
        product = other @ v.clone()
        close(product, dense @ v)
        close(other @ v, dense @ v)


def test_products_of_frozen_and_unused_parameters():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).double()
    net[0].weight.requires_grad_(False)
    unused = nn.Parameter(torch.ones(2).double())
    params = [p for p in net.parameters() if p.requires_grad] + [unused]
    x = torch.eye(2).double()
    op = HessianOperator(lambda x: net(x).square().mean(), params, [x])
    used = dict(list(net.named_parameters())[1:])

    def loss(w):
        parts = [q.view_as(p) for q, p in zip(w.split([2, 2, 1]), used.values(), strict=True)]
        return functional_call(net, dict(zip(used, parts, strict=True)), (x,)).square().mean()

    expected = torch.zeros(7, 7).double()
    expected[:5, :5] = torch.autograd.functional.hessian(loss, flat(list(used.values())))
    close(op.to_dense(), expected)
