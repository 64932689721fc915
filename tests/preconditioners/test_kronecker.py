"""Kronecker factors against loops over examples, dense inverses, and what CG makes of them."""

import copy
import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from problems import Problem, flat, problem
from test_ddp import in_two_processes
from torch import nn
from torch.utils.checkpoint import checkpoint

import hvpopt
from hvpopt import trees
from hvpopt.closure import ClosureOracle
from hvpopt.closure.slopes import sampled_slopes
from hvpopt.likelihoods import NoLikelihoodError
from hvpopt.preconditioners.base import CurvaturePoint
from hvpopt.preconditioners.kronecker import Kronecker
from hvpopt.solvers.cg import cg
from hvpopt.solvers.stopping import ResidualNorm


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def point_of(oracle, params, seed=0):
    traced = oracle.trace("ggn")
    return CurvaturePoint(params, traced.grad, traced.product, oracle, seed)


def refreshed(task, kronecker, *, states=None, seed=0):
    """The states after one refresh."""
    states = [{} for _ in task.params] if states is None else states
    with ClosureOracle(task.closure(), task.params) as oracle:
        kronecker.refresh(point_of(oracle, task.params, seed), states)
    return states


def factors(state):
    """R and C of a weight, from their eigenvectors."""
    known, found = state["kronecker"], []
    for side in ("rows", "columns"):
        values, vectors = known[side]["values"], known[side].get("vectors")
        dense = torch.diag_embed(values)
        found.append(dense if vectors is None else vectors @ dense @ vectors.mT)
    return found


def slopes_of(task, seed=0, num_samples=1):
    """The sampled slopes at the outputs, which a refresh with this seed uses."""
    found = []
    with ClosureOracle(task.closure(), task.params) as oracle:
        oracle.trace("ggn")
        sampled_slopes(
            oracle,
            "monte_carlo",
            seed=seed,
            then=lambda z, u: found.append(u[0]),
            num_samples=num_samples,
        )
    return found


def dense_inverse(kronecker, states, params, shift):
    """M⁻¹ as a matrix, from its products with unit vectors."""
    sizes = [p.numel() for p in params]
    columns = []
    for e in torch.eye(sum(sizes), dtype=params[0].dtype):
        parts = [x.view_as(p) for x, p in zip(e.split(sizes), params, strict=True)]
        columns.append(flat(kronecker.solve(parts, states, shift)))
    return torch.stack(columns, 1)


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


def conv_task(groups=1, bias=True):
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 2, stride=2, groups=groups, bias=bias)
    net = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).double()
    return Problem(net, randn(5, 2, 4, 4), lambda z: F.cross_entropy(z, torch.arange(5) % 3))


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
    shift = [0.1] * 4
    M = torch.linalg.inv(dense_inverse(kronecker, states, task.params, shift)) - 0.1 * torch.eye(21)
    dense = task.dense_ggn()
    for block in (slice(0, 9), slice(9, 21)):
        assert (M - dense)[block, block].norm() < 0.05 * dense[block, block].norm()
    assert M[:9, 9:].norm() < 1e-12


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
            block = torch.kron(rows[g], columns[g])
            index = []
            for row in range(g * num_rows, (g + 1) * num_rows):
                index += [starts[i] + row * width + k for k in range(width)]
                index += [starts[i + 1] + row] if has_bias else []
            at += len(index)
            inverse = torch.linalg.inv(block + 0.3 * torch.eye(len(block)))
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
        torch.testing.assert_close(states[i]["kronecker"]["diagonal"]["values"], expected)
    r = [randn(*p.shape) for p in task.params]
    found = Kronecker().solve(r, states, [0.1] * 4)
    torch.testing.assert_close(
        found[0], r[0] / (states[0]["kronecker"]["diagonal"]["values"] + 0.1)
    )


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


def test_factors_are_averaged_over_refreshes_evenly_at_first():
    task, kronecker = problem("mlp"), Kronecker(decay=0.6)
    apart = [factors(refreshed(task, kronecker, seed=s)[0])[0] for s in range(4)]
    states = [{} for _ in task.params]
    for seed in range(4):
        refreshed(task, kronecker, states=states, seed=seed)
    mean = (apart[0] + apart[1]) / 2
    expected = 0.4 * apart[3] + 0.6 * (0.4 * apart[2] + 0.6 * mean)
    torch.testing.assert_close(factors(states[0])[0], expected)


def test_a_factor_that_stays_as_it_is_keeps_its_eigenvectors():
    """The first layer's inputs are the same at each step; slopes are sampled anew."""
    task, kronecker = problem("mlp"), Kronecker()
    states = refreshed(task, kronecker)
    before = states[0]["kronecker"]
    refreshed(task, kronecker, states=states, seed=1)
    after = states[0]["kronecker"]
    assert after["columns"]["vectors"] is before["columns"]["vectors"]
    assert after["rows"]["vectors"] is not before["rows"]["vectors"]


