"""Custom functions and operators that cannot serve are named; other errors stay as they are."""

import pytest
import torch
from blamed import SERVES, Call, Recognizer, product, task
from cubes import Cube, Detached, Once
from torch import Tensor, nn
from torch.autograd import Function

from hvpopt.engines.blame import UnsupportedOperationError


def net_of(function: type[Function]) -> nn.Module:
    block = nn.Sequential(nn.Tanh(), Call(lambda x: function.apply(x)))
    return nn.Sequential(nn.Linear(5, 5), block)


@pytest.mark.parametrize(
    ("function", "engine", "sentence", "remedy"),
    [
        (
            Cube,
            "dual",
            "the custom autograd Function Cube has no jvp, which forward mode needs",
            f"engine='graph' or engine='finite_difference' {SERVES}, or give it one",
        ),
        (
            Detached,
            "graph",
            "the backward of the custom autograd Function Detached hides what it depends on from "
            r"autograd \(.*\), so that products through it would be wrong",
            "engine='finite_difference', or let it compute from ctx.saved_tensors by "
            "differentiable operations",
        ),
    ],
)
def test_a_custom_function_is_named_with_what_it_lacks(function, engine, sentence, remedy):
    closure, params = task(net_of(function))
    message = rf"^Module '1\.1' \(Call\): {sentence}\. Choose {remedy}\.$"
    with pytest.raises(UnsupportedOperationError, match=message):
        product(closure, params, engine)


def test_a_mark_is_found_where_the_error_has_no_name(monkeypatch):
    monkeypatch.setattr("hvpopt.engines.graph.check_applications", lambda *_, **__: None)
    closure, params = task(net_of(Once))
    message = (
        r"^Module '1\.1' \(Call\): the backward of the custom autograd Function Once is marked "
        rf"once_differentiable\. Choose engine='dual' or engine='finite_difference' {SERVES}, "
        r"or write it in differentiable operations and remove the mark\.$"
    )
    with pytest.raises(UnsupportedOperationError, match=message):
        product(closure, params, "graph")


@torch.library.custom_op("hvpopt_test::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    return x**3


@torch.library.custom_op("hvpopt_test::slope", mutates_args=())
def slope_of_cube(x: Tensor, g: Tensor) -> Tensor:
    return 3 * x**2 * g


cube.register_autograd(
    lambda ctx, g: slope_of_cube(ctx.saved_tensors[0], g),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def test_a_custom_operator_is_named():
    closure, params = task(nn.Sequential(nn.Linear(5, 5), Call(cube)))
    message = (
        r"^Module '1' \(Call\): torch has no forward mode of the custom operator hvpopt_test_cube"
    )
    with pytest.raises(UnsupportedOperationError, match=message):
        product(closure, params, "dual")
    message = r"^In the closure: .* hvpopt_test\.slope, which has no backward.*register_autograd"
    with pytest.raises(UnsupportedOperationError, match=message):
        product(closure, params, "graph")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("2 GiB"), ValueError("mine")])
@pytest.mark.parametrize("engine", ["auto", "graph", "dual"])
def test_errors_that_are_not_about_derivatives_stay_as_they_are(engine, error):
    def fail(x: Tensor) -> Tensor:
        raise error

    closure, params = task(nn.Sequential(nn.Linear(5, 5), Call(fail)))
    with pytest.raises(type(error)) as caught:
        product(closure, params, engine)
    assert caught.value is error


@pytest.mark.parametrize("engine", ["auto", "graph", "dual"])
def test_an_error_of_shapes_stays_as_it_is(engine):
    closure, params = task(nn.Sequential(nn.Linear(5, 5), nn.Linear(4, 5)))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        product(closure, params, engine)
    assert not isinstance(caught.value, UnsupportedOperationError)


def test_a_derivative_that_the_closure_lacks_without_products_is_its_own_error():
    def call(net, x):
        (grad,) = torch.autograd.grad(net(x), net.encoder.weight, create_graph=True)
        return grad

    closure, params = task(Recognizer(), call)
    message = "derivative for aten::_ctc_loss_backward is not implemented"
    with pytest.raises(RuntimeError, match=message):
        closure()
    with pytest.raises(RuntimeError, match=message) as caught:
        product(closure, params, "graph")
    assert not isinstance(caught.value, UnsupportedOperationError)
