"""Products through hooks, transforms of torch.func inside a model, and operators of one's own."""

import pytest
import torch
from differences import hessian_product
from model_checks import EVERY, Model, check_products, classifier, relative_error, seeded
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state


def data() -> Tensor:
    return torch.randn(6, 4, dtype=torch.float64)


def two_layers() -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return classifier(net, data())


def test_products_through_forward_hooks_that_change_values():
    model = two_layers()
    model.net[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    model.net[2].register_forward_pre_hook(lambda module, inputs: (inputs[0].sin(),))
    check_products(model)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("where", ["module", "module before", "activation", "parameter"])
def test_products_beside_hooks_that_watch_gradients(where, curvature):
    """They may see more than one gradient a step, but never None, and change no product."""
    model, seen = two_layers(), []

    def watch(gradient: Tensor) -> Tensor:
        seen.append(float(gradient.detach().norm()))
        return gradient * 1.0

    if where == "module":
        model.net[1].register_full_backward_hook(lambda module, gi, go: (watch(gi[0]),))
    elif where == "module before":
        model.net[1].register_full_backward_pre_hook(lambda module, go: (watch(go[0]),))
    elif where == "activation":
        model.net[0].register_forward_hook(
            lambda m, i, output: output.register_hook(watch) and None
        )
    else:
        model.net[0].weight.register_hook(watch)
    v = model.tangent()
    estimate = model.hessian(v) if curvature == "hessian" else model.ggn(v)
    for engine in ("auto", "graph"):
        seen.clear()
        with seeded(model.closure, model.params, engine=engine) as oracle:
            assert relative_error(oracle.trace(curvature).product(v), estimate.value) < 1e-8


class Ensemble(nn.Module):
    """Three networks at once, under vmap."""

    def __init__(self) -> None:
        super().__init__()
        members = [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)) for _ in range(3)]
        stacked, _ = stack_module_state(members)
        self.one = [members[0]]  # no submodule: its parameters are replaced
        self.names = list(stacked)
        self.stacked = nn.ParameterList(stacked[name].detach() for name in self.names)

    def forward(self, x: Tensor) -> Tensor:
        params = dict(zip(self.names, self.stacked, strict=True))
        return torch.vmap(lambda p: functional_call(self.one[0], p, (x,)))(params).mean(0)


def test_products_through_an_ensemble_under_vmap():
    torch.manual_seed(0)
    check_products(classifier(Ensemble(), data()))


class Derivative(nn.Module):
    """Features that are derivatives of a layer in the data, by reverse or forward mode."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.layer, self.head, self.mode = nn.Linear(4, 4), nn.Linear(4, 3), mode

    def forward(self, x: Tensor) -> Tensor:
        def energy(u: Tensor) -> Tensor:
            return torch.tanh(self.layer(u))

        if self.mode == "forward":
            return self.head(jvp(energy, (x,), (torch.ones_like(x),))[1])
        return self.head(torch.vmap(grad(lambda u: energy(u).square().sum()))(x))


def test_products_through_a_reverse_mode_transform_inside_the_model():
    torch.manual_seed(0)
    check_products(classifier(Derivative("reverse"), data()))


def test_products_through_a_forward_mode_transform_inside_the_model():
    """Forward mode does not nest: the dual engine refuses, the others serve."""
    torch.manual_seed(0)
    model = classifier(Derivative("forward"), data())
    check_products(model, engines=["auto", "graph"])
    with seeded(model.closure, model.params, engine="dual") as oracle:
        with pytest.raises(
            RuntimeError, match=r"no forward mode inside forward mode.*engine='graph'"
        ):
            oracle.trace_along(model.tangent())


@torch.library.custom_op("hvpopt_tests::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    return x**3


cube.register_autograd(
    lambda ctx, g: 3 * ctx.saved_tensors[0] ** 2 * g,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Cube(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return cube(x)


def test_products_through_an_operator_of_torch_library():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), Cube(), nn.Linear(5, 3))
    check_products(classifier(net, data()), engines=["auto", "graph"])


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, 0] = x[:, 1] * x[:, 2]
        return y.mul_(2).tanh_()


def test_products_through_operations_in_place():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), InPlace(), nn.Linear(4, 3), nn.ReLU(inplace=True))
    net[-1] = nn.Hardtanh(-50, 50, inplace=True)
    check_products(classifier(net, data()))


@pytest.mark.parametrize("engine", EVERY)
def test_products_of_a_sum_of_two_networks_losses(engine):
    first, second = two_layers(), two_layers()
    params = [*first.params, *second.params]

    def closure() -> Tensor:
        first.net.zero_grad()
        second.net.zero_grad()
        loss = first.loss(first.output()) + 2 * second.loss(
            second.net(torch.cos(first.output() @ mix))
        )
        loss.backward()
        return loss

    mix = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    both = Model(nn.ModuleList([first.net, second.net]), (), first.loss)
    v = both.tangent()
    expected = hessian_product(closure, params, v, both.net).value
    with seeded(closure, params, engine=engine) as oracle:
        assert relative_error(oracle.trace().product(v), expected) < 1e-8