def test_a_parameter_whose_use_changes_starts_anew():
    task = problem("mlp")
    states = refreshed(task, Kronecker())
    layer = task.net[0]
    forward = lambda x: task.net[1:](F.linear(x, layer.weight * 1.0, layer.bias))  # noqa: E731
    with ClosureOracle(run_with(task, forward), task.params) as oracle:
        Kronecker().refresh(point_of(oracle, task.params), states)
    assert [s["kronecker"]["num_refreshes"] for s in states] == [1, 1, 2, 2, 2, 2]
    assert set(states[0]["kronecker"]) == {"partner", "pair", "num_refreshes", "diagonal"}
    assert states[1]["kronecker"]["columns"]["values"].shape == (1, 1)
    assert Kronecker().is_ready(states)


def test_a_decay_of_zero_keeps_the_last_factors_only():
    task = problem("mlp")
    states = refreshed(task, Kronecker(), seed=1)
    refreshed(task, Kronecker(decay=0.0), states=states, seed=2)
    torch.testing.assert_close(
        factors(states[0])[0], factors(refreshed(task, Kronecker(), seed=2)[0])[0]
    )


def test_it_is_refreshed_every_so_many_steps_and_where_nothing_is_known(monkeypatch):
    task, kronecker = problem("mlp"), Kronecker(every=3)
    refreshes, known = [], refreshed(task, Kronecker())
    monkeypatch.setattr(Kronecker, "refresh", lambda self, point, states: refreshes.append(1))
    for step in range(7):
        kronecker.prepare(None, known, step)
    assert len(refreshes) == 3
    kronecker.prepare(None, [{} for _ in known], 1)
    kronecker.prepare(None, known[1:], 1)  # a bias without its weight
    kronecker.prepare(None, known[:-1], 1)
    assert len(refreshes) == 6
    assert kronecker.is_ready(known[2:])


def test_a_large_factor_is_replaced_by_its_diagonal():
    task = problem("mlp")
    whole = factors(refreshed(task, Kronecker())[0])
    states = refreshed(task, Kronecker(max_size=4))
    assert "vectors" not in states[0]["kronecker"]["rows"]
    for found, dense in zip(factors(states[0]), whole, strict=True):
        torch.testing.assert_close(found, dense * torch.eye(5))


def test_the_states_survive_a_checkpoint():
    task, kronecker = problem("transformer"), Kronecker()
    states = refreshed(task, kronecker)
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert kronecker.is_ready(loaded)
    r, shift = task.tangent(), [0.1] * len(task.params)
    torch.testing.assert_close(
        kronecker.solve(r, loaded, shift), kronecker.solve(r, states, shift), rtol=0, atol=0
    )
    again = [refreshed(task, kronecker, states=s, seed=1) for s in (loaded, states)]
    torch.testing.assert_close(
        kronecker.solve(r, again[0], shift), kronecker.solve(r, again[1], shift), rtol=0, atol=0
    )


@pytest.mark.parametrize("name", ["batchnorm", "dropout"])
def test_a_refresh_leaves_no_trace(name):
    task, kronecker = problem(name), Kronecker()
    with ClosureOracle(task.closure(), task.params) as oracle:
        point = point_of(oracle, task.params)
        before = copy.deepcopy(task.net.state_dict())
        grads = [p.grad.clone() for p in task.params]
        random = torch.get_rng_state()
        kronecker.refresh(point, [{} for _ in task.params])
    torch.testing.assert_close(dict(task.net.state_dict()), dict(before), rtol=0, atol=0)
    torch.testing.assert_close([p.grad for p in task.params], grads, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)


def test_the_same_seed_gives_the_same_factors():
    task = problem("mlp")
    one, two = (refreshed(task, Kronecker(), seed=3) for _ in range(2))
    torch.testing.assert_close(one[0]["kronecker"], two[0]["kronecker"], rtol=0, atol=0)


def test_factors_that_are_not_finite_leave_those_known_so_far():
    task, kronecker = problem("mlp"), Kronecker()
    states = refreshed(task, kronecker)
    before = copy.deepcopy(states)
    task.x = task.x * torch.nan
    refreshed(task, kronecker, states=states)
    for state, was in zip(states, before, strict=True):
        torch.testing.assert_close(state, was, rtol=0, atol=0)
    assert not kronecker.is_ready(refreshed(task, kronecker))


def test_bfloat16_parameters_have_factors_in_float32():
    task, kronecker = problem("mlp", torch.bfloat16), Kronecker()
    states = refreshed(task, kronecker)
    assert states[0]["kronecker"]["rows"]["vectors"].dtype == torch.float32
    r = [randn(*p.shape).to(p.dtype) for p in task.params]
    found = kronecker.solve(r, states, [0.1] * len(r))
    assert all(x.dtype == torch.bfloat16 and x.isfinite().all() for x in found)


