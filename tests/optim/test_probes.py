"""Random diagonals against dense matrices, and the moments of the probes themselves."""

import math

import pytest
import torch
import torch.nn.functional as F
from problems import flat, problem
from torch import nn

from hvpopt import ClosureOracle
from hvpopt.engines.choice import EngineChoice
from hvpopt.likelihoods import Categorical, NoLikelihoodError
from hvpopt.optim.probes import gauss_newton_bartlett, hutchinson, rademacher, seed_of_step

SEEDS = [seed_of_step(0, step) for step in range(400)]


def test_probes_are_signs_with_mean_zero_and_variance_one_in_every_entry():
    draws = torch.stack([rademacher([torch.zeros(3, 4)], seed)[0] for seed in SEEDS])
    assert set(draws.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(draws**2, torch.ones_like(draws))  # the variance about zero
    five_errors = 5 / math.sqrt(len(SEEDS))
    assert draws.mean(0).abs().max() < five_errors
    flat_draws = draws.reshape(len(SEEDS), -1)
    second_moment = flat_draws.T @ flat_draws / len(SEEDS)
    assert (second_moment - torch.eye(12)).abs().max() < five_errors


def test_probes_of_consecutive_steps_are_uncorrelated():
    draws = torch.stack([rademacher([torch.zeros(500)], seed)[0] for seed in SEEDS[:50]])
    correlations = (draws @ draws.T / 500).fill_diagonal_(0)
    assert correlations.abs().max() < 5 / math.sqrt(500)


def test_a_probe_is_determined_by_its_seed_and_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    like = [torch.zeros(5), torch.zeros(2, 3, dtype=torch.float64)]
    first, second = rademacher(like, 3), rademacher(like, 3)
    assert all(map(torch.equal, first, second))
    assert [z.dtype for z in first] == [torch.float32, torch.float64]
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_differ_for_every_step_and_base_seed_and_fit_the_generator():
    seeds = {seed_of_step(seed, step) for seed in range(50) for step in range(50)}
    assert len(seeds) == 2500
    assert max(seeds) < 2**32


@pytest.mark.parametrize("engine", ["graph", "dual"])
def test_hutchinsons_diagonal_has_the_dense_hessians_for_its_expectation(engine):
    task = problem("mlp")
    dense = task.dense_hessian()
    samples, choice = [], EngineChoice(engine)
    for seed in SEEDS[:200]:
        with ClosureOracle(task.closure(), task.params, engine=choice) as oracle:
            loss, diagonal = hutchinson(oracle, task.params, seed)
        samples.append(flat(diagonal))
    assert float(loss) == pytest.approx(float(task.loss(task.net(task.x).detach())))
    mean = torch.stack(samples).mean(0)
    variance = (dense**2).sum(1) - dense.diagonal() ** 2
    error = (mean - dense.diagonal()).abs() / (variance / len(samples)).sqrt()
    assert error.max() < 5
    spread = torch.stack(samples).var(0)
    assert float(spread.sum() / variance.sum()) == pytest.approx(1.0, rel=0.2)


def test_hutchinsons_diagonal_of_a_diagonal_hessian_is_exact():
    w = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))

    def closure():
        w.grad = None
        loss = (torch.tensor([1.0, -4.0, 0.0]) * w**2).sum()
        loss.backward()
        return loss

    with ClosureOracle(closure, [w], engine="graph") as oracle:
        _, (diagonal,) = hutchinson(oracle, [w], seed=1)
        assert oracle.num_runs == oracle.num_products == 1
    assert torch.equal(diagonal, torch.tensor([2.0, -8.0, 0.0]))
    assert torch.equal(w.grad, torch.tensor([2.0, 16.0, 0.0]))


def bartlett(closure, params, seed):
    with ClosureOracle(closure, params) as oracle:
        oracle.gradient()
        grads = [None if p.grad is None else p.grad.clone() for p in params]
        runs = oracle.num_runs
        diagonal = gauss_newton_bartlett(oracle, params, seed)
        assert oracle.num_runs == runs + 1
    for p, grad in zip(params, grads, strict=True):
        assert (p.grad is None) == (grad is None)
        assert grad is None or torch.equal(p.grad, grad)
    return diagonal


@pytest.mark.parametrize("name", ["mlp", "tied", "transformer"])
def test_bartletts_estimate_has_the_dense_ggns_diagonal_for_its_expectation(name):
    """Cross-entropy and a mean of squares; five standard errors of the mean, measured."""
    task = problem(name)
    samples = torch.stack(
        [flat(bartlett(task.closure(), task.params, seed)) for seed in SEEDS[:200]]
    )
    assert (samples >= 0).all()
    error = samples.std(0) / math.sqrt(len(samples))
    gap = (samples.mean(0) - task.dense_ggn().diagonal()).abs()
    assert (gap <= 5 * error + 1e-12).all()
    assert float(samples.mean(0).sum()) == pytest.approx(float(task.dense_ggn().trace()), rel=0.15)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_bartletts_estimate_is_the_papers_batch_size_times_the_squared_gradient(reduction):
    """With labels drawn as `hvpopt.likelihoods` draws them, N ĝ⊙ĝ by an ordinary backward."""
    torch.manual_seed(0)
    net, x = nn.Linear(3, 4).double(), torch.randn(6, 3, dtype=torch.float64)
    params = list(net.parameters())

    def closure():
        net.zero_grad()
        loss = F.cross_entropy(net(x), torch.arange(6) % 4, reduction=reduction)
        loss.backward()
        return loss

    seed = 11
    diagonal = bartlett(closure, params, seed)
    labels = Categorical().sample(net(x).detach(), torch.Generator().manual_seed(seed))
    loss = F.cross_entropy(net(x), labels, reduction=reduction)
    grads = torch.autograd.grad(loss, params)
    times = 6 if reduction == "mean" else 1
    for d, g in zip(diagonal, grads, strict=True):
        torch.testing.assert_close(d, times * g**2)


def test_bartletts_estimate_sees_the_dropout_mask_of_the_gradients_run():
    torch.manual_seed(0)
    w = nn.Parameter(torch.ones(1, 8))

    def closure():
        w.grad = None
        z = F.dropout(w, 0.5)
        loss = F.mse_loss(z, torch.zeros_like(z))
        loss.backward()
        return loss

    for seed in range(5):
        (diagonal,) = bartlett(closure, [w], seed)
        assert torch.equal(diagonal == 0, w.grad == 0)
        assert (w.grad == 0).any()


def test_a_parameter_outside_of_the_loss_has_a_diagonal_of_zeros():
    task = problem("mlp")
    alone = nn.Parameter(torch.ones(2, dtype=torch.float64))
    diagonal = bartlett(task.closure(), [*task.params, alone], seed=0)
    assert torch.equal(diagonal[-1], torch.zeros_like(alone))


def test_a_loss_without_labels_is_refused_with_the_other_estimator_named():
    w = nn.Parameter(torch.ones(2))

    def closure():
        loss = (w**4).sum()
        loss.backward()
        return loss

    message = r"hvpopt\.SophiaH does without labels.*F\.mse_loss"
    with ClosureOracle(closure, [w]) as oracle:
        oracle.gradient()
        with pytest.raises(NoLikelihoodError, match=message):
            gauss_newton_bartlett(oracle, [w], seed=0)
