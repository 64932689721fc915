import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hvpopt.engines.losses import check_is_likelihood, terms_of
from hvpopt.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    MonteCarlo,
    NoLikelihoodError,
    Poisson,
    Terms,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_the_information_of_categorical_logits_is_the_expectation_over_all_classes():
    z, u = normal(5), normal(5, seed=1)
    likelihood = Categorical()
    gradients = [likelihood.gradient(z, torch.tensor(k)) for k in range(5)]
    expected = sum(p * g * (g @ u) for p, g in zip(z.softmax(0), gradients, strict=True))
    torch.testing.assert_close(likelihood.information(z, u), expected)


def test_the_information_of_a_binary_logit_is_the_expectation_over_both_labels():
    z, u = normal(4), normal(4, seed=1)
    likelihood = Bernoulli()
    p = torch.sigmoid(z)
    expected = sum(
        q * likelihood.gradient(z, torch.full_like(z, y)) ** 2 * u for y, q in ((0, 1 - p), (1, p))
    )
    torch.testing.assert_close(likelihood.information(z, u), expected)


def test_the_information_of_a_log_rate_is_the_expectation_over_counts():
    z, u = normal(3), normal(3, seed=1)
    likelihood = Poisson()
    expected = torch.zeros_like(z)
    for y in range(100):  # the rest has no weight at rates around one
        chance = (y * z - z.exp() - math.lgamma(y + 1)).exp()
        expected += chance * likelihood.gradient(z, torch.full_like(z, y)) ** 2 * u
    torch.testing.assert_close(likelihood.information(z, u), expected)


@pytest.mark.parametrize("variance", [0.5, 3.0])
def test_the_information_of_a_mean_is_the_expectation_over_its_normal_noise(variance):
    # Gauss-Hermite quadrature is exact here: nodes ±1 of the standard normal
    z, u, likelihood = normal(3), normal(3, seed=1), Gaussian(variance)
    expected = sum(
        0.5 * likelihood.gradient(z, z + math.sqrt(variance) * x) ** 2 * u for x in (-1.0, 1.0)
    )
    torch.testing.assert_close(likelihood.information(z, u), expected)


@pytest.mark.parametrize(
    ("likelihood", "shape"),
    [
        (Categorical(), (2, 3)),
        (Categorical(), (2, 3, 2)),
        (Categorical(), (3,)),
        (Bernoulli(), (2, 3)),
        (Gaussian(), (2, 3)),
        (Gaussian(2.0), (2,)),
        (Poisson(), ()),
    ],
)
def test_the_moments_of_sampled_gradients_are_zero_and_the_information(likelihood, shape):
    z, u = normal(*shape), normal(*shape, seed=1)
    generator = torch.Generator().manual_seed(2)
    count, dims = 3_000, likelihood.dims(z)
    gradients = torch.stack(
        [likelihood.gradient(z, likelihood.sample(z, generator)) for _ in range(count)]
    )
    along = gradients * u
    products = gradients * (along.sum(dims, keepdim=True) if dims else along)
    for samples, expected in ((gradients, torch.zeros_like(z)), (products, None)):
        expected = likelihood.information(z, u) if expected is None else expected
        error = (samples.mean(0) - expected).abs() / (samples.std(0) / math.sqrt(count))
        assert error.max() < 4.5  # standard errors


def test_a_class_without_probability_is_never_sampled():
    z = torch.tensor([-math.inf, 0.0, -math.inf, 1.0, -math.inf])
    labels = {int(Categorical().sample(z)) for _ in range(200)}
    assert labels == {1, 3}


def test_a_seed_fixes_the_labels_and_leaves_the_global_generator_alone():
    z = normal(4, 3)
    before = torch.get_rng_state()
    first, second = MonteCarlo(seed=5).generator(), MonteCarlo(seed=5).generator()
    for likelihood in (Categorical(), Bernoulli(), Gaussian(), Poisson()):
        assert torch.equal(likelihood.sample(z, first), likelihood.sample(z, second))
    assert torch.equal(torch.get_rng_state(), before)
    other = MonteCarlo(seed=6).generator()
    assert not torch.equal(Gaussian().sample(z, other), Gaussian().sample(z, first))


def test_ranks_draw_different_labels(monkeypatch):
    alone = MonteCarlo().generator()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert MonteCarlo().generator().initial_seed() != alone.initial_seed()