def test_losses_without_a_likelihood_are_refused():
    task = problem("mlp")
    task.loss = lambda z: F.huber_loss(z, torch.zeros_like(z))
    with pytest.raises(NoLikelihoodError, match="preconditioner"):
        refreshed(task, Kronecker())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every=0 is out of range"),
        ({"decay": 1.0}, "decay=1.0 is out of range"),
        ({"num_samples": 1.5}, "num_samples=1.5 is out of range"),
        ({"max_size": 0}, "max_size=0 is out of range"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Kronecker(**options)


def run_with(task, forward):
    """The closure of a task with another forward pass."""

    def closure():
        task.net.zero_grad()
        loss = task.loss(forward(task.x))
        loss.backward()
        return loss

    return closure


def states_of(closure, params):
    states = [{} for _ in params]
    with ClosureOracle(closure, params) as oracle:
        Kronecker().refresh(point_of(oracle, params), states)
    return states


def test_checkpointed_layers_have_the_same_factors():
    task = problem("mlp")
    plain = refreshed(task, Kronecker())
    forward = lambda x: checkpoint(task.net, x, use_reentrant=False)  # noqa: E731
    for state, expected in zip(states_of(run_with(task, forward), task.params), plain, strict=True):
        torch.testing.assert_close(state, expected)


def test_under_autocast_the_factors_are_nearly_those_of_float32():
    task = problem("mlp", torch.float32)
    plain = refreshed(task, Kronecker())

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            return task.net(x).float()

    found = states_of(run_with(task, forward), task.params)
    for i in (0, 2, 4):
        for ours, expected in zip(factors(found[i]), factors(plain[i]), strict=True):
            assert (ours - expected).norm() < 0.05 * expected.norm()


def test_two_backward_passes_add_their_curvatures():
    task = problem("mlp")
    x, y = task.x, torch.arange(6) % 3

    def closure(*slices):
        def run():
            task.net.zero_grad()
            losses = []
            for rows in slices:
                losses.append(F.cross_entropy(task.net(x[rows]), y[rows], reduction="sum"))
                losses[-1].backward()
            return sum(losses)

        return run

    head, tail = slice(0, 3), slice(3, 6)
    both = states_of(closure(head, tail), task.params)
    first = factors(states_of(closure(head), task.params)[0])
    # of the second, the same generator goes on: only its inputs are known in advance
    a = torch.cat([x, torch.ones(6, 1)], 1)
    columns = [a[rows].T @ a[rows] / 3 for rows in (head, tail)]
    torch.testing.assert_close(first[1][0], columns[0])
    rows, mixed = factors(both[0])
    share = torch.linalg.lstsq(
        torch.stack([c.reshape(-1) for c in columns], 1), mixed.reshape(-1, 1)
    ).solution
    assert float(share.sum()) == pytest.approx(1.0)
    assert float(share.min()) > 0
    torch.testing.assert_close(
        mixed[0], float(share[0]) * columns[0] + float(share[1]) * columns[1]
    )
    assert rows[0].trace() > first[0][0].trace()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loaded_optimizer_goes_on_bit_for_bit(dtype):
    def optimizer_of(task):
        return hvpopt.NewtonCG(task.params, preconditioner=Kronecker(every=2), max_cg_steps=5)

    task = problem("transformer", dtype)
    optimizer = optimizer_of(task)
    for _ in range(3):
        optimizer.step(task.closure())
    twin = copy.deepcopy(task)
    other = optimizer_of(twin)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(3):
        optimizer.step(task.closure())
        other.step(twin.closure())
    assert torch.equal(flat(task.params), flat(twin.params))


def _rank_task(rank):
    task = problem("transformer")
    task.x = torch.cat([task.x, task.x])[3 * rank : 3 * rank + 3]
    task.loss = lambda z: F.cross_entropy(z, torch.arange(3))
    task.net = nn.parallel.DistributedDataParallel(task.net)
    return task


def _gathered(value):
    both = [None, None]
    torch.distributed.all_gather_object(both, value)
    return both


def _parallel_factors(rank):
    task, results = _rank_task(rank), []
    for local in (False, True):
        states = [{} for _ in task.params]
        with ClosureOracle(task.closure(), task.params, local=local) as oracle:
            Kronecker().refresh(point_of(oracle, task.params), states)
        results.append(states)

    def forward(x):  # on one of the ranks, the head's weight is hidden
        head = task.net.module.head
        with torch.nn.utils.stateless._reparametrize_module(
            head, {"weight": head.weight * 1.0} if rank else {}
        ):
            return task.net(x)

    results.append(states_of(run_with(task, forward), task.params))
    return _gathered(results)


def test_all_ranks_hold_the_mean_of_their_factors(tmp_path):
    (first, first_own, odd), (second, second_own, even) = in_two_processes(
        _parallel_factors, tmp_path
    )
    for one, two in zip(first + odd, second + even, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    for mean, own, other in zip(first, first_own, second_own, strict=True):
        if "diagonal" in mean["kronecker"]:
            parts = [s["kronecker"]["diagonal"]["values"] for s in (mean, own, other)]
            torch.testing.assert_close(parts[0], (parts[1] + parts[2]) / 2)
        elif "rows" in mean["kronecker"]:
            for m, a, b in zip(*map(factors, (mean, own, other)), strict=True):
                torch.testing.assert_close(m, (a + b) / 2)
    assert "diagonal" in odd[-2]["kronecker"]
    assert "rows" in odd[-4]["kronecker"]
