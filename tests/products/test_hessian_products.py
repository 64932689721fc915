"""Hessian products against closed forms, dense matrices and identities."""

from dataclasses import FrozenInstanceError

import pytest
import torch
import torch.nn.functional as F
from functional import Tree, combined, dense_hessian, inner, joined, normal, normal_like
from product_problems import NETWORKS, both_hvps, exact_hvp, linearized_hvp, problem
from torch import Tensor, nn
from torch.func import functional_call

from hvpopt.products import grad_and_hvp, hvp, linearize


@both_hvps
def test_the_hessian_of_a_quadratic_is_its_matrix(product):
    a = normal(7, 7)
    a = a + a.T
    v = normal(7, seed=1)
    hv = product(lambda p: 0.5 * p @ a @ p, normal(7, seed=2), v)
    torch.testing.assert_close(hv, a @ v)


@both_hvps
def test_the_hessian_of_softmax_cross_entropy_is_the_covariance_of_the_prediction(product):
    logits, v = normal(5), normal(5, seed=1)
    p = logits.softmax(0)
    expected = (torch.diag(p) - torch.outer(p, p)) @ v
    hv = product(lambda z: F.cross_entropy(z, torch.tensor(2)), logits, v)
    torch.testing.assert_close(hv, expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_linearizations_products_are_those_of_the_dense_hessian(name):
    f, params, x = problem(name)
    point = linearize(f, params, x)
    for seed in (1, 2):
        v = normal_like(params, seed)
        hv = point.hvp(v)
        assert list(hv) == list(params)
        torch.testing.assert_close(joined(hv), exact_hvp(name, v), rtol=1e-9, atol=1e-12)


@both_hvps
@pytest.mark.parametrize("name", ["silu", "attention", "lstm"])
def test_products_are_central_differences_of_the_gradient(name, product):
    """The error of the difference is ε²/6 · f⁗, about 1e-9 here."""
    f, params, x = problem(name)
    v, step = normal_like(params), 1e-4
    up, down = (
        torch.func.grad(f)(combined(lambda p, t, s=s: p + s * t, params, v), x)
        for s in (step, -step)
    )
    hv = product(f, params, v, x)
    torch.testing.assert_close(
        joined(hv), (joined(up) - joined(down)) / (2 * step), rtol=1e-5, atol=1e-7
    )


@both_hvps
def test_the_product_is_symmetric_and_linear(product):
    f, params, x = problem("attention")
    u, v = normal_like(params, seed=1), normal_like(params, seed=2)
    hu, hv = product(f, params, u, x), product(f, params, v, x)
    assert inner(u, hv) == pytest.approx(inner(v, hu), rel=1e-10)
    mixed = product(f, params, combined(lambda a, b: 2 * a - 3 * b, u, v), x)
    torch.testing.assert_close(joined(mixed), 2 * joined(hu) - 3 * joined(hv))


def test_loss_and_gradient_are_those_of_autograd():
    f, params, x = problem("mlp")
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    loss = f(leaves, x)
    loss.backward()
    point = linearize(f, params, x)
    one_shot = grad_and_hvp(f, params, normal_like(params), x)
    for found_loss, grad in ((point.loss, point.grad), one_shot[:2]):
        torch.testing.assert_close(found_loss, loss.detach())
        for k in params:
            torch.testing.assert_close(grad[k], leaves[k].grad)


@both_hvps
def test_parameters_that_do_not_matter_have_zero_products(product):
    params = {"used": normal(2), "linear": normal(2, seed=1), "unused": normal(3)}

    def f(p: Tree) -> Tensor:
        return (p["used"] ** 2).sum() + p["linear"].sum()

    v = normal_like(params)
    hv = product(f, params, v)
    torch.testing.assert_close(hv["used"], 2 * v["used"])
    assert not hv["linear"].any()
    assert hv["unused"].tolist() == [0.0, 0.0, 0.0]
    point = linearize(f, params)
    assert point.grad["linear"].tolist() == [1.0, 1.0]
    assert point.grad["unused"].tolist() == [0.0, 0.0, 0.0]


@both_hvps
@pytest.mark.parametrize("f", [lambda p: p.sum(), lambda p: torch.tensor(3.0)])
def test_linear_and_constant_functions_have_a_zero_hessian(product, f):
    assert product(f, torch.ones(3), torch.ones(3)).tolist() == [0.0, 0.0, 0.0]


@both_hvps
def test_a_zero_direction_has_a_zero_product(product):
    f, params, x = problem("mlp")
    hv = product(f, params, combined(torch.zeros_like, params), x)
    assert not joined(hv).any()


@both_hvps
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_keep_the_dtype(product, dtype):
    p = normal(4).to(dtype)
    hv = product(lambda q: (q**3).sum(), p, torch.ones_like(p))
    assert hv.dtype == dtype
    torch.testing.assert_close(hv, 6 * p, rtol=2e-2, atol=2e-2)


def test_tied_weights_in_a_module_are_one_parameter():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    net[2].weight = net[0].weight
    params = {k: p.detach() for k, p in net.named_parameters()}
    x = normal(3, 4)

    def f(p: Tree) -> Tensor:
        return functional_call(net, p, (x,)).square().mean()

    v = normal_like(params)
    assert "2.weight" not in params
    torch.testing.assert_close(joined(hvp(f, params, v)), dense_hessian(f, params) @ joined(v))


def test_a_linearization_runs_the_function_once():
    calls = []

    def f(p: Tensor) -> Tensor:
        calls.append(1)
        return (p**3).sum()

    p = normal(4)
    point = linearize(f, p)
    for seed in range(3):
        v = normal(4, seed=seed)
        torch.testing.assert_close(point.hvp(v), 6 * p * v)
    assert len(calls) == 1
    with pytest.raises(FrozenInstanceError):
        point.loss = torch.zeros(())  # type: ignore[misc]


def test_a_linearization_refuses_to_be_used_after_the_parameters_moved():
    p = normal(4)
    point = linearize(lambda q: (q**3).sum(), p)
    p += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        point.hvp(p)


def test_an_exception_inside_the_function_leaves_everything_as_it_was():
    p = torch.ones(3, requires_grad=True)

    def failing(q: Tensor) -> Tensor:
        raise KeyError("inside")

    for product in (hvp, linearized_hvp):
        with pytest.raises(KeyError, match="inside"):
            product(failing, p, torch.ones(3))
    assert p.tolist() == [1.0, 1.0, 1.0]
    assert p.grad is None
    torch.testing.assert_close(
        hvp(lambda q: (q**2).sum(), p.detach(), torch.ones(3)), 2 * p.detach()
    )
