"""Fisher products of functions against dense matrices over enumerated labels."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fisher_oracles import bits, classes, dense, rows, slope
from problems import flat
from torch import Tensor

from hvpopt.likelihoods import Categorical, Gaussian
from hvpopt.products.fisher import fisher_vp


def mlp() -> tuple[Callable, dict[str, Tensor], dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    params = {"first": normal(2, 4), "bias": normal(4), "second": normal(4, 3)}
    v = {key: normal(*p.shape) for key, p in params.items()}

    def model(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.tanh(x @ p["first"] + p["bias"]) @ p["second"]

    return model, params, v, normal(5, 2)


def jacobian_of(model, params, x) -> tuple[Tensor, Tensor]:
    parts = torch.func.jacrev(model)(params, x)
    z = model(params, x)
    return z, torch.cat([parts[key].reshape(z.numel(), -1) for key in params], 1)


def values(tree: dict[str, Tensor]) -> Tensor:
    return flat(list(tree.values()))


def test_the_functional_fishers_are_the_dense_ones():
    model, params, v, x = mlp()
    z, jacobian = jacobian_of(model, params, x)
    for reduction, count in (("mean", 5), ("sum", 1)):
        blocks = [(1 / count, r, classes(s)) for r, s in zip(rows(z), z, strict=True)]
        product = fisher_vp(model, "categorical", params, v, x, reduction=reduction)
        expected = dense(jacobian, blocks) @ values(v)
        torch.testing.assert_close(values(product), expected, rtol=1e-9, atol=1e-11)
    for reduction, count in (("mean", 15), ("sum", 1)):
        blocks = [(1 / count, r, bits(s)) for r, s in zip(rows(z), z, strict=True)]
        product = fisher_vp(model, "bernoulli", params, v, x, reduction=reduction)
        expected = dense(jacobian, blocks) @ values(v)
        torch.testing.assert_close(values(product), expected, rtol=1e-9, atol=1e-11)
    for likelihood, inner in (
        ("gaussian", 2 * torch.ones_like(z)),
        (Gaussian(variance=4.0), 0.25 * torch.ones_like(z)),
        ("poisson", z.exp()),
    ):
        product = fisher_vp(model, likelihood, params, v, x, reduction="sum")
        expected = jacobian.T @ (inner.reshape(-1) * (jacobian @ values(v)))
        torch.testing.assert_close(values(product), expected, rtol=1e-9, atol=1e-11)


def test_the_functional_empirical_fisher_takes_the_given_labels():
    model, params, v, x = mlp()
    z, jacobian = jacobian_of(model, params, x)
    y = torch.tensor([0, 2, -100, 1, 2])
    kept = [n for n in range(5) if n != 2]
    given = [
        (1 / 4, rows(z)[n], [(1.0, slope(lambda s, n=n: F.cross_entropy(s, y[n]), z[n]))])
        for n in kept
    ]
    product = fisher_vp(model, "categorical", params, v, x, kind="empirical", targets=y)
    torch.testing.assert_close(values(product), dense(jacobian, given) @ values(v))
    exact = dense(jacobian, [(1 / 4, rows(z)[n], classes(z[n])) for n in kept])
    product = fisher_vp(model, "categorical", params, v, x, targets=y)
    torch.testing.assert_close(values(product), exact @ values(v))
    soft = F.one_hot(y.clamp(0), 3).double()
    whole = torch.tensor([0, 2, 0, 1, 2])
    hard, alike = (
        fisher_vp(model, "categorical", params, v, x, kind="empirical", targets=t)
        for t in (whole, soft)
    )
    torch.testing.assert_close(values(alike), values(hard))


def test_the_functional_sampled_fisher_is_the_dense_one_of_its_labels():
    model, params, v, x = mlp()
    z, jacobian = jacobian_of(model, params, x)
    generator = torch.Generator().manual_seed(4)
    labels = [Categorical().sample(z, generator) for _ in range(2)]
    blocks = [
        (1 / 10, rows(z)[n], [(1.0, slope(lambda s, n=n, k=k: F.cross_entropy(s, k[n]), z[n]))])
        for n in range(5)
        for k in labels
    ]
    options = {"kind": "monte_carlo", "num_samples": 2, "generator": generator.manual_seed(4)}
    product = fisher_vp(model, "categorical", params, v, x, **options)
    torch.testing.assert_close(values(product), dense(jacobian, blocks) @ values(v))


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian", "poisson"])
@pytest.mark.parametrize("kind", ["exact", "monte_carlo", "empirical"])
def test_products_compose_with_vmap_over_directions(likelihood, kind):
    model, params, v, x = mlp()
    y = torch.arange(5) % 3 if likelihood == "categorical" else torch.ones(5, 3).double()

    def product(v: dict[str, Tensor]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return fisher_vp(model, likelihood, params, v, x, kind=kind, targets=y, generator=generator)

    several = {key: torch.stack([t, 2 * t, t.sin()]) for key, t in v.items()}
    batched = torch.vmap(product, randomness="same")(several)
    for i in range(3):
        one = product({key: t[i] for key, t in several.items()})
        torch.testing.assert_close(values({k: t[i] for k, t in batched.items()}), values(one))


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_products_can_be_differentiated(kind):
    model, params, v, x = mlp()
    y = torch.arange(5) % 3

    def form(t: Tensor) -> Tensor:
        moved = {key: p + t * v[key] for key, p in params.items()}
        product = fisher_vp(model, "categorical", moved, v, x, kind=kind, targets=y)
        return sum((v[key] * product[key]).sum() for key in v)

    zero, h = torch.zeros((), dtype=torch.float64), 1e-5
    expected = (form(zero + h) - form(zero - h)) / (2 * h)  # error of order h²
    torch.testing.assert_close(torch.func.grad(form)(zero), expected, rtol=1e-7, atol=1e-8)


def test_products_of_an_ensemble_by_vmap_over_parameters():
    model, params, v, x = mlp()
    several = {key: torch.stack([p, 2 * p]) for key, p in params.items()}
    batched = torch.vmap(lambda p: fisher_vp(model, "categorical", p, v, x))(several)
    for i in range(2):
        one = fisher_vp(model, "categorical", {k: p[i] for k, p in several.items()}, v, x)
        torch.testing.assert_close(values({k: t[i] for k, t in batched.items()}), values(one))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "mc"}, ValueError, "kind='mc' is unknown: choose one of 'exact', 'monte_carlo'"),
        ({"reduction": "none"}, ValueError, "reduction='none' is unknown: choose one of 'mean'"),
        ({"likelihood": Gaussian}, TypeError, r"likelihood is the class Gaussian; expected a name"),
        ({"likelihood": "beta"}, ValueError, "likelihood='beta' is unknown: .* 'gaussian'"),
        ({"kind": "empirical"}, ValueError, "kind='empirical' needs the labels: pass targets="),
        ({"num_samples": 0}, ValueError, "num_samples=0; expected a positive integer"),
        ({"targets": torch.ones(4, dtype=torch.long)}, ValueError, r"\(4,\); expected \(5,\)"),
        ({"targets": torch.ones(5, 2)}, ValueError, r"\(5, 2\); expected \(5, 3\) for an output"),
        ({"v": {"first": torch.ones(2)}}, ValueError, "expected the same structure"),
        ({"model": lambda p, x: [p["bias"]]}, TypeError, "returned a list; expected one tensor"),
        ({"model": lambda p, x: x > 0}, TypeError, "the model's output is torch.bool"),
    ],
)
def test_a_bad_argument_of_fisher_vp_is_named(options, error, message):
    model, params, v, x = mlp()
    given = {"model": model, "likelihood": "categorical", "v": v, **options}
    rest = {k: o for k, o in given.items() if k not in ("model", "likelihood", "v")}
    with pytest.raises(error, match=message):
        fisher_vp(given["model"], given["likelihood"], params, given["v"], x, **rest)
