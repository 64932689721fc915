"""Products through modules that draw random numbers, change their buffers, or recompute."""

import copy

import pytest
import torch
import torch.nn.functional as F
from model_checks import (
    EVERY,
    Model,
    check_functional_products,
    check_products,
    classifier,
    relative_error,
    seeded,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from hvpopt.closure import ClosureOracle


def data(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def batch_norm(*, training: bool, **options: object) -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, **options), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
    )
    model = classifier(net, data(6, 1, 4, 4))
    model.output()  # running statistics of their own
    net.train(training)
    return model


@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}],
    ids=lambda o: next(iter(o), "default"),
)
@pytest.mark.parametrize("training", [True, False])
def test_products_through_batch_norm(training, options):
    check_products(batch_norm(training=training, **options))


def test_products_through_batch_norm_that_is_frozen_in_a_network_that_trains():
    model = batch_norm(training=True)
    model.net[1].eval().requires_grad_(False)
    check_products(model)


@pytest.mark.parametrize("training", [True, False])
def test_functional_products_through_batch_norm(training):
    model = batch_norm(training=training)
    before = copy.deepcopy(model.net.state_dict())
    check_functional_products(model)
    assert all(torch.equal(before[k], b) for k, b in model.net.state_dict().items())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout(0.4),
        nn.AlphaDropout(0.3),
        nn.FeatureAlphaDropout(0.3),
        nn.Dropout1d(0.3),
        nn.RReLU(0.1, 0.3),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_products_through_layers_that_draw_random_numbers(layer):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), layer, nn.Linear(8, 6), nn.SiLU())
    check_products(classifier(net, data(6, 4)))


class Noise(nn.Module):
    """Draws from Python's and torch's generators, and from one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x: Tensor) -> Tensor:
        own = torch.rand(x.shape, generator=self.generator, dtype=x.dtype)
        return x + own.sub(0.5) * torch.randn_like(x)


def test_repeated_products_see_one_draw_of_a_modules_own_generator():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Noise(), nn.Linear(5, 3))
    model = classifier(net, data(6, 4))
    v = model.tangent()
    values = {}
    for engine in ("dual", "graph", "finite_difference"):
        with seeded(model.closure, model.params, engine=engine) as oracle:
            point = oracle.trace()
            values[engine] = point.product(v)
            assert torch.equal(oracle.evaluate(), point.loss)
    assert relative_error(values["dual"], values["graph"]) < 1e-12
    assert relative_error(values["finite_difference"], values["graph"]) < 1e-6


class Centred(nn.Module):
    """Subtracts a running mean of the data, counts its calls, and scales by the count."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(4))
        self.register_buffer("calls", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        self.centre.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)  # in place
        self.calls = self.calls + 1.0  # another tensor
        return (x - self.centre) / (1.0 + self.calls)


def test_products_through_a_module_that_changes_its_buffers():
    torch.manual_seed(0)
    net = nn.Sequential(Centred(), nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))
    check_products(classifier(net, data(6, 4)))


class Whitened(nn.Module):
    """Normalises by statistics of its input's past, which stop derivatives."""

    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 3)
        self.first = first
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.before(x))
        if self.first:
            with torch.no_grad():
                self.scale.lerp_(z.std(0), 0.5)
        return self.after(z / self.scale.clone())


def test_what_a_module_computes_under_no_grad_is_a_constant():
    torch.manual_seed(0)
    model = classifier(Whitened(first=True), data(6, 4))
    constant = Model(copy.deepcopy(model.net), model.inputs, model.loss)
    constant.output()
    constant.net.first = False
    constant.net.before, constant.net.after = model.net.before, model.net.after
    check_products(model, reference=constant)


