"""Products in low and mixed precision, wherever the autocast context stands."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from model_checks import EVERY, Model, classify, relative_error, seeded
from problems import flat
from torch import Tensor, nn

import hvpopt

BOTH = ("hessian", "ggn")


def convolutional() -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(16, 3)
    )
    return Model(net, (torch.randn(6, 1, 4, 4),), classify)


def attentive() -> Model:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, activation="gelu", batch_first=True)
    net = nn.Sequential(
        nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(4, 3)
    )
    return Model(net, (torch.randn(2, 3, 4),), classify)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(x)[0])


def recurrent() -> Model:
    torch.manual_seed(0)
    return Model(Recurrent(), (torch.randn(2, 4, 3),), classify)


MODELS = {m.__name__: m for m in (convolutional, attentive, recurrent)}


def in_float64(model: Model, v: list[Tensor], curvature: str) -> list[Tensor]:
    """The product by differences of the model in float64; leaves it in float32."""
    inputs = model.inputs
    model.net.double()
    model.inputs = tuple(x.double() for x in inputs)
    wide = [t.double() for t in v]
    value = (model.hessian(wide) if curvature == "hessian" else model.ggn(wide)).value
    model.net.float()
    model.inputs = inputs
    return value


def tangent(model: Model) -> list[Tensor]:
    """Numbers that bfloat16 holds."""
    return [t.bfloat16().float() for t in model.tangent()]


def autocast(dtype: torch.dtype = torch.bfloat16, **options: bool) -> torch.autocast:
    return torch.autocast("cpu", dtype, **options)


def step(model: Model, dtype: torch.dtype, scale: float = 1.0) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        with autocast(dtype):
            loss = model.loss(model.output())
        model.net.zero_grad()
        (scale * loss).backward()
        return scale * loss

    return closure


@pytest.mark.parametrize("curvature", BOTH)
@pytest.mark.parametrize("engine", EVERY)
@pytest.mark.parametrize("name", MODELS)
def test_products_in_float32_are_good_to_its_precision(name, engine, curvature):
    model = MODELS[name]()
    v = tangent(model)
    expected = in_float64(model, v, curvature)
    with seeded(model.closure, model.params, engine=engine) as oracle:
        product = oracle.trace(curvature).product(v)
    assert flat(product).dtype == torch.float32
    assert relative_error(product, expected) < 1e-4


@pytest.mark.parametrize("curvature", BOTH)
@pytest.mark.parametrize("engine", EVERY)
@pytest.mark.parametrize("name", MODELS)
def test_products_under_bf16_autocast_are_about_as_good_as_its_gradients(name, engine, curvature):
    model = MODELS[name]()
    v = tangent(model)
    expected = in_float64(model, v, curvature)
    closure = step(model, torch.bfloat16)
    with seeded(closure, model.params, engine=engine) as oracle:
        product = oracle.trace(curvature).product(v)
    with seeded(closure, model.params, engine=engine) as oracle:
        along = oracle.trace_along(v, curvature)[2]
    for each in (product, along):
        assert flat(each).dtype == torch.float32
        assert relative_error(each, expected) < 0.1  # 0.4% a rounding


@pytest.mark.parametrize("curvature", BOTH)
@pytest.mark.parametrize("engine", EVERY)
def test_products_under_float16_autocast_of_a_scaled_loss(engine, curvature):
    model, scale = attentive(), 2.0**12
    v = tangent(model)
    expected = in_float64(model, v, curvature)
    with seeded(step(model, torch.float16, scale), model.params, engine=engine) as oracle:
        product = oracle.trace(curvature).product(v)
    assert relative_error([x / scale for x in product], expected) < 0.02


@pytest.mark.parametrize("curvature", BOTH)
@pytest.mark.parametrize("engine", EVERY)
@pytest.mark.parametrize("cache", [True, False])
def test_an_autocast_around_the_oracle_hides_no_change_of_the_parameters(cache, engine, curvature):
    """Its cache holds the weights' low-precision copies until the outermost context ends."""
    model = attentive()
    v = tangent(model)
    expected = in_float64(model, v, curvature)
    with autocast(cache_enabled=cache):
        model.output()  # fills the cache
        with seeded(model.closure, model.params, engine=engine) as oracle:
            point = oracle.trace(curvature)
            product = point.product(v)
            before = float(oracle.evaluate())
            with torch.no_grad():
                for p in model.params:
                    p.mul_(1.5)
            moved = float(oracle.evaluate())
            with torch.no_grad():
                for p in model.params:
                    p.div_(1.5)
        assert torch.is_autocast_cache_enabled() == cache
    assert relative_error(product, expected) < 0.1
    assert before == pytest.approx(float(point.loss))
    assert moved != pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("optimizer", [hvpopt.NewtonCG, hvpopt.SMD])
