"""The curvature's diagonal as a preconditioner, against dense matrices."""

import copy

import pytest
import torch
from checkpoints import states_after_a_checkpoint
from diagonal_cases import SHAPES, diagonal, point_of, random_vector, states_of, symmetric
from problems import flat
from torch import nn

from hvpopt import trees
from hvpopt.preconditioners import Jacobi
from hvpopt.solvers.cg import cg
from hvpopt.solvers.stopping import ResidualNorm


@pytest.mark.parametrize("num_probes", [1, 3])
def test_the_diagonal_of_a_diagonal_matrix_is_exact(num_probes):
    d = torch.logspace(-6, 6, 11, dtype=torch.float64)
    states = states_of(Jacobi(num_probes=num_probes), point_of(torch.diag(d)))
    torch.testing.assert_close(diagonal(states), d, rtol=1e-12, atol=0)


def test_the_estimate_is_the_mean_over_probes_and_its_standard_error():
    matrix, num_probes = symmetric(), 7
    states = states_of(Jacobi(num_probes=num_probes), point_of(matrix, seed=5))
    generator = torch.Generator().manual_seed(5)
    zs = [flat(trees.rademacher_like(random_vector(0), generator)) for _ in range(num_probes)]
    samples = torch.stack([z * (matrix @ z) for z in zs])
    error = samples.std(0) / num_probes**0.5
    torch.testing.assert_close(diagonal(states), (samples.mean(0) ** 2 + error**2).sqrt())


def test_many_probes_find_the_diagonal_of_a_dense_matrix():
    matrix = symmetric()
    found = diagonal(states_of(Jacobi(num_probes=2000), point_of(matrix)))
    error = ((2 * (matrix**2).sum(0)) / 2000).sqrt()
    assert bool(((found - matrix.diagonal()).abs() < 4 * error).all())


def test_one_probe_gives_absolute_values():
    matrix = symmetric() - 2 * torch.eye(11, dtype=torch.float64)
    states = states_of(Jacobi(num_probes=1), point_of(matrix, seed=3))
    z = flat(trees.rademacher_like(random_vector(0), torch.Generator().manual_seed(3)))
    samples = z * (matrix @ z)
    assert bool((samples < 0).any())
    torch.testing.assert_close(diagonal(states), samples.abs())


def test_estimates_are_averaged_without_a_bias_towards_the_start():
    first, second, third = (torch.rand(11, dtype=torch.float64) + 1 for _ in range(3))
    points = [point_of(torch.diag(d)) for d in (first, second, third)]
    found = diagonal(states_of(Jacobi(num_probes=1, decay=0.5), *points))
    torch.testing.assert_close(found, (first + 2 * second + 4 * third) / 7)
    newest = diagonal(states_of(Jacobi(num_probes=1, decay=0.0), *points))
    assert torch.equal(newest, third)


def test_solving_divides_by_the_shifted_diagonal_to_the_exponent():
    matrix = symmetric()
    shift = [0.1, 2.0, 30.0]
    for exponent in (1.0, 0.75):
        preconditioner = Jacobi(exponent=exponent)
        states = states_of(preconditioner, point_of(matrix))
        shifts = flat([torch.full(s, x) for s, x in zip(SHAPES, shift, strict=True)])
        scales = (diagonal(states) + shifts) ** exponent
        r = random_vector(1)
        got = preconditioner.solve(r, states, shift)
        assert [x.shape for x in got] == [x.shape for x in r]
        torch.testing.assert_close(flat(got), flat(r) / scales, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sign", [1, -1, 0])
def test_solving_is_symmetric_and_positive_definite_whatever_the_curvature(sign):
    preconditioner = Jacobi(num_probes=3)
    states = states_of(preconditioner, point_of(sign * symmetric()))
    for shift in ([0.0] * 3, [1e-3, 0.0, 5.0]):
        u, v = random_vector(1), random_vector(2)
        mu, mv = (preconditioner.solve(x, states, shift) for x in (u, v))
        torch.testing.assert_close(trees.dot(u, mv), trees.dot(v, mu))
        assert trees.dot(u, mu) > 0


def test_an_entry_without_curvature_is_raised_to_rounding():
    d = torch.ones(11, dtype=torch.float64)
    d[3] = 0
    preconditioner = Jacobi(num_probes=2)
    states = states_of(preconditioner, point_of(torch.diag(d)))
    assert diagonal(states)[3] == torch.finfo(torch.float64).eps
    solved = preconditioner.solve(random_vector(1), states, [0.0] * 3)
    assert trees.all_finite(solved)


def test_it_makes_badly_scaled_systems_easy_for_conjugate_gradients():
    scale = torch.logspace(-2, 2, 11, dtype=torch.float64)
    matrix = torch.eye(11, dtype=torch.float64) + 0.3 * symmetric()
    matrix = scale[:, None] * matrix * scale
    preconditioner = Jacobi(num_probes=30, exponent=1.0)
    states = states_of(preconditioner, point_of(matrix))
    b, stop = random_vector(1), ResidualNorm(rtol=1e-8)
    product = point_of(matrix).product
    plain = cg(product, b, stop=stop, max_steps=500)
    helped = cg(
        product,
        b,
        preconditioner=lambda r: preconditioner.solve(r, states, [0.0] * 3),
        stop=stop,
        max_steps=500,
    )
    assert helped.num_steps <= 11 < 2 * plain.num_steps
    assert helped.num_steps < 0.7 * plain.num_steps


def test_a_product_that_is_not_finite_changes_no_state():
    good, bad = point_of(symmetric()), point_of(symmetric() * float("nan"))
    preconditioner = Jacobi(every=1)
    states = states_of(preconditioner, bad)
    assert states == [{}, {}, {}]
    assert not preconditioner.is_ready(states)
    preconditioner.prepare(good, states, 1)
    assert preconditioner.is_ready(states)
    before = copy.deepcopy(states)
    preconditioner.prepare(bad, states, 2)
    assert torch.equal(diagonal(states), diagonal(before))
    assert states[0]["num_diagonals"] == 1


def test_a_refresh_is_due_every_so_many_steps_or_where_a_parameter_is_new():
    preconditioner = Jacobi(every=3, num_probes=1)
    states, counts = [{} for _ in SHAPES], []
    for step in range(7):
        if step == 5:
            states[1].clear()
        preconditioner.prepare(point_of(symmetric()), states, step)
        counts.append([s["num_diagonals"] for s in states])
    assert [c[0] for c in counts] == [1, 1, 1, 2, 2, 3, 4]
    assert [c[1] for c in counts] == [1, 1, 1, 2, 2, 1, 2]


def test_a_seed_fixes_the_probes_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    one, same, other = (
        diagonal(states_of(Jacobi(), point_of(symmetric(), seed=s))) for s in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_survive_a_checkpoint_of_an_optimizer(dtype):
    matrix = symmetric().to(dtype)
    params = [nn.Parameter(p) for p in point_of(matrix).params]
    optimizer = torch.optim.SGD(params, lr=0.1)
    preconditioner = Jacobi()
    for step in range(2):
        states = [optimizer.state[p] for p in params]
        preconditioner.prepare(point_of(matrix, seed=step), states, 10 * step)
    again = states_after_a_checkpoint(optimizer)
    r = [x.to(dtype) for x in random_vector(1)]
    solved = preconditioner.solve(r, states, [0.1] * 3)
    assert all(x.dtype == dtype for x in solved)
    assert all(map(torch.equal, solved, preconditioner.solve(r, again, [0.1] * 3)))
    preconditioner.prepare(point_of(matrix, seed=7), again, 20)
    assert again[0]["num_diagonals"] == 3