def test_a_target_computed_under_no_grad_is_a_constant():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model = classifier(net, data(6, 4))

    def moving(z: Tensor) -> Tensor:
        with torch.no_grad():
            target = 0.5 * model.output() + 1.0
        return F.mse_loss(z, target)

    target = (0.5 * model.output() + 1.0).detach()
    model.loss = moving
    check_products(model, reference=Model(net, model.inputs, lambda z: F.mse_loss(z, target)))


def test_a_straight_through_estimate_is_curved_as_its_gradient_says():
    """x + (round(x) − x).detach(): the identity's derivatives at the rounded value."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model = classifier(net, data(6, 4))
    offset = (model.output().round() - model.output()).detach()
    model.pick = lambda z: z + (z.round() - z).detach()
    reference = Model(net, model.inputs, model.loss, pick=lambda z: z + offset)
    check_products(model, reference=reference)


class Checkpointed(nn.Module):
    def __init__(self, *blocks: nn.Module, reentrant: bool = False) -> None:
        super().__init__()
        self.blocks, self.reentrant = nn.ModuleList(blocks), reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def blocks() -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Dropout(0.3)),
        nn.Sequential(nn.Linear(5, 5), nn.SiLU()),
        nn.Linear(5, 3),
    ]


def test_products_through_checkpointed_layers():
    model = classifier(Checkpointed(*blocks()), data(6, 4))
    check_products(model, curvatures=["hessian"])
    check_products(model, curvatures=["ggn"], engines=["auto", "graph"])


def test_products_through_a_checkpointed_sequence():
    class Segments(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint_sequential(list(self), 2, x, use_reentrant=False)

    model = classifier(Segments(*blocks()), data(6, 4))
    check_products(model, curvatures=["hessian"])
    check_products(model, curvatures=["ggn"], engines=["auto", "graph"])


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("engine", ["auto", "graph"])
def test_what_products_recompute_leaves_no_trace(engine, curvature):
    """A checkpointed layer runs again in every reverse pass, with its batch norm."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3))
    model = classifier(Checkpointed(layer, nn.Linear(5, 3)), data(6, 4))
    v = model.tangent()
    expected = model.hessian(v) if curvature == "hessian" else model.ggn(v)
    before = copy.deepcopy(model.net.state_dict())
    with seeded(model.closure, model.params, engine=engine) as oracle:
        point = oracle.trace(curvature)
        random = torch.get_rng_state()
        for _ in range(3):
            assert relative_error(point.product(v), expected.value) < 1e-8
        assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[k], b) for k, b in model.net.state_dict().items())


@pytest.mark.parametrize("engine", ["auto", "graph"])
def test_after_a_checkpointed_step_buffers_are_as_after_a_plain_one(engine):
    def model() -> Model:
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
        return classifier(Checkpointed(layer, nn.Linear(5, 3)), data(6, 4))

    plain, ours = model(), model()
    plain.closure()
    with ClosureOracle(ours.closure, ours.params, engine=engine) as oracle:
        point = oracle.trace()
        point.product(ours.tangent())
        oracle.evaluate()
    for key, value in plain.net.state_dict().items():
        torch.testing.assert_close(ours.net.state_dict()[key], value)
    for p, q in zip(plain.params, ours.params, strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("engine", EVERY)
def test_reentrant_checkpointing_is_refused_with_its_remedy(engine):
    net = nn.Sequential(nn.Linear(4, 4), Checkpointed(*blocks(), reentrant=True))
    model = classifier(net, data(6, 4))
    with seeded(model.closure, model.params, engine=engine) as oracle:
        with pytest.raises(RuntimeError, match=r"use_reentrant=True.*use use_reentrant=False"):
            oracle.trace()


def test_the_dual_engines_ggn_refuses_checkpointed_layers_in_one_sentence():
    model = classifier(Checkpointed(*blocks()), data(6, 4))
    with seeded(model.closure, model.params, engine="dual") as oracle:
        with pytest.raises(RuntimeError, match=r"checkpoint.*engine='graph'"):
            oracle.trace_along(model.tangent(), "ggn")