def test_a_step_inside_autocast_is_the_step_with_autocast_inside(optimizer):
    moved = []
    for outside in (True, False):
        model = attentive()
        start = flat(model.params)
        stepper = optimizer(model.net.parameters())
        closure = model.closure if outside else step(model, torch.bfloat16)
        with autocast() if outside else nullcontext():
            for _ in range(2):
                stepper.step(closure)
        moved.append(flat(model.params) - start)
    one, other = moved
    assert (one - other).norm() < 0.03 * other.norm()  # bfloat16 rounds to 0.4%


@pytest.mark.parametrize("curvature", BOTH)
@pytest.mark.parametrize("engine", EVERY)
def test_products_in_bfloat16_parameters(engine, curvature):
    model = attentive()
    v = tangent(model)
    expected = in_float64(model, v, curvature)
    model.net.bfloat16()
    model.inputs = tuple(x.bfloat16() for x in model.inputs)
    loss = model.loss
    model.loss = lambda z: loss(z.float())
    with seeded(model.closure, model.params, engine=engine) as oracle:
        product = oracle.trace(curvature).product([t.bfloat16() for t in v])
    assert {t.dtype for t in product} == {torch.bfloat16}
    assert relative_error(product, expected) < 0.15


class ThreeDtypes(nn.Module):
    """A float64 layer, a float32 layer and a bfloat16 layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Linear(4, 5).double(), nn.Linear(5, 4).float(), nn.Linear(4, 3).bfloat16()]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x.to(layer.weight.dtype)))
        return x.float()


@pytest.mark.parametrize("curvature", BOTH)
@pytest.mark.parametrize("engine", EVERY)
def test_each_product_has_its_parameters_dtype(engine, curvature):
    torch.manual_seed(0)
    net = ThreeDtypes()
    model = Model(net, (torch.randn(6, 4),), lambda z: F.cross_entropy(z, torch.arange(6) % 3))
    v = [t.to(p) for t, p in zip(model.tangent(), model.params, strict=True)]
    reference = Model(ThreeDtypes().double(), (model.inputs[0].double(),), model.loss)
    reference.net.load_state_dict(net.state_dict())
    reference.net.forward = lambda x: forward_in_float64(reference.net, x)
    wide = [t.double() for t in v]
    estimate = reference.hessian(wide) if curvature == "hessian" else reference.ggn(wide)
    with seeded(model.closure, model.params, engine=engine) as oracle:
        point = oracle.trace(curvature)
        product = point.product(v)
    for vector in (product, point.grad):
        assert [t.dtype for t in vector] == [p.dtype for p in model.params]
    assert relative_error(product, estimate.value) < 0.05


def forward_in_float64(net: nn.Module, x: Tensor) -> Tensor:
    for layer in net.layers:
        x = torch.tanh(layer(x))
    return x


def test_newton_cg_trains_parameters_of_three_dtypes():
    torch.manual_seed(0)
    net = ThreeDtypes()
    model = Model(net, (torch.randn(6, 4),), lambda z: F.cross_entropy(z, torch.arange(6) % 3))
    dtypes = [p.dtype for p in model.params]
    optimizer = hvpopt.NewtonCG(net.parameters())
    losses = [float(optimizer.step(model.closure)) for _ in range(6)]
    assert losses[-1] < 0.95 * losses[0]
    assert [p.dtype for p in model.params] == dtypes


@pytest.mark.parametrize("engine", [*EVERY, "finite_difference"])
def test_products_inside_inference_mode(engine):
    """As in a trainer's validation; parameters and data were made outside it."""
    model = attentive()
    v = tangent(model)
    with seeded(model.closure, model.params, engine=engine) as oracle:
        expected = oracle.trace().product(v)
    with torch.inference_mode():
        with seeded(model.closure, model.params, engine=engine) as oracle:
            point = oracle.trace()
            product = point.product(v)
            assert float(oracle.evaluate()) == float(point.loss)
        assert torch.is_inference_mode_enabled()
    assert relative_error(product, expected) < 1e-6


def test_what_the_closure_computes_in_inference_mode_is_a_constant():
    model = attentive()

    def moving(z: Tensor) -> Tensor:
        with torch.inference_mode():
            target = model.output()
        return F.mse_loss(z, 0.5 * target.clone() + 1.0)

    target = 0.5 * model.output().detach() + 1.0
    reference = Model(model.net, model.inputs, lambda z: F.mse_loss(z, target.to(z)))
    model.loss = moving
    v = tangent(model)
    for curvature in BOTH:
        expected = in_float64(reference, v, curvature)
        for engine in EVERY:
            with seeded(model.closure, model.params, engine=engine) as oracle:
                assert relative_error(oracle.trace(curvature).product(v), expected) < 1e-4


def test_data_made_in_inference_mode_serves_inside_it_and_is_refused_outside():
    torch.manual_seed(0)
    x = torch.randn(6, 4)
    model = Model(nn.Linear(4, 3), (x,), classify)
    v = tangent(model)
    expected = in_float64(model, v, "hessian")
    with torch.inference_mode():
        model.inputs = (x.clone(),)
        with seeded(model.closure, model.params) as oracle:
            assert relative_error(oracle.trace().product(v), expected) < 1e-4
    with seeded(model.closure, model.params) as oracle:
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            oracle.trace()
