"""Kronecker factors over several refreshes: averages, states, randomness, refusals."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from kronecker_cases import (
    factors,
    point_of,
    randn,
    refreshed,
    run_with,
)
from problems import problem

from hvpopt.closure import ClosureOracle
from hvpopt.likelihoods import NoLikelihoodError
from hvpopt.preconditioners.kronecker import Kronecker


def test_factors_are_averaged_over_refreshes_evenly_at_first():
    task, kronecker = problem("mlp"), Kronecker(decay=0.6)
    apart = [factors(refreshed(task, kronecker, seed=s)[0])[0] for s in range(4)]
    states = [{} for _ in task.params]
    for seed in range(4):
        refreshed(task, kronecker, states=states, seed=seed)
    mean = (apart[0] + apart[1]) / 2
    expected = 0.4 * apart[3] + 0.6 * (0.4 * apart[2] + 0.6 * mean)
    torch.testing.assert_close(factors(states[0])[0], expected)


def test_a_parameter_whose_use_changes_starts_anew():
    task = problem("mlp")
    states = refreshed(task, Kronecker())
    layer = task.net[0]
    forward = lambda x: task.net[1:](F.linear(x, layer.weight * 1.0, layer.bias))  # noqa: E731
    with ClosureOracle(run_with(task, forward), task.params) as oracle:
        Kronecker().refresh(point_of(oracle, task.params), states)
    assert [s["kronecker"]["num_refreshes"] for s in states] == [1, 1, 2, 2, 2, 2]
    assert set(states[0]["kronecker"]) == {"partner", "pair", "num_refreshes", "diagonal"}
    assert states[1]["kronecker"]["columns"].shape == (1, 1, 1)
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
    assert states[0]["kronecker"]["rows"].shape == (1, 5)
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
    assert states[0]["kronecker"]["rows"].dtype == torch.float32
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