# Losses, the arguments that are tensors, options: what a term counts and its targets follow from
# the loss's own gradient and Hessian, by autograd.
INDEX = torch.tensor([2, 0, 1, 2])
POSITIONS = torch.tensor([[2, 0], [-100, 1], [1, 1], [0, -100]])
BINARY = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0]]).double()
SOFT = BINARY * 0.7 + 0.1
CLASSES = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
CASES = {
    "classes": (F.cross_entropy, (4, 3), INDEX, {}),
    "weighted classes": (F.cross_entropy, (4, 3), INDEX, {"weight": CLASSES}),
    "an ignored class": (F.cross_entropy, (4, 3), INDEX, {"ignore_index": 2, "weight": CLASSES}),
    "positions": (F.cross_entropy, (4, 3, 2), POSITIONS, {}),
    "weighted positions": (F.cross_entropy, (4, 3, 2), POSITIONS, {"weight": CLASSES}),
    "smoothed": (F.cross_entropy, (4, 3, 2), POSITIONS, {"label_smoothing": 0.2}),
    "smoothed and weighted": (
        F.cross_entropy,
        (4, 3, 2),
        POSITIONS,
        {"label_smoothing": 0.2, "weight": CLASSES},
    ),
    "probabilities": (F.cross_entropy, (4, 3), normal(4, 3).softmax(1), {}),
    "unnormalised": (F.cross_entropy, (4, 3, 2), normal(4, 3, 2).exp(), {"weight": CLASSES}),
    "smoothed probabilities": (
        F.cross_entropy,
        (4, 3),
        normal(4, 3).softmax(1),
        {"label_smoothing": 0.3},
    ),
    "no batch": (F.cross_entropy, (3,), torch.tensor(1), {"weight": CLASSES}),
    "binary": (F.binary_cross_entropy_with_logits, (4, 3), BINARY, {}),
    "soft binary": (F.binary_cross_entropy_with_logits, (4, 3), SOFT, {}),
    "weighted binary": (F.binary_cross_entropy_with_logits, (4, 3), SOFT, {"weight": CLASSES}),
    "positives": (F.binary_cross_entropy_with_logits, (4, 3), SOFT, {"pos_weight": CLASSES}),
    "no positives": (
        F.binary_cross_entropy_with_logits,
        (4, 3),
        BINARY,
        {"pos_weight": torch.zeros(3, dtype=torch.float64), "weight": CLASSES},
    ),
    "squares": (F.mse_loss, (4, 3), SOFT, {}),
    "weighted squares": (F.mse_loss, (4, 3), SOFT, {"weight": normal(4, 3).exp()}),
    "counts": (F.poisson_nll_loss, (4, 3), 3 * BINARY, {}),
    "full counts": (F.poisson_nll_loss, (4, 3), 3 * BINARY, {"full": True}),
}
DEFAULTS = {
    F.cross_entropy: {"weight": None, "ignore_index": -100, "label_smoothing": 0.0},
    F.binary_cross_entropy_with_logits: {"weight": None, "pos_weight": None},
    F.mse_loss: {"weight": None},
    F.poisson_nll_loss: {"log_input": True, "full": False},
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", CASES)
def test_terms_have_the_gradient_and_the_hessian_of_the_loss_function(case, reduction):
    func, shape, target, options = CASES[case]
    z, u = normal(*shape), normal(*shape, seed=1)
    out = func(z, target, reduction=reduction, **options)
    scale = normal(*out.shape, seed=2).exp()

    def loss(z: Tensor) -> Tensor:
        return (scale * func(z, target, reduction=reduction, **options)).sum()

    common = {"input": z, "target": target, "size_average": None, "reduce": None}
    arguments = {**common, **DEFAULTS[func], **options, "reduction": reduction}
    terms = terms_of(func, arguments, scale)
    gradient = terms.weights * terms.likelihood.gradient(z, terms.targets)
    torch.testing.assert_close(gradient, torch.func.grad(loss)(z))
    hessian = torch.func.hessian(loss)(z).reshape(z.numel(), z.numel())
    torch.testing.assert_close(terms.fisher("exact")(u).reshape(-1), hessian @ u.reshape(-1))


def test_half_precision_outputs_are_widened_and_products_returned_in_kind():
    z, u = normal(4, 3).bfloat16(), normal(4, 3, seed=1).bfloat16()
    terms = Terms(Categorical(), z, INDEX, torch.full((), 0.25))
    wide = Terms(Categorical(), z.double(), INDEX, torch.full((), 0.25, dtype=torch.float64))
    for kind in ("exact", "monte_carlo", "empirical"):
        fisher = [
            t.fisher(kind, generator=torch.Generator().manual_seed(0)) for t in (terms, terms)
        ]
        assert fisher[0](u).dtype == torch.bfloat16
        assert torch.equal(fisher[0](u), fisher[1](u))
    expected = wide.fisher("exact")(u.double())
    torch.testing.assert_close(terms.fisher("exact")(u).double(), expected, rtol=1e-2, atol=1e-3)


def test_what_has_no_meaning_is_refused():
    with pytest.raises(ValueError, match="num_samples=0; expected a positive integer"):
        MonteCarlo(num_samples=0)
    with pytest.raises(ValueError, match=r"num_samples=1.5; expected"):
        MonteCarlo(num_samples=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"variance=0.0; expected a positive number"):
        Gaussian(0.0)
    with pytest.raises(ValueError, match="no dimensions; expected logits of several classes"):
        Categorical().information(torch.ones(()), torch.ones(()))
    with pytest.raises(ValueError, match="empirical Fisher needs the labels"):
        Terms(Gaussian(), torch.ones(2), None, torch.ones(())).fisher("empirical")
    with pytest.raises(NoLikelihoodError, match=r"calls F.huber_loss, whose .*\(it is for F.bin"):
        check_is_likelihood(F.huber_loss)
