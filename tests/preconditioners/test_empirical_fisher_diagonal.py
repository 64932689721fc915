"""The empirical Fisher's diagonal as a preconditioner, against per-example gradients."""

import pytest
import torch
import torch.nn.functional as F
from diagonal_cases import diagonal
from problems import flat, problem
from ranks import in_two_processes
from torch import nn

from hvpopt.closure import ClosureOracle
from hvpopt.likelihoods import NoLikelihoodError
from hvpopt.preconditioners import CurvaturePoint, EmpiricalFisherDiagonal, Jacobi

LABELS = torch.tensor([0, 2, 1, 0, 2, 0])


def squares_of_examples(task, func=F.cross_entropy, labels=LABELS):
    """Σ_n (∇ℓ_n)² by a loop over the examples."""
    total = 0.0
    for n in range(6):
        one = func(task.net(task.x[n : n + 1]), labels[n : n + 1], reduction="sum")
        total = total + flat(list(torch.autograd.grad(one, task.params))) ** 2
    return total


def fisher_states(closure, params, preconditioner, seed=0):
    states = [{} for _ in params]
    with ClosureOracle(closure, params) as oracle:
        point = oracle.trace_along([torch.zeros_like(p) for p in params])
        preconditioner.prepare(
            CurvaturePoint(params, point[1], lambda v: v, oracle, seed), states, 0
        )
    return states


def test_examples_with_a_backward_each_give_their_squared_gradients_exactly():
    task = problem("mlp")

    def closure():
        task.net.zero_grad()
        for n in range(6):
            (F.cross_entropy(task.net(task.x[n : n + 1]), LABELS[n : n + 1]) / 6).backward()

    states = fisher_states(closure, task.params, EmpiricalFisherDiagonal(num_probes=2))
    torch.testing.assert_close(diagonal(states), squares_of_examples(task) / 6)


@pytest.mark.parametrize(
    ("func", "count"), [(F.cross_entropy, 6), (F.mse_loss, 18)], ids=["cross_entropy", "mse_loss"]
)
def test_the_mean_over_probes_tends_to_the_mean_of_squared_gradients(func, count):
    task = problem("mlp")
    target = torch.linspace(0, 1, 18, dtype=torch.float64).reshape(6, 3)
    labels = LABELS if func is F.cross_entropy else target
    task.loss = lambda z: func(z, labels)
    expected = squares_of_examples(task, func, labels) / count
    states = fisher_states(task.closure(), task.params, EmpiricalFisherDiagonal(num_probes=800))
    found = diagonal(states)
    # a probe's variance is at most twice the square of its mean
    assert bool(((found - expected).abs() < 5 * (2 / 800) ** 0.5 * expected).all())


def test_signs_differ_from_term_to_term():
    task = problem("mlp")
    one = EmpiricalFisherDiagonal(num_probes=1)
    found = [diagonal(fisher_states(task.closure(), task.params, one, seed)) for seed in range(4)]
    total = flat([p.grad for p in task.params]) ** 2
    assert not any(torch.allclose(f, 6 * total) for f in found)
    assert not torch.allclose(found[0], found[1])


def test_the_fishers_exponent_is_martens_three_quarters():
    task = problem("mlp")
    preconditioner = EmpiricalFisherDiagonal()
    states = fisher_states(task.closure(), task.params, preconditioner)
    r = [torch.ones_like(p) for p in task.params]
    solved = preconditioner.solve(r, states, [0.5] * len(r))
    torch.testing.assert_close(flat(solved), (diagonal(states) + 0.5) ** -0.75)


def _averaged(rank):
    task = problem("mlp")
    net = nn.parallel.DistributedDataParallel(task.net)
    x, y = task.x[rank : rank + 1], LABELS[rank : rank + 1]

    def closure():
        for p in task.params:
            p.grad = None
        F.cross_entropy(net(x), y).backward()

    preconditioner = EmpiricalFisherDiagonal(num_probes=2)
    return diagonal(fisher_states(closure, task.params, preconditioner))


def test_ranks_hold_the_diagonal_of_the_joined_batch(tmp_path):
    task = problem("mlp")
    expected = 0.0
    for n in range(2):
        one = F.cross_entropy(task.net(task.x[n : n + 1]), LABELS[n : n + 1])
        expected = expected + flat(list(torch.autograd.grad(one, task.params))) ** 2 / 2
    torch.testing.assert_close(in_two_processes(_averaged, tmp_path), expected)


def test_a_loss_without_a_likelihood_is_refused():
    task = problem("mlp")
    task.loss = lambda z: (z**2).mean()
    with pytest.raises(NoLikelihoodError, match="Jacobi and Nystrom do without"):
        fisher_states(task.closure(), task.params, EmpiricalFisherDiagonal())


@pytest.mark.parametrize("kind", [Jacobi, EmpiricalFisherDiagonal])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_probes": 0}, "num_probes=0 is out of range: expected a whole number at least 1"),
        ({"every": 1.5}, "every=1.5 is out of range: expected a whole number"),
        ({"exponent": 2.0}, "exponent=2.0 is out of range: expected a number between 0.0 and 1.0"),
        ({"exponent": "1"}, "exponent='1' is out of range"),
        ({"decay": 1.0}, "decay=1.0 is out of range: expected a number between 0.0 and 0.99"),
    ],
)
def test_an_option_out_of_range_is_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)
