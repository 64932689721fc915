"""What every model is checked for: its products against differences, and that no trace is left."""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from differences import SEED, Estimate, ggn_product, gradient, hessian_product
from problems import flat
from torch import Tensor, nn
from torch.func import functional_call

from hvpopt import products
from hvpopt.closure import ClosureOracle
from hvpopt.engines.choice import EngineChoice

RTOL = 1e-8
EVERY = ("auto", "dual", "graph")
BOTH = ("hessian", "ggn")


def whole(z: Any) -> Tensor:
    """The network's output itself."""
    return z


@dataclass
class Model:
    """A network, its inputs, and the loss of its output.

    ``params`` are what is differentiated by: those of the network that require gradients.
    """

    net: nn.Module
    inputs: tuple[Any, ...]
    loss: Callable[[Tensor], Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the network."""
    pick: Callable[[Any], Tensor] = whole
    """Takes the tensor that the loss is of from what the network returns."""

    @property
    def params(self) -> list[Tensor]:
        return [p for p in self.net.parameters() if p.requires_grad]

    def output(self) -> Tensor:
        return self.pick(self.net(*self.inputs, **self.options))

    def closure(self) -> Tensor:
        self.net.zero_grad()
        loss = self.loss(self.output())
        loss.backward()
        return loss

    def tangent(self, seed: int = 1) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        values = [
            torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in self.params
        ]
        return [v.to(p) for v, p in zip(values, self.params, strict=True)]

    def hessian(self, v: Sequence[Tensor]) -> Estimate:
        return hessian_product(self.closure, self.params, v, self.net)

    def ggn(self, v: Sequence[Tensor]) -> Estimate:
        return ggn_product(self.output, self.loss, self.params, v, self.net)

    def functional_output(self, params: dict[str, Tensor]) -> Tensor:
        """The output as a function of the parameters by name, of copies of the buffers."""
        state = {name: b.clone() for name, b in self.net.named_buffers()}
        return self.pick(functional_call(self.net, {**state, **params}, self.inputs, self.options))


def classify(z: Tensor) -> Tensor:
    """The mean cross-entropy of logits, over all but their last dimension."""
    rows = z.flatten(0, -2)
    return F.cross_entropy(rows, torch.arange(len(rows)) % rows.shape[1])


def classifier(net: nn.Module, *inputs: Any, **options: Any) -> Model:
    """The network in float64 under cross-entropy."""
    return Model(net.double(), inputs, classify, options)


def seeded(
    closure: Callable[[], object], params: Sequence[Tensor], **options: Any
) -> ClosureOracle:
    """An oracle that sees the function which the differences see, and leaves no trace."""
    torch.manual_seed(SEED)
    random.seed(SEED)
    return ClosureOracle(closure, params, leave_no_trace=True, **options)


def relative_error(product: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """‖product − expected‖ / ‖expected‖ over whole lists."""
    right = flat(list(expected)).double()
    return float((flat(list(product)).double() - right).norm() / right.norm())


def expected_product(
    model: Model, curvature: str, v: Sequence[Tensor], rtol: float
) -> list[Tensor]:
    """By differences that are known to be good to ``rtol``."""
    estimate = model.hessian(v) if curvature == "hessian" else model.ggn(v)
    size = float(flat(estimate.value).norm())
    assert size > 0
    assert estimate.error < rtol * size, f"the oracle may be off by {estimate.error / size:g}"
    return estimate.value


def check_products(
    model: Model,
    *,
    engines: Sequence[str] = EVERY,
    curvatures: Sequence[str] = BOTH,
    rtol: float = RTOL,
    reference: Model | None = None,
    differences_may_serve: bool = False,
) -> None:
    """Loss, gradient and products of each engine against plain autograd and its differences.

    Args:
        model: what the engines see.
        engines: which.
        curvatures: of what.
        rtol: largest relative error of a product.
        reference: what the differences see, where it is not the model: the same function of the
            same parameters with constants in place of what stops derivatives.
        differences_may_serve: whether engine="auto" may fall to finite differences.
    """
    reference = reference or model
    params = model.params
    state = copy.deepcopy(model.net.state_dict())
    u, v = model.tangent(1), model.tangent(2)
    grad = gradient(reference.closure, params, reference.net)
    for curvature in curvatures:
        expected = expected_product(reference, curvature, v, rtol)
        for engine in engines:
            where = f"engine={engine}, {curvature}"
            choice = EngineChoice(engine)
            with seeded(model.closure, params, engine=choice) as oracle:
                point = oracle.trace(curvature)
                product, other = point.product(v), point.product(u)
            with seeded(model.closure, params, engine=choice) as oracle:
                loss, grad_along, product_along = oracle.trace_along(v, curvature)
            if not differences_may_serve:
                assert "finite_difference" not in names_of_engines(choice), where
            assert relative_error(product, expected) < rtol, where
            assert relative_error(product_along, expected) < rtol, where
            assert relative_error(point.grad, grad) < 1e-10, where
            assert relative_error(grad_along, grad) < 1e-10, where
            torch.testing.assert_close(loss, point.loss, rtol=1e-10, atol=0)
            left, right = flat(u) @ flat(product), flat(v) @ flat(other)
            bound = rtol * float(flat(u).norm() * flat(product).norm())
            assert abs(float(left - right)) < bound, f"{where}: asymmetric"
    after = model.net.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(state[name], value) for name, value in after.items())
    assert all(p.grad is None for p in model.net.parameters())


def check_functional_products(
    model: Model, *, curvatures: Sequence[str] = BOTH, rtol: float = RTOL
) -> None:
    """`products.grad_and_hvp`, `hvp`, `linearize` and `ggnvp` through ``functional_call``."""
    named = {name: p.detach() for name, p in model.net.named_parameters()}
    v = model.tangent(2)
    vs = dict(zip(named, v, strict=True))

    def value(params: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(SEED)
        return model.loss(model.functional_output(params))

    def output(params: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(SEED)
        return model.functional_output(params)

    with torch.random.fork_rng():
        if "hessian" in curvatures:
            expected = expected_product(model, "hessian", v, rtol)
            _, grad, product = products.grad_and_hvp(value, named, vs)
            assert relative_error(list(product.values()), expected) < rtol
            product = products.hvp(value, named, vs)
            assert relative_error(list(product.values()), expected) < rtol
            product = products.linearize(value, named).hvp(vs)
            assert relative_error(list(product.values()), expected) < rtol
            plain = gradient(model.closure, model.params, model.net)
            assert relative_error(list(grad.values()), plain) < 1e-10
        if "ggn" in curvatures:
            expected = expected_product(model, "ggn", v, rtol)
            product = products.ggnvp(output, model.loss, named, vs)
            assert relative_error(list(product.values()), expected) < rtol


def names_of_engines(choice: EngineChoice) -> set[str]:
    """Which engines a choice has settled on."""
    return {engine.name for engine in choice._chosen.values()}
