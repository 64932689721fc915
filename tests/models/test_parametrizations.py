"""Products in parameters that are shared, split, frozen, unused, looked up or made from others."""

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
from torch.nn.utils import parametrizations


def data(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def between(first: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(first, nn.Tanh(), nn.Linear(width, 3))


def weight_norm(layer: nn.Module, **options: object) -> nn.Module:
    return parametrizations.weight_norm(layer, **options)


def old_weight_norm(layer: nn.Module, **options: object) -> nn.Module:
    return nn.utils.weight_norm(layer, **options)


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("norm", [weight_norm, old_weight_norm])
def test_products_through_weight_norm(norm, dim):
    torch.manual_seed(0)
    check_products(classifier(between(norm(nn.Linear(4, 5), dim=dim), 5), data(6, 4)))


@pytest.mark.parametrize("dim", [0, 1])
def test_products_through_weight_norm_of_a_convolution(dim):
    torch.manual_seed(0)
    conv = weight_norm(nn.Conv1d(2, 3, 2), dim=dim)
    check_products(
        classifier(nn.Sequential(conv, nn.GELU(), nn.Flatten(), nn.Linear(6, 3)), data(4, 2, 3))
    )


SPECTRAL = {"parametrization": parametrizations.spectral_norm, "hook": nn.utils.spectral_norm}


def spectral(kind: str) -> Model:
    """In evaluation mode, after an iteration that sets the singular vectors."""
    torch.manual_seed(0)
    model = classifier(between(SPECTRAL[kind](nn.Linear(4, 5)), 5), data(6, 4))
    model.output()
    model.net.eval()
    return model


@pytest.mark.parametrize("kind", SPECTRAL)
def test_products_through_spectral_norm_at_rest(kind):
    check_products(spectral(kind))


@pytest.mark.parametrize("kind", SPECTRAL)
def test_products_through_spectral_norm_take_its_iterates_for_constants(kind):
    """As its gradient does: in training mode a power iteration under no_grad comes first."""
    model, reference = spectral(kind), spectral(kind)
    model.net.train()
    reference.net.train()
    reference.output()  # the iteration that the model's closure will do
    reference.net.eval()
    share(reference.net, dict(model.net.named_parameters()))
    check_products(model, reference=reference)


def share(net: nn.Module, params: dict[str, nn.Parameter]) -> None:
    """Puts the parameters by name in the place of the net's."""
    for name, p in params.items():
        path, _, leaf = name.rpartition(".")
        module = net.get_submodule(path)
        module._parameters[leaf] = p


def test_products_through_an_orthogonal_weight():
    torch.manual_seed(0)
    layer = parametrizations.orthogonal(nn.Linear(4, 4), "weight", "matrix_exp")
    check_products(classifier(between(layer, 4), data(6, 4)))


class Tied(nn.Module):
    """One weight for reading and writing, as in a language model."""

    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.read, self.mix = nn.Embedding(7, 4, padding_idx), nn.Linear(4, 4)
        self.write = nn.Linear(4, 7, bias=False)
        with torch.no_grad():
            self.read.weight.normal_()
        self.write.weight = self.read.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.write(torch.tanh(self.mix(self.read(tokens))))


TOKENS = torch.tensor([[0, 1, 2], [4, 4, 0]])


def test_products_in_tied_weights():
    torch.manual_seed(0)
    check_products(classifier(Tied(), TOKENS))
    check_functional_products(classifier(Tied(), TOKENS))


class PaddingApart(nn.Module):
    """A network with ``padding_idx``, its padding looked up as the constant that it is."""

    def __init__(self, net: nn.Module, padding: Tensor) -> None:
        super().__init__()
        self.net, self.padding = net, padding

    def forward(self, tokens: Tensor) -> Tensor:
        looked_up = F.embedding(tokens, self.net.read.weight)
        x = torch.where((tokens == 0).unsqueeze(-1), self.padding, looked_up)
        return self.net.write(torch.tanh(self.net.mix(x)))


@pytest.mark.parametrize("tied", [True, False])
def test_the_padding_of_an_embedding_is_a_constant(tied):
    torch.manual_seed(0)
    model = classifier(Tied(padding_idx=0), TOKENS)
    if not tied:
        model.net.write.weight = nn.Parameter(data(7, 4))
    padding = model.net.read.weight.detach()[0].clone()
    reference = Model(PaddingApart(model.net, padding), (TOKENS,), model.loss)
    check_products(model, reference=reference)


def test_an_embedding_of_bounded_norm_is_bounded_once():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(7, 4, max_norm=1.0), nn.Tanh(), nn.Linear(4, 3))
    model = classifier(net, TOKENS)
    model.output()
    reference = copy.deepcopy(model)
    reference.net[0].max_norm = None
    share(reference.net, dict(net.named_parameters()))
    check_products(model, reference=reference)


class Twice(nn.Module):
    """A layer used twice, and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head, self.unused = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(torch.tanh(self.layer(x))))


def test_products_in_a_layer_used_twice_and_one_never_used():
    torch.manual_seed(0)
    model = classifier(Twice(), data(6, 4))
    check_products(model)
    check_functional_products(model)
    for engine in (*EVERY, "finite_difference"):
        with seeded(model.closure, model.params, engine=engine) as oracle:
            product = oracle.trace().product(model.tangent())
        assert all(torch.equal(h, torch.zeros_like(h)) for h in product[-2:]), engine


def test_a_parameter_listed_twice_by_the_network_is_one():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    net[2] = net[0]
    check_products(classifier(net, data(6, 4)))


def test_products_beside_frozen_parameters():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 5), nn.SiLU(), nn.Linear(5, 3)
    )
    net[3].requires_grad_(False)
    net[1].bias.requires_grad_(False)
    check_products(classifier(net, data(6, 4)))


@pytest.mark.parametrize("engine", EVERY)
def test_a_product_in_some_parameters_is_a_block_of_the_whole(engine):
    torch.manual_seed(0)
    model = classifier(between(nn.Linear(4, 5), 5), data(6, 4))
    some, v = model.params[2:], model.tangent()
    whole = [*(torch.zeros_like(p) for p in model.params[:2]), *v[2:]]
    expected = model.hessian(whole).value[2:]
    with seeded(model.closure, some, engine=engine) as oracle:
        assert relative_error(oracle.trace().product(v[2:]), expected) < 1e-8


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("engine", EVERY)
def test_products_keep_each_parameters_own_dtype(engine, curvature):
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.narrow(torch.tanh(self.wide(x)).to(self.narrow.weight.dtype))

    torch.manual_seed(0)
    model = classifier(Mixed(), data(6, 4))
    v = [t.float().double() for t in model.tangent()]
    estimate = model.hessian(v) if curvature == "hessian" else model.ggn(v)
    model.net.narrow.float()
    with seeded(model.closure, model.params, engine=engine) as oracle:
        point = oracle.trace(curvature)
        product = point.product([t.to(p) for t, p in zip(v, model.params, strict=True)])
        for vector in (product, point.grad):
            assert [t.dtype for t in vector] == [p.dtype for p in model.params]
    assert relative_error(product, estimate.value) < 1e-5


class Bag(nn.Module):
    def __init__(self, mode: str, **options: object) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(9, 4, mode=mode, **options), nn.Linear(4, 3)

    def forward(self, *where: Tensor, **weights: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bag(*where, **weights)))


INDICES, OFFSETS = torch.tensor([1, 2, 4, 5, 4, 3, 2, 8]), torch.tensor([0, 4, 6])


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_products_through_an_embedding_bag(mode):
    torch.manual_seed(0)
    check_products(classifier(Bag(mode), INDICES, OFFSETS))


def test_products_through_an_embedding_bag_of_rows():
    torch.manual_seed(0)
    check_products(classifier(Bag("mean"), INDICES.view(4, 2)))


def test_products_through_a_weighted_embedding_bag_that_includes_its_end():
    torch.manual_seed(0)
    net, weights = (
        Bag("sum", include_last_offset=True),
        torch.linspace(-1, 1, 8, dtype=torch.float64),
    )
    offsets = torch.tensor([0, 4, 4, 8])  # the second bag is empty
    check_products(classifier(net, INDICES, offsets, per_sample_weights=weights))
