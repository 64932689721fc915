"""The Nyström preconditioner against dense matrices and its paper's formulas."""

import copy

import pytest
import torch
from checkpoints import states_after_a_checkpoint
from problems import flat
from torch import nn

from hvpopt import trees
from hvpopt.preconditioners import CurvaturePoint, Nystrom
from hvpopt.solvers.cg import cg
from hvpopt.solvers.stopping import ResidualNorm

SHAPES = [(5, 4), (), (9,)]
SIZES = [20, 1, 9]
N = 30
SHIFT = [0.3, 0.02, 1.5]


def split(vector):
    return [x.reshape(s) for x, s in zip(vector.split(SIZES), SHAPES, strict=True)]


class Point:
    """A dense matrix to look at; keeps the vectors that it is multiplied with."""

    def __init__(self, matrix, seed=0):
        self.matrix, self.directions = matrix, []
        params = split(torch.zeros(N, dtype=matrix.dtype))
        self.point = CurvaturePoint(params, trees.zeros_like(params), self.product, None, seed)

    def product(self, v):
        self.directions.append(flat(v))
        return split(self.matrix @ flat(v))


def with_spectrum(values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(N, N, generator=generator, dtype=torch.float64)
    q = torch.linalg.qr(root).Q
    return q @ torch.diag(values) @ q.T


def decaying():
    return with_spectrum(torch.logspace(3, -6, N, dtype=torch.float64))


def fitted(preconditioner, matrix, seed=0):
    states = [{} for _ in SHAPES]
    preconditioner.prepare(Point(matrix, seed).point, states, 0)
    return states


def basis(states):
    """U, dense."""
    pairs = zip(states, SIZES, strict=True)
    return torch.cat([s["nystrom_basis"].reshape(-1, n) for s, n in pairs], 1).T


def shifts(shift=SHIFT):
    pairs = zip(SIZES, shift, strict=True)
    return torch.cat([torch.full((n,), x, dtype=torch.float64) for n, x in pairs])


def inverse(preconditioner, states, shift):
    """M⁻¹, dense."""
    eye = torch.eye(N, dtype=states[0]["nystrom_basis"].dtype)
    return torch.stack([flat(preconditioner.solve(split(e), states, shift)) for e in eye], 1)


def random_vector(seed):
    generator = torch.Generator().manual_seed(seed)
    return split(torch.randn(N, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("rank", [N, 2 * N])
def test_at_full_rank_solving_inverts_the_matrix_with_any_shifts(rank):
    matrix = with_spectrum(torch.logspace(2, -2, N, dtype=torch.float64))
    preconditioner = Nystrom(rank=rank)
    states = fitted(preconditioner, matrix)
    assert states[0]["nystrom_basis"].shape == (N, 5, 4)
    expected = torch.linalg.inv(matrix + torch.diag(shifts()))
    got = inverse(preconditioner, states, SHIFT)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


def test_a_matrix_of_lower_rank_is_found_exactly():
    values = torch.zeros(N, dtype=torch.float64)
    values[:5] = torch.tensor([100.0, 30.0, 10.0, 3.0, 1.0])
    matrix = with_spectrum(values)
    preconditioner = Nystrom(rank=8)
    states = fitted(preconditioner, matrix)
    expected = torch.linalg.inv(matrix + torch.diag(shifts()))
    got = inverse(preconditioner, states, SHIFT)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


def test_the_approximation_is_nystroms_of_the_sketch():
    matrix, states = decaying(), [{} for _ in SHAPES]
    look = Point(matrix)
    Nystrom(rank=10).prepare(look.point, states, 0)
    assert len(look.directions) == 10
    omega = torch.stack(look.directions, 1)
    torch.testing.assert_close(omega.T @ omega, torch.eye(10, dtype=torch.float64))
    sketch = matrix @ omega
    expected = sketch @ torch.linalg.pinv(omega.T @ sketch) @ sketch.T
    u, values = basis(states), states[0]["nystrom_eigenvalues"]
    torch.testing.assert_close(u @ torch.diag(values) @ u.T, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(u.T @ u, torch.eye(10, dtype=torch.float64))
    assert bool((values[:-1] >= values[1:]).all())


def test_with_equal_shifts_it_is_the_papers_preconditioner_but_for_its_scale():
    preconditioner, mu = Nystrom(rank=10), 0.7
    states = fitted(preconditioner, decaying())
    u, values = basis(states), states[0]["nystrom_eigenvalues"]
    eye = torch.eye(N, dtype=torch.float64)
    last = values[-1] + mu
    paper = last * u @ torch.diag(1 / (values + mu)) @ u.T + eye - u @ u.T
    torch.testing.assert_close(last * inverse(preconditioner, states, [mu] * 3), paper)


def test_with_different_shifts_solving_inverts_the_sum():
    preconditioner = Nystrom(rank=10)
    states = fitted(preconditioner, decaying())
    u, values = basis(states), states[0]["nystrom_eigenvalues"]
    matrix = u @ torch.diag(values - values[-1]) @ u.T + torch.diag(values[-1] + shifts())
    torch.testing.assert_close(inverse(preconditioner, states, SHIFT), torch.linalg.inv(matrix))


def test_conjugate_gradients_need_few_steps_where_the_spectrum_decays():
    matrix, damping = decaying(), 1e-4
    preconditioner = Nystrom(rank=20)
    states = fitted(preconditioner, matrix)

    def damped(v):
        return trees.add(split(matrix @ flat(v)), v, damping)

    b, stop = random_vector(1), ResidualNorm(rtol=1e-8)
    plain = cg(damped, b, stop=stop, max_steps=2000)
    helped = cg(
        damped,
        b,
        preconditioner=lambda r: preconditioner.solve(r, states, [damping] * 3),
        stop=stop,
        max_steps=2000,
    )
    assert helped.status.converged
    assert helped.num_steps < 0.3 * plain.num_steps


INDEFINITE = torch.cat(
    [torch.logspace(2, -2, 20, dtype=torch.float64), -torch.logspace(1, -1, 10).double()]
)


def test_the_absolute_values_of_an_indefinite_matrix_stand_in_at_full_rank():
    matrix = with_spectrum(INDEFINITE)
    preconditioner = Nystrom(rank=N)
    states = fitted(preconditioner, matrix)
    expected = torch.linalg.inv(with_spectrum(INDEFINITE.abs()) + torch.diag(shifts()))
    got = inverse(preconditioner, states, SHIFT)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "values",
    [
        torch.logspace(3, -6, N, dtype=torch.float64),
        INDEFINITE,
        -torch.ones(N, dtype=torch.float64),
        torch.zeros(N, dtype=torch.float64),
        torch.cat([torch.ones(2), torch.zeros(N - 2)]).double(),
    ],
    ids=["definite", "indefinite", "negative", "zero", "rank 2"],
)
@pytest.mark.parametrize("shift", [[0.0] * 3, SHIFT], ids=["no shift", "shift"])
def test_solving_is_symmetric_and_positive_definite_whatever_the_curvature(values, shift):
    preconditioner = Nystrom(rank=8)
    got = inverse(preconditioner, fitted(preconditioner, with_spectrum(values)), shift)
    torch.testing.assert_close(got, got.T, rtol=1e-6, atol=1e-8 * float(got.abs().max()))
    assert float(torch.linalg.eigvalsh((got + got.T) / 2)[0]) > 0


def test_an_indefinite_matrix_costs_a_second_sketch():
    look = Point(-with_spectrum(torch.ones(N, dtype=torch.float64)))
    Nystrom(rank=8).prepare(look.point, [{} for _ in SHAPES], 0)
    assert len(look.directions) == 16


def test_single_precision_keeps_solving_positive_definite():
    values = torch.logspace(4, -8, N, dtype=torch.float64)
    matrix = with_spectrum(values)
    preconditioner = Nystrom(rank=25)
    states = fitted(preconditioner, matrix.float())
    top = torch.linalg.eigh(matrix).eigenvectors.float()
    for v in (*top.T, *(flat(random_vector(i)).float() for i in range(20))):
        solved = preconditioner.solve(split(v), states, [0.0] * 3)
        assert all(x.dtype == torch.float32 for x in solved)
        assert trees.dot(split(v), solved) > 0


def test_half_precision_is_solved_as_it_is_stored():
    preconditioner = Nystrom(rank=10)
    states = fitted(preconditioner, decaying().bfloat16())
    assert states[0]["nystrom_basis"].dtype == torch.bfloat16
    u = basis(states).double()
    values, tail = states[0]["nystrom_eigenvalues"].double(), states[0]["nystrom_tail"]
    spread = (values - tail).clamp(min=0)
    matrix = u @ torch.diag(spread) @ u.T + torch.diag(tail + shifts())
    expected = torch.linalg.inv(matrix)
    got = inverse(preconditioner, states, SHIFT).double()
    assert (got - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_product_that_is_not_finite_changes_no_state(bad):
    preconditioner = Nystrom(rank=5, every=1)
    states = fitted(preconditioner, decaying() * bad)
    assert states == [{}, {}, {}]
    assert not preconditioner.is_ready(states)
    preconditioner.prepare(Point(decaying()).point, states, 1)
    before = copy.deepcopy(states)
    preconditioner.prepare(Point(decaying() * bad).point, states, 2)
    assert preconditioner.is_ready(states)
    assert torch.equal(basis(states), basis(before))


def test_a_second_sketch_that_is_not_finite_changes_no_state():
    look, states = Point(-decaying()), [{} for _ in SHAPES]

    def product(v):
        if len(look.directions) == 5:
            look.matrix = look.matrix * float("nan")
        return Point.product(look, v)

    point = CurvaturePoint(look.point.params, look.point.grad, product, None, 0)
    Nystrom(rank=5).prepare(point, states, 0)
    assert len(look.directions) == 10
    assert states == [{}, {}, {}]


def test_parts_of_different_bases_are_not_ready():
    preconditioner = Nystrom(rank=5)
    states, others = fitted(preconditioner, decaying()), fitted(Nystrom(rank=6), decaying())
    assert preconditioner.is_ready(states)
    assert not preconditioner.is_ready([*states[:2], {}])
    assert not preconditioner.is_ready([*states[:2], others[2]])


def test_a_seed_fixes_the_sketch_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    one, same, other = (basis(fitted(Nystrom(rank=5), decaying(), s)) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_states_survive_a_checkpoint_of_an_optimizer(dtype):
    point = Point(decaying().to(dtype)).point
    params = [nn.Parameter(p) for p in point.params]
    optimizer, preconditioner = torch.optim.SGD(params, lr=0.1), Nystrom(rank=10)
    states = [optimizer.state[p] for p in params]
    preconditioner.prepare(point, states, 0)
    again = states_after_a_checkpoint(optimizer)
    r = [x.to(dtype) for x in random_vector(1)]
    solved = preconditioner.solve(r, states, SHIFT)
    assert all(map(torch.equal, solved, preconditioner.solve(r, again, SHIFT)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0 is out of range: expected a whole number at least 1"),
        ({"rank": True}, "rank=True is out of range"),
        ({"every": 0}, "every=0 is out of range: expected a whole number at least 1"),
    ],
)
def test_an_option_out_of_range_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        Nystrom(**options)
