"""Kronecker factors against loops over examples, dense inverses, and what CG makes of them."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from kronecker_cases import (
    conv_task,
    dense_inverse,
    factors,
    point_of,
    randn,
    refreshed,
    slopes_of,
)
from problems import Problem, problem
from torch import nn

from hvpopt import trees
from hvpopt.closure import ClosureOracle
from hvpopt.preconditioners.kronecker import Kronecker
from hvpopt.solvers.cg import cg
from hvpopt.solvers.stopping import ResidualNorm


def test_the_factors_of_linear_layers_are_those_of_a_loop_over_examples():
    task = problem("mlp")
    states = refreshed(task, Kronecker(), seed=5)
    (u,) = slopes_of(task, seed=5)
    first, tanh, second, silu, third = task.net
    R, C = [0, 0, 0], [0, 0, 0]
    for x, u_n in zip(task.x, u, strict=True):
        inputs = [x, tanh(first(x)), silu(second(tanh(first(x))))]
        after = [
            lambda y: third(silu(second(tanh(y)))),
            lambda y: third(silu(y)),
            lambda y: y,
        ]
        for i, layer in enumerate((first, second, third)):
            jacobian = torch.autograd.functional.jacobian(after[i], layer(inputs[i]).detach())
            slope = jacobian.T @ u_n
            a = torch.cat([inputs[i].detach(), torch.ones(1)])
            R[i] += torch.outer(slope, slope)
            C[i] += torch.outer(a, a) / len(task.x)
    for i in range(3):
        rows, columns = factors(states[2 * i])
        torch.testing.assert_close(rows, R[i][None])
        torch.testing.assert_close(columns, C[i][None])


@pytest.mark.parametrize("groups", [1, 2])
def test_the_factors_of_a_convolution_are_those_of_a_loop_over_patches(groups):
    task = conv_task(groups)
    states = refreshed(task, Kronecker())
    (u,) = slopes_of(task)
    conv, *rest = task.net
    rows, columns = factors(states[0])
    for g in range(groups):
        R, C = 0, 0
        for x, u_n in zip(task.x, u, strict=True):
            jacobian = torch.autograd.functional.jacobian(
                nn.Sequential(*rest), conv(x[None]).detach()
            )
            slopes = torch.tensordot(u_n, jacobian[0], 1)[0].chunk(groups)[g]
            for i in range(2):
                for j in range(2):
                    patch = x.chunk(groups)[g][:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                    a = torch.cat([patch.reshape(-1), torch.ones(1)])
                    R = R + torch.outer(slopes[:, i, j], slopes[:, i, j])
                    C = C + torch.outer(a, a) / (4 * len(task.x))
        torch.testing.assert_close(rows[g], R)
        torch.testing.assert_close(columns[g], C)


def test_a_weight_used_at_each_step_sums_the_steps():
    w = nn.Parameter(randn(3, 3))
    x, y = randn(4, 3), torch.arange(4) % 3
    net = nn.Module()
    net.weight, net.forward = w, lambda x: torch.tanh(torch.tanh(x @ w.T) @ w.T)
    task = Problem(net, x, lambda z: F.cross_entropy(z, y))
    rows, columns = factors(refreshed(task, Kronecker())[0])
    (u,) = slopes_of(task)
    h = torch.tanh(x @ w.T).detach()
    late = u * (1 - torch.tanh(h @ w.T).detach() ** 2)
    early = (late @ w.detach()) * (1 - h**2)
    pairs = [(d.T @ d, a.T @ a / 4) for d, a in ((late, h), (early, x))]
    total = sum(r.trace() * c.trace() for r, c in pairs)
    torch.testing.assert_close((rows[0].trace() * columns[0].trace()), total)
    by_rows = sum(c.trace() * r for r, c in pairs)
    by_columns = sum(r.trace() * c for r, c in pairs)
    expected = torch.kron(by_rows, by_columns) / total
    torch.testing.assert_close(torch.kron(rows[0], columns[0]), expected)


def test_tied_weights_that_are_read_and_written_share_their_factors():
    """An embedding, whose factor of rows is diagonal, and the output layer of the same weight."""
    torch.manual_seed(0)
    table = nn.Embedding(5, 3, dtype=torch.float64)
    net = nn.Sequential(table)
    net.forward = lambda x: F.linear(torch.tanh(table(x)), table.weight)
    x, y = torch.tensor([0, 1, 1, 4]), torch.tensor([1, 2, 3, 0])
    task = Problem(net, x, lambda z: F.cross_entropy(z, y))
    rows, columns = factors(refreshed(task, Kronecker())[0])
    (u,) = slopes_of(task)
    W = table.weight.detach()
    h = torch.tanh(W[x])
    back = (u @ W) * (1 - h**2)
    counts = torch.diag(torch.bincount(x, minlength=5).double())
    pairs = [(u.T @ u, h.T @ h / 4), (counts, back.T @ back / 4)]
    total = sum(r.trace() * c.trace() for r, c in pairs)
    by_rows = sum(c.trace() * r for r, c in pairs)
    by_columns = sum(r.trace() * c for r, c in pairs)
    expected = torch.kron(by_rows, by_columns) / total
    torch.testing.assert_close(torch.kron(rows[0], columns[0]), expected)


def test_the_expected_preconditioner_of_a_linear_regression_is_its_ggn():
    """One layer and a Gaussian likelihood: slopes do not depend on inputs."""
    net = nn.Linear(3, 2).double()
    task = Problem(net, randn(6, 3), lambda z: F.mse_loss(z, torch.ones_like(z)))
    kronecker = Kronecker(num_samples=4000)
    states = refreshed(task, kronecker)
    M = torch.linalg.inv(dense_inverse(kronecker, states, task.params, [0.0, 0.0]))
    dense = task.dense_ggn()
    assert (M - dense).norm() < 0.03 * dense.norm()


def test_with_constant_inputs_the_expected_blocks_are_those_of_the_ggn():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x = randn(1, 2).expand(4, 2)
    task = Problem(net, x, lambda z: F.cross_entropy(z, torch.arange(4) % 3))
    kronecker = Kronecker(num_samples=4000)
    states = refreshed(task, kronecker)
    dense = task.dense_ggn()
    for state, block in ((states[0], slice(0, 6)), (states[2], slice(9, 18))):
        rows, columns = factors(state)
        M = torch.kron(rows[0], columns[0][:-1, :-1].contiguous())
        assert (M - dense[block, block]).norm() < 0.05 * dense[block, block].norm()
    inverse = dense_inverse(kronecker, states, task.params, [0.1] * 4)
    assert inverse[:9, 9:].norm() == 0


@pytest.mark.parametrize("task", [problem("mlp"), conv_task(2), conv_task(1, bias=False)])
def test_solving_multiplies_with_the_inverse_of_the_dense_matrix(task):
    kronecker = Kronecker()
    states = refreshed(task, kronecker)
    shift = [0.3 if p.dim() > 1 else 7.0 for p in task.params]  # a bias has its weight's
    found = dense_inverse(kronecker, states, task.params, shift)
    sizes, at = [p.numel() for p in task.params], 0
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    expected = torch.zeros_like(found)
    for i, p in enumerate(task.params):
        if p.dim() == 1:
            continue
        rows, columns = factors(states[i])
        groups, num_rows = rows.shape[:2]
        has_bias = states[i]["kronecker"]["partner"] == 1
        width = p.numel() // (groups * num_rows)
        for g in range(groups):
            index = []
            for row in range(g * num_rows, (g + 1) * num_rows):
                index += [starts[i] + row * width + k for k in range(width)]
                index += [starts[i + 1] + row] if has_bias else []
            at += len(index)
            m, n = num_rows, len(columns[g])
            rho, kappa = rows[g].trace() / m, columns[g].trace() / n
            share = (0.3 / (rho * kappa)) ** 0.5
            lifted = rows[g] + share * rho * torch.eye(m), columns[g] + share * kappa * torch.eye(n)
            inverse = torch.linalg.inv(torch.kron(*lifted))
            expected[torch.tensor(index)[:, None], torch.tensor(index)] = inverse
    assert at == sum(sizes)
    torch.testing.assert_close(found, expected)


AWKWARD = ["batchnorm", "groupnorm", "dropout", "transformer", "lstm", "tied"]


@pytest.mark.parametrize("name", AWKWARD)
def test_it_is_symmetric_and_positive_definite_and_needs_no_shift(name):
    task, kronecker = problem(name), Kronecker()
    states = refreshed(task, kronecker)
    assert kronecker.is_ready(states)
    inverse = dense_inverse(kronecker, states, task.params, [1e-2] * len(task.params))
    torch.testing.assert_close(inverse, inverse.T)
    assert float(torch.linalg.eigvalsh(inverse).min()) > 0
    r = task.tangent()
    solved = kronecker.solve(r, states, [0.0] * len(r))
    assert 0 < trees.dot(r, solved) < torch.inf


def test_what_no_layer_explains_has_the_mean_square_of_sampled_gradients():
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3)).double()
    task = Problem(net, randn(4, 3), lambda z: F.cross_entropy(z, torch.arange(4) % 3))
    states = refreshed(task, Kronecker(num_samples=2))
    squares = []
    for u in slopes_of(task, num_samples=2):
        grads = torch.autograd.grad((net(task.x) * u).sum(), list(net[0].parameters()))
        squares.append([g**2 for g in grads])
    for i in range(2):
        mean = (squares[0][i] + squares[1][i]) / 2
        expected = (mean + mean.mean()) / 2
        torch.testing.assert_close(states[i]["kronecker"]["diagonal"], expected)
    r = [randn(*p.shape) for p in task.params]
    found = Kronecker().solve(r, states, [0.1] * 4)
    torch.testing.assert_close(found[0], r[0] / (states[0]["kronecker"]["diagonal"] + 0.1))


def test_an_unused_parameter_does_not_disturb():
    net = nn.Sequential(nn.Linear(3, 2)).double()
    net.unused = nn.Parameter(randn(2))
    task = Problem(net, randn(4, 3), lambda z: F.mse_loss(z, torch.ones_like(z)))
    kronecker = Kronecker()
    states = refreshed(task, kronecker)
    r = [randn(*p.shape) for p in task.params]
    assert all(x.isfinite().all() for x in kronecker.solve(r, states, [0.0] * len(r)))


def ill_conditioned():
    """A deep autoencoder of inputs with scales from 1 to 1e-2."""
    torch.manual_seed(0)
    sizes = [24, 16, 8, 16, 24]
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
    net = nn.Sequential(*layers[:-1]).double()
    x = randn(200, 24) @ torch.diag(torch.logspace(0, -2, 24, dtype=torch.float64)) @ randn(24, 24)
    return Problem(net, x, lambda z: F.mse_loss(z, x))


def steps_of_cg(task, kronecker, damping, rtol):
    """Without and with the preconditioner."""
    states = [{} for _ in task.params]
    with ClosureOracle(task.closure(), task.params) as oracle:
        point = point_of(oracle, task.params)
        kronecker.prepare(point, states, 0)
        damped = lambda v: trees.add(point.product(v), v, damping)  # noqa: E731
        precondition = lambda r: kronecker.solve(r, states, [damping] * len(r))  # noqa: E731
        options = {"stop": ResidualNorm(rtol=rtol), "max_steps": 3000}
        plain = cg(damped, point.grad, **options)
        ours = cg(damped, point.grad, preconditioner=precondition, **options)
    assert ours.model_value == pytest.approx(plain.model_value, rel=0.05)
    return plain.num_steps, ours.num_steps


def test_cg_takes_a_fraction_of_the_steps_on_a_deep_network():
    plain, ours = steps_of_cg(ill_conditioned(), Kronecker(num_samples=4), 1e-4, 1e-2)
    assert ours < plain / 2.5


def test_cg_takes_a_few_steps_where_the_curvature_is_a_kronecker_product():
    x = randn(100, 20) * torch.logspace(0, -2, 20, dtype=torch.float64)
    net = nn.Linear(20, 1).double()
    task = Problem(net, x, lambda z: F.mse_loss(z, x.sum(1, keepdim=True)))
    plain, ours = steps_of_cg(task, Kronecker(num_samples=20), 1e-7, 1e-6)
    assert plain > 20
    assert ours <= 5
