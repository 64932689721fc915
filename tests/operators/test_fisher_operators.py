"""Fisher operators of datasets: exact, empirical and sampled."""

import pytest
import torch
import torch.nn.functional as F
from operator_cases import close, cross_entropy_of, ragged, ten_examples
from problems import Problem, flat, problem
from torch import nn

from hvpopt.operators import FisherOperator


@pytest.fixture
def data():
    return ten_examples()


@pytest.mark.parametrize("retain_graphs", [False, True])
def test_the_exact_fisher_is_the_ggn(data, retain_graphs):
    net = problem("mlp").net
    whole = Problem(net, data[0], lambda z: F.cross_entropy(z, data[1]))
    op = FisherOperator(
        cross_entropy_of(net), net.parameters(), ragged(data), retain_graphs=retain_graphs
    )
    close(op.to_dense(), whole.dense_ggn())


def test_the_empirical_fisher_is_the_mean_of_outer_products(data):
    net = problem("mlp").net
    params = list(net.parameters())
    loss = cross_entropy_of(net)
    grads = torch.stack(
        [flat(torch.autograd.grad(loss(b), params)) for b in ragged(data, [1] * 10)]
    )
    op = FisherOperator(loss, params, ragged(data), kind="empirical")
    close(op.to_dense(), grads.T @ grads / 10)


def test_the_sampled_fisher_tends_to_the_exact_one_and_stays_the_same(data):
    net = problem("mlp").net
    loss = cross_entropy_of(net)
    params = list(net[-1].parameters())
    exact = FisherOperator(loss, params, ragged(data)).to_dense()
    op = FisherOperator(loss, params, ragged(data), kind="monte_carlo", num_samples=1000)
    sampled = op.to_dense()
    # standard errors of 1/√1000 a term
    assert (sampled - exact).norm() < 0.1 * exact.norm()
    close(op.to_dense(), sampled)
    other = FisherOperator(loss, params, ragged(data), kind="monte_carlo", num_samples=1000, seed=1)
    assert not torch.allclose(other.to_dense(), sampled)


def test_batches_sample_labels_independently(data):
    net = problem("mlp").net
    loss = cross_entropy_of(net)
    one, params = (data[0][:1], data[1][:1]), list(net[-1].parameters())
    alone = FisherOperator(loss, params, [one], kind="monte_carlo")
    many = FisherOperator(loss, params, [one] * 20, kind="monte_carlo")
    assert torch.linalg.matrix_rank(alone.to_dense()) == 1
    assert torch.linalg.matrix_rank(many.to_dense(), rtol=1e-9) > 1


def test_the_labels_of_batches_are_sampled_apart_from_those_of_neighbouring_seeds(data):
    net = nn.Linear(4, 3).double()
    batch = (data[0][:1], data[1][:1])

    def sampled(seed, number):
        loss = cross_entropy_of(net)
        op = FisherOperator(loss, net.parameters(), [batch] * number, kind="monte_carlo", seed=seed)
        return op.to_dense() * number

    # the second batch of seed s is not the first of seed s + 1
    pairs = [(sampled(s, 2) - sampled(s, 1), sampled(s + 1, 1)) for s in range(12)]
    assert not all(torch.allclose(second, first) for second, first in pairs)
