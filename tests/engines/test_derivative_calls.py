"""Uses of weights inside of derivatives, against the gradients that autograd finds."""

import pytest
import torch
from layer_gradients import assert_explained, explained, randn, weight
from torch import nn

from hvpopt.engines.layer_calls import LayerCalls


def derivative(u, x):
    (result,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return result


def points():
    return randn(7, 3).requires_grad_()


def network(*, bias=True):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(3, 5, bias=bias), nn.Tanh(), nn.Linear(5, 4, bias=bias), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(4, 1, bias=bias)).double()


@pytest.mark.parametrize("bias", [True, False])
def test_first_derivatives_by_the_input_are_explained(bias):
    net, x = network(bias=bias), points()
    params = [p for p in net.parameters() if not (bias and p is net[4].bias)]

    assert_explained(params, lambda: derivative(net(x), x) + net(x))


def test_second_derivatives_by_the_input_are_explained():
    net, x = network(bias=False), points()

    def run():
        first = derivative(net(x), x)
        return derivative(first[:, 0], x) + first

    assert_explained(list(net.parameters()), run)


def test_weights_on_either_side_of_a_product_are_explained():
    w, v, x = weight(3, 4), weight(4, 4), points()

    assert_explained([w, v], lambda: derivative(((v @ (x @ w).tanh().mT).tanh()), x))


def test_inputs_with_several_leading_dimensions_are_explained():
    net, x = network(bias=False), randn(2, 3, 3).requires_grad_()

    assert_explained(list(net.parameters()), lambda: derivative(net(x), x))


def test_a_derivative_without_a_graph_adds_no_calls():
    net, x = network(), points()
    recorder = LayerCalls(list(net.parameters()))
    with recorder:
        torch.autograd.grad(net(x).sum(), x)

    assert len(recorder.calls) == 3


def test_other_parameters_and_unused_inputs_add_no_calls():
    net, x, unused = network(), points(), randn(2).requires_grad_()
    recorder = LayerCalls([weight(3, 3)])
    with recorder:
        torch.autograd.grad(net(x).sum(), [x, unused], create_graph=True, allow_unused=True)

    assert recorder.calls == []


def test_a_bias_keeps_its_weight_where_the_weight_is_also_used_in_a_derivative():
    net, x = network(), points()
    params = list(net.parameters())
    recorder = LayerCalls(params)
    with recorder:
        derivative(net(x), x)

    forward = [call for call in recorder.calls if call.bias is not None]
    assert [(call.weight, call.bias) for call in forward] == [(0, 1), (2, 3), (4, 5)]
    assert sorted(call.weight for call in recorder.calls if call.bias is None) == [0, 2, 4]


def test_a_derivative_of_a_derivative_is_not_counted_twice():
    x, w = points(), weight(1, 3)

    def run():
        first = derivative((x @ w.mT) ** 3, x)
        return derivative(first.sum(1), x)

    grads, sums = explained([w], run)
    torch.testing.assert_close(sums, list(grads))
