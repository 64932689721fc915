"""JAX's products, in a process of their own."""

import importlib.util
import os
from contextlib import nullcontext

import pytest
import torch
from hvpopt.experiments.benchmarks import jax_process, models
from hvpopt.experiments.benchmarks.bounds import flop_bound
from hvpopt.experiments.benchmarks.hvp_cost import measure
from hvpopt.experiments.benchmarks.measure import references
from hvpopt.experiments.benchmarks.models import QUICK
from hvpopt.experiments.benchmarks.report import table
from hvpopt.experiments.benchmarks.tasks import GGNS, HVPS, ONE_SHOT_HVP
from peer_cases import BOUND, CPU, report, row

# other libraries' own: torch.fx of torch.func.linearize, torch.jit
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture
def problem():
    return models.tiny(CPU)


def test_jax_is_asked_for_by_name_where_it_is_missing(problem, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = jax_process.measure("tiny", problem, BOUND, {}, CPU, counts=(), repeats=1, seconds=1.0)
    assert found.failure == "not installed: pip install 'hvpopt[bench]'"
    assert found.rows == []
    assert "JAX: not installed" in table(jax_process.joined(report(row()), found), peers=True)


def test_jax_runs_on_as_many_cpus_as_torch_has_threads():
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system binds no processes to CPUs")
    before = os.sched_getaffinity(0)
    with jax_process.cpus_as_threads(CPU):
        assert len(os.sched_getaffinity(0)) == min(torch.get_num_threads(), len(before))
    assert os.sched_getaffinity(0) == before


def test_jaxs_rows_follow_those_of_the_same_product():
    a, b = row(what="a"), row(what="b")
    jax = jax_process.JaxReport(0.5, [row(what="b", library="jax"), row(what="a", library="jax")])
    joined = jax_process.joined(report(a, b), jax)
    assert [(r.what, r.library) for r in joined.rows] == [
        ("a", "hvpopt"),
        ("a", "jax"),
        ("b", "hvpopt"),
        ("b", "jax"),
    ]
    assert joined.jax_gradient_seconds == 0.5


@pytest.mark.parametrize("name", QUICK)
def test_the_networks_are_the_same_functions_in_jax(name):
    jax = pytest.importorskip("jax")
    from hvpopt.experiments.benchmarks.jax_models import MODELS, cross_entropy
    from hvpopt.experiments.benchmarks.jax_worker import to_jax

    problem = QUICK[name](CPU)
    params = {k: to_jax(x.numpy()) for k, x in problem.params().items()}
    inputs = problem.inputs.numpy()
    inputs = inputs.transpose(0, 2, 3, 1) if inputs.ndim == 4 else inputs
    with jax.disable_jit() if name == "mlp" else nullcontext():
        output = MODELS[name](params, inputs)
    expected = problem.output(problem.params()).detach()
    torch.testing.assert_close(torch.tensor(output.tolist()), expected, rtol=1e-3, atol=1e-4)
    loss = cross_entropy(output, problem.targets.numpy())
    assert float(loss) == pytest.approx(float(problem.loss(expected)), rel=1e-5)


def test_kernels_come_back_from_jax():
    numpy = pytest.importorskip("numpy")
    pytest.importorskip("jax")
    from hvpopt.experiments.benchmarks.jax_worker import from_jax, to_jax

    kernel = numpy.random.default_rng(0).normal(size=(2, 3, 5, 7))
    assert to_jax(kernel).shape == (5, 7, 3, 2)
    assert (from_jax(to_jax(kernel)) == kernel).all()
    assert to_jax(kernel[None], leading=1).shape == (1, 5, 7, 3, 2)
    assert to_jax(kernel[0]) is not None
    assert from_jax(kernel[0]).shape == (3, 5, 7)


def test_jaxs_products_are_checked_and_timed(problem):
    pytest.importorskip("jax")
    bound = flop_bound(problem)
    expected = {c: references(problem, c, {1, 8, 32}) for c in ("hessian", "ggn")}
    found = jax_process.measure(
        "tiny", problem, bound, expected, CPU, counts=(8, 32), repeats=2, seconds=1.0
    )
    assert found.failure is None
    assert found.gradient_seconds > 0
    assert {r.what for r in found.rows} >= {HVPS[8].what, GGNS[32].what, ONE_SHOT_HVP.what}
    for r in found.rows:
        assert r.failure is None, r
        assert r.error < 1e-5
        assert r.rounds >= 1
        assert r.milliseconds > 0
        assert r.memory_ratio > 0
        assert r.build_ratio > 0


def test_jaxs_wrong_products_are_refused(problem):
    pytest.importorskip("jax")
    wrong = {"hessian": {0: torch.ones(58)}, "ggn": {0: torch.ones(58)}}
    found = jax_process.measure(
        "tiny", problem, BOUND, wrong, CPU, counts=(), repeats=1, seconds=1.0
    )
    assert len(found.rows) == 4
    assert all(r.failure.startswith("wrong by") for r in found.rows)
    assert all(r.milliseconds is None for r in found.rows)


def test_jaxs_failure_is_one_line(problem):
    pytest.importorskip("jax")
    found = jax_process.measure("none", problem, BOUND, {}, CPU, counts=(), repeats=1, seconds=1.0)
    assert found.failure == "fails: KeyError: 'none'"


@pytest.mark.slow
def test_the_comparison_contains_jax():
    pytest.importorskip("jax")
    found = measure("mlp", CPU, repeats=1, quick=True, peers=True)
    assert {r.library for r in found.rows} == {"hvpopt", "torch", "jax"}
