"""Gauss-Newton products against dense matrices."""

import pytest
import torch
import torch.nn.functional as F
from functional import (
    Tree,
    dense_hessian,
    joined,
    normal,
    normal_like,
    on_joined,
    output_of,
    params_of,
)
from product_problems import NETWORKS, network, problem
from torch import Tensor

from hvpopt.products import ggnvp


def test_the_ggn_of_a_linear_model_is_the_hessian():
    x, y = normal(8, 5), torch.arange(8) % 3
    params = {"w": normal(3, 5, seed=1), "b": normal(3, seed=2)}

    def model(p: Tree, inputs: Tensor) -> Tensor:
        return F.linear(inputs, p["w"], p["b"])

    v = normal_like(params)
    expected = dense_hessian(lambda p: F.cross_entropy(model(p, x), y), params) @ joined(v)
    product = ggnvp(model, lambda z: F.cross_entropy(z, y), params, v, x)
    torch.testing.assert_close(joined(product), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_ggn_is_the_dense_one(name):
    net, x = network(name)
    model, params = output_of(net), params_of(net)

    def loss(z: Tensor) -> Tensor:
        return z.exp().mean()

    outputs, at = on_joined(lambda p: model(p, x).reshape(-1), params)
    jacobian = torch.autograd.functional.jacobian(outputs, at)
    z = model(params, x)
    curvature = z.exp().reshape(-1) / z.numel()
    v = normal_like(params)
    expected = jacobian.T @ (curvature * (jacobian @ joined(v)))
    torch.testing.assert_close(joined(ggnvp(model, loss, params, v, x)), expected)


def test_the_ggn_takes_outputs_that_are_pytrees():
    p, v = normal(3), normal(3, seed=1)

    def model(q: Tensor) -> Tree:
        return {"a": q**2, "b": (q.sin(),)}

    product = ggnvp(model, lambda z: (z["a"] ** 2).sum() + (z["a"] * z["b"][0]).sum(), p, v)
    slope_a, slope_b = 2 * p, p.cos()
    expected = slope_a * (2 * slope_a * v + slope_b * v) + slope_b * slope_a * v
    torch.testing.assert_close(product, expected)


def test_one_product_is_one_run_of_the_model():
    calls = []

    def model(p: Tensor) -> Tensor:
        calls.append(1)
        return p**3

    ggnvp(model, torch.sum, normal(2), normal(2))
    assert len(calls) == 1


@pytest.mark.parametrize("name", NETWORKS)
def test_double_reverse_gives_the_same_gauss_newton_product(name):
    f, params, x = problem(name)
    v = normal_like(params)
    products = [
        ggnvp(f, torch.exp, params, v, x, mode=mode) for mode in ("forward", "double_reverse")
    ]
    torch.testing.assert_close(joined(products[0]), joined(products[1]))


@pytest.mark.parametrize("loss", [F.huber_loss, F.soft_margin_loss, F.smooth_l1_loss])
def test_the_ggn_takes_losses_whose_backward_has_no_forward_mode(loss):
    p, y = normal(5), torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0]).double()
    expected = dense_hessian(lambda z: loss(z, y), p) @ p
    torch.testing.assert_close(ggnvp(lambda q: 1.0 * q, lambda z: loss(z, y), p, p), expected)
