"""What cannot be served is refused in a sentence: which module, which operation, what to do."""

import re

import pytest
import torch
from cubes import Cube
from model_checks import EVERY, Model, check_products, classifier, seeded
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hvpopt.closure import ClosureOracle


class SegmentMean(nn.Module):
    """The mean of each two rows, by an operation that has first derivatives alone."""

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.full((len(x) // 2,), 2)
        return torch.segment_reduce(x, "mean", lengths=lengths, unsafe=True)


class Cubes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(x)


class Net(nn.Module):
    """A network that is fine but for the layer ``blocks.1.1``."""

    def __init__(self, awkward: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.Tanh(), awkward)])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def model(awkward: nn.Module) -> Model:
    torch.manual_seed(0)
    return classifier(Net(awkward), torch.randn(6, 4, dtype=torch.float64))


def refusal(task: Model, engine: str, curvature: str, *, along: bool) -> str:
    def product(oracle: ClosureOracle) -> object:
        if along:
            return oracle.trace_along(task.tangent(), curvature)
        return oracle.trace(curvature).product(task.tangent())

    with seeded(task.closure, task.params, engine=engine) as oracle:
        with pytest.raises(RuntimeError) as caught:
            product(oracle)
    assert all(p.grad is None for p in task.net.parameters())
    return str(caught.value)


@pytest.mark.parametrize("along", [True, False])
@pytest.mark.parametrize(
    ("engine", "curvature"),
    [(e, c) for e in EVERY for c in ("hessian", "ggn") if (e, c) != ("auto", "hessian")],
)
def test_an_operation_without_second_derivatives(engine, curvature, along):
    message = refusal(model(SegmentMean()), engine, curvature, along=along)
    assert "blocks.1.1" in message
    assert "segment_reduce" in message
    remedy = "curvature='hessian'" if curvature == "ggn" else "engine='finite_difference'"
    assert remedy in message
    assert "file an issue to PyTorch" not in message
    assert "\n" not in message.strip()


def test_its_hessian_is_left_to_differences():
    check_products(
        model(SegmentMean()),
        engines=["auto"],
        curvatures=["hessian"],
        rtol=1e-7,
        differences_may_serve=True,
    )


@pytest.mark.parametrize("along", [True, False])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_a_function_without_jvp(curvature, along):
    message = refusal(model(Cubes()), "dual", curvature, along=along)
    assert "blocks.1.1" in message
    assert "Function Cube" in message
    assert re.search(r"jvp.*engine='graph'", message)


class Reentrant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=True)


@pytest.mark.parametrize("engine", EVERY)
def test_reentrant_checkpointing(engine):
    message = refusal(model(Reentrant()), engine, "hessian", along=False)
    assert "use_reentrant=True" in message
    assert "use use_reentrant=False" in message
    assert "blocks.1.1" in message


@pytest.mark.parametrize("engine", EVERY)
def test_a_frozen_parameter_among_those_to_differentiate_by(engine):
    task = model(nn.Identity())
    task.net.head.requires_grad_(False)
    with pytest.raises(ValueError, match=r"requires_grad"):
        with seeded(task.closure, list(task.net.parameters()), engine=engine) as oracle:
            oracle.trace()


@pytest.mark.parametrize("engine", EVERY)
def test_a_closure_whose_parameters_are_all_frozen(engine):
    task = model(nn.Identity())
    params = task.params
    task.net.requires_grad_(False)
    with pytest.raises((ValueError, RuntimeError), match=r"require(s_| )grad"):
        with seeded(task.closure, params, engine=engine) as oracle:
            oracle.trace()


@pytest.mark.parametrize("engine", EVERY)
def test_the_models_own_error_is_passed_on(engine):
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("of the model's own")

    task = model(Broken())
    with seeded(task.closure, task.params, engine=engine) as oracle:
        with pytest.raises(KeyError, match="of the model's own"):
            oracle.trace()
