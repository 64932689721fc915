"""Sampled and empirical Fishers of closures against dense ones of the same labels."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fisher_checks import KINDS, ONES, check, products, with_loss
from fisher_oracles import classes, dense, outputs, rows, slope
from problems import EXACT, Problem, flat, problem
from torch import Tensor, nn

from hvpopt.closure import ClosureOracle
from hvpopt.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    MonteCarlo,
    Poisson,
)
from hvpopt.products.fisher import fisher_vp


def test_the_empirical_fisher_is_the_mean_of_per_example_gradients():
    y = torch.tensor([0, 2, 1, 0, 2, 0])
    target = torch.linspace(0, 1, 18, dtype=torch.float64).reshape(6, 3)
    losses: list[tuple[Callable, Tensor, int]] = [
        (F.cross_entropy, y, 6),
        (F.mse_loss, target, 18),
        (F.binary_cross_entropy_with_logits, target, 18),
        (F.poisson_nll_loss, target, 18),
    ]
    for func, labels, count in losses:
        task = with_loss(problem("mlp"), lambda z, f=func, t=labels: f(z, t))
        matrix = 0.0
        for n in range(6):
            one = func(task.net(task.x[n : n + 1]), labels[n : n + 1], reduction="sum")
            g = flat(list(torch.autograd.grad(one, task.params)))
            matrix = matrix + torch.outer(g, g) / count
        check(task, matrix, "empirical_fisher")


@pytest.mark.parametrize("kind", [Categorical, Bernoulli, Gaussian, Poisson])
def test_the_sampled_fisher_is_the_dense_one_of_its_labels(kind):
    likelihood = kind()
    func, mean = {
        "Categorical": (lambda z, y: F.cross_entropy(z, y, reduction="sum"), 1 / 6),
        "Bernoulli": (lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="sum"), 1),
        "Gaussian": (lambda z, y: F.mse_loss(z, y, reduction="sum"), 1),
        "Poisson": (lambda z, y: F.poisson_nll_loss(z, y, reduction="sum"), 1),
    }[kind.__name__]
    y = torch.arange(6) % 3 if mean != 1 else ONES
    task = with_loss(problem("mlp"), lambda z: mean * func(z, y))
    z, jacobian = outputs(task)
    sampling = MonteCarlo(num_samples=3, seed=7)
    generator = sampling.generator()
    labels = [likelihood.sample(z, generator) for _ in range(3)]
    blocks = [
        (
            mean / 3,
            rows(z)[n],
            [(1.0, slope(lambda s, n=n, k=k: func(s[None], k[n : n + 1]), z[n]))],
        )
        for n in range(6)
        for k in labels
    ]
    check(task, dense(jacobian, blocks), sampling)


def test_labels_are_the_same_for_all_products_of_a_trace_and_differ_between_seeds():
    task = problem("mlp")
    u, v = task.tangent(1), task.tangent(2)
    for engine in EXACT:
        with ClosureOracle(task.closure(), task.params, engine=engine) as oracle:
            product = oracle.trace("fisher_mc").product
            first = flat(product(v))
            torch.testing.assert_close(flat(u) @ first, flat(v) @ flat(product(u)))
            assert torch.equal(flat(product(v)), first)
        default = products(task, v, MonteCarlo(num_samples=1, seed=0), engine)[0]
        torch.testing.assert_close(default, first)
        assert not torch.allclose(products(task, v, MonteCarlo(seed=1), engine)[0], first)


def test_the_sampled_fisher_is_unbiased():
    task = problem("mlp")
    v = flat(task.tangent())
    z, jacobian = outputs(task)
    exact = dense(jacobian, [(1 / 6, r, classes(s)) for r, s in zip(rows(z), z, strict=True)])
    along = (jacobian @ v).reshape(6, 3)
    generator = torch.Generator().manual_seed(0)

    def forms(num_samples: int) -> float:  # vᵀ F v of the model z itself
        product = fisher_vp(
            lambda p: p,
            "categorical",
            z,
            along,
            kind="monte_carlo",
            num_samples=num_samples,
            generator=generator,
        )
        return float((along * product).sum())

    samples = torch.tensor([forms(10) for _ in range(300)], dtype=torch.float64)
    error = (samples.mean() - v @ exact @ v) / (samples.std() / math.sqrt(len(samples)))
    assert abs(error) < 4  # standard errors


@pytest.mark.parametrize("curvature", KINDS)
@pytest.mark.parametrize("engine", EXACT)
def test_every_fisher_is_symmetric_and_positive_semidefinite(engine, curvature):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x = torch.randn(4, 2, dtype=torch.float64)
    task = Problem(net, x, lambda z: F.cross_entropy(z, torch.arange(4) % 3))
    basis = torch.eye(sum(p.numel() for p in task.params), dtype=torch.float64)
    sizes = [p.numel() for p in task.params]
    with ClosureOracle(task.closure(), task.params, engine=engine) as oracle:
        product = oracle.trace(curvature).product
        columns = []
        for e in basis:
            parts = zip(e.split(sizes), task.params, strict=True)
            columns.append(flat(product([q.view_as(p) for q, p in parts])))
    matrix = torch.stack(columns)
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-9, atol=1e-12)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-12
    assert torch.linalg.eigvalsh(matrix).max() > 1e-3
