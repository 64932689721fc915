"""Products through custom autograd Functions: right, or refused by name; never silently wrong."""

import numpy as np
import pytest
import torch
from cubes import Cube, Detached, Honest, Once
from model_checks import check_products, classifier, names_of_engines, relative_error, seeded
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from hvpopt.engines.choice import EngineChoice


class WithJvp(Cube):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_forward(x)
        return Cube.forward(ctx, x)

    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * t


class OnceWithJvp(WithJvp):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Cube.backward(ctx, g)


class UnderNoGrad(Cube):
    @staticmethod
    def backward(ctx, g):
        with torch.no_grad():
            return Cube.backward(ctx, g)


class Data(Cube):
    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0].data ** 2 * g.data


class Kept(Cube):
    """Of a copy that was kept beside the saved tensors."""

    @staticmethod
    def forward(ctx, x):
        ctx.kept = x.detach().clone()
        return Cube.forward(ctx, x)

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.kept**2 * g


class Numpy(Cube):
    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(3 * np.square(ctx.saved_tensors[0].detach().numpy())) * g


class AllNumpy(Cube):
    @staticmethod
    def backward(ctx, g):
        x, g = ctx.saved_tensors[0].detach().numpy(), g.detach().numpy()
        return torch.from_numpy(3 * np.square(x) * g)


class Apply(nn.Module):
    """Applies a Function, as a module with a name does."""

    def __init__(self, function: type[Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


def model_of(function: type[Function]):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(5, 5), Apply(function))
    net = nn.Sequential(nn.Linear(4, 5), block, nn.Linear(5, 3))
    return classifier(net, torch.randn(6, 4, dtype=torch.float64))


@pytest.mark.parametrize("function", [WithJvp, Honest])
def test_every_engine_serves_a_function_with_both_derivatives(function):
    check_products(model_of(function))


def test_a_function_without_jvp_is_the_graph_engines():
    check_products(model_of(Cube), engines=["auto", "graph"])


def test_a_function_that_is_once_differentiable_with_a_jvp_is_the_dual_engines():
    check_products(model_of(OnceWithJvp), engines=["auto", "dual"], curvatures=["hessian"])


CONSTANT = [UnderNoGrad, Detached, Data, Kept, Numpy, AllNumpy]


@pytest.mark.parametrize("function", [Once, *CONSTANT])
def test_auto_does_not_trust_a_backward_that_cannot_be_differentiated(function):
    model, choice = model_of(function), EngineChoice("auto")
    v = model.tangent()
    expected = model.hessian(v).value
    with seeded(model.closure, model.params, engine=choice) as oracle:
        assert relative_error(oracle.trace().product(v), expected) < 1e-6
    with seeded(model.closure, model.params, engine=choice) as oracle:
        assert relative_error(oracle.trace_along(v)[2], expected) < 1e-6
    assert names_of_engines(choice) == {"finite_difference"}


@pytest.mark.parametrize("function", [Once, *CONSTANT])
def test_the_graph_engine_refuses_a_backward_that_cannot_be_differentiated(function):
    model = model_of(function)
    with seeded(model.closure, model.params, engine="graph") as oracle:
        with pytest.raises(RuntimeError, match=rf"{function.__name__}.*finite_difference"):
            oracle.trace().product(model.tangent())


@pytest.mark.parametrize("engine", ["auto", "graph"])
@pytest.mark.parametrize("function", [Once, *CONSTANT])
def test_the_ggn_of_a_backward_that_cannot_be_differentiated_is_refused_by_name(function, engine):
    """Also where it would be right, the backward being linear in the cotangent."""
    model = model_of(function)
    with seeded(model.closure, model.params, engine=engine) as oracle:
        with pytest.raises(RuntimeError, match=rf"\b{function.__name__}\b.*curvature='hessian'"):
            oracle.trace("ggn").product(model.tangent())


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("function", [Cube, *CONSTANT])
def test_the_dual_engine_refuses_a_function_without_jvp_by_name(function, curvature):
    model = model_of(function)
    with seeded(model.closure, model.params, engine="dual") as oracle:
        with pytest.raises(RuntimeError, match=rf"1\.1.*{function.__name__}.*jvp"):
            oracle.trace_along(model.tangent(), curvature)


class Contradictory(WithJvp):
    """Its jvp is not its backward."""

    @staticmethod
    def jvp(ctx, t):
        return 2 * WithJvp.jvp(ctx, t)


def test_the_dual_engine_refuses_a_jvp_that_contradicts_the_backward():
    model = model_of(Contradictory)
    with seeded(model.closure, model.params, engine="dual") as oracle:
        with pytest.raises(RuntimeError, match=r"[Ff]orward.*reverse"):
            oracle.trace_along(model.tangent())


class OwnGradient(nn.Module):
    """A forward pass that differentiates: the gradient of a small energy."""

    def __init__(self) -> None:
        super().__init__()
        self.energy, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x).requires_grad_()
        energy = (torch.tanh(self.energy(x + y)) ** 2).sum()
        (slope,) = torch.autograd.grad(energy, y, create_graph=True)
        return self.head(slope)


def test_products_through_a_gradient_inside_the_model():
    torch.manual_seed(0)
    model = classifier(OwnGradient(), torch.randn(6, 4, dtype=torch.float64))
    check_products(model)
