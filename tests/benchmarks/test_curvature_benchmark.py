"""The benchmark of curvature's figures: choices, errors, output, and that contestants agree."""

import json
import time

import numpy as np
import pytest
import scipy.stats
import torch
from hvpopt.experiments.benchmarks import curvature
from hvpopt.experiments.benchmarks.curvature import Entry, Truth, measure, table, truth, verdict
from hvpopt.experiments.benchmarks.curvature_contestants import Contestant, ladders
from hvpopt.experiments.benchmarks.models import Problem, tiny

from hvpopt.curvature import TraceEstimate

CPU = torch.device("cpu")


@pytest.fixture
def problem() -> Problem:
    return tiny(CPU)


def dense(problem: Problem) -> torch.Tensor:
    params = problem.params()
    flat = torch.cat([p.reshape(-1) for p in params.values()])
    sizes = [p.numel() for p in params.values()]

    def value(x: torch.Tensor) -> torch.Tensor:
        parts = x.split(sizes)
        return problem.value(
            {n: q.view_as(p) for (n, p), q in zip(params.items(), parts, strict=True)}
        )

    return torch.autograd.functional.hessian(value, flat)


def known(**changes) -> Truth:
    values = {
        "eigenvalues": np.array([4.0, 3.0, 2.0, 1.5, 1.0]),
        "trace": TraceEstimate(10.0, 0.1, 8, 7),
        "density": (np.array([0.0, 1.0, 4.0]), np.array([0.5, 0.25, 0.25])),
    }
    return Truth(**{**values, **changes})


def test_the_truth_is_that_of_the_dense_hessian(problem):
    values = np.linalg.eigvalsh(dense(problem).double().numpy())
    true = truth(problem, curvature.FIGURES, quick=True)
    np.testing.assert_allclose(true.eigenvalues, values[::-1][:5], rtol=1e-3)
    assert abs(true.trace.value - values.sum()) < 4 * true.trace.standard_error
    assert true.error("largest eigenvalue", values[-1:]) < 1e-3
    exact = (values, np.full(len(values), 1 / len(values)))
    assert true.error("spectral density", exact) < 0.1


def test_hvpopts_contestants_find_the_dense_hessians_figures(problem):
    values = np.linalg.eigvalsh(dense(problem).double().numpy())
    for figure, k in (("largest eigenvalue", 1), ("five largest eigenvalues", 5)):
        for ladder in ladders(figure, 8)[:2]:
            found = ladder[-1].run(problem, 0)
            np.testing.assert_allclose(found, values[::-1][:k], rtol=1e-2)
    estimates = [ladder[0].run(problem, 0) for ladder in ladders("trace", 40)[:3]]
    np.testing.assert_allclose(estimates, values.sum(), rtol=0.3)
    nodes, weights = ladders("spectral density", 8)[0][0].run(problem, 0)
    assert weights.sum() == pytest.approx(1.0, abs=1e-4)
    assert nodes.max() == pytest.approx(values[-1], rel=1e-3)


def test_errors_are_relative_and_those_of_densities_a_distance():
    true = known()
    assert true.error("trace", 9.0) == pytest.approx(0.1)
    assert true.error("largest eigenvalue", np.array([4.2])) == pytest.approx(0.05)
    # the fifth is what all are relative to
    assert true.error("five largest eigenvalues", true.eigenvalues + 0.01) == pytest.approx(0.01)
    nodes, weights = np.array([0.5, 3.0]), np.array([0.4, 0.6])
    expected = scipy.stats.wasserstein_distance(true.density[0], nodes, true.density[1], weights)
    expected /= 4  # the true range
    assert true.error("spectral density", (nodes, weights)) == pytest.approx(expected)
    assert true.error("spectral density", true.density) == 0.0


def test_the_first_setting_within_tolerance_is_timed_and_failures_are_named(problem, monkeypatch):
    runs = []

    def contestant(name: str, setting: str, answer: float, seconds: float = 0.0) -> Contestant:
        def run(problem: Problem, seed: int) -> np.ndarray:
            runs.append(setting)
            time.sleep(seconds)
            if name == "broken":
                raise RuntimeError("no such kernel")
            return np.array([answer])

        return Contestant(name, "power", setting, run)

    table_of = [
        [contestant("hvpopt", "coarse", 3.0), contestant("hvpopt", "fine", 4.01, 0.01)],
        [contestant("slow", "only", 4.0, 0.05), contestant("slow", "finer", 4.0)],
        [contestant("wrong", "bad", 1.0), contestant("wrong", "worse", 0.0)],
        [contestant("broken", "any", 4.0)],
    ]
    monkeypatch.setattr(curvature, "ladders", lambda figure, probes: table_of)
    entries = measure("largest eigenvalue", problem, known(), repeats=3, seconds=9.0)
    ours, slow, wrong, broken = entries
    assert (ours.setting, slow.setting, wrong.setting) == ("fine", "only", None)
    assert "finer" not in runs
    assert (ours.ratio, ours.rounds) == (1.0, 3)
    assert ours.error == pytest.approx(0.0025)
    assert slow.ratio > 2
    assert slow.milliseconds > 50
    assert wrong.failure == "no setting tried is within 0.01"
    assert broken.failure == "RuntimeError: no such kernel"
    printed = table(problem, known(), entries)
    assert "hvpopt, power, fine" in printed
    assert "broken, power, any: RuntimeError: no such kernel" in printed


def test_the_verdict_compares_the_fastest():
    entries = [
        Entry("trace", "hvpopt", "a", milliseconds=20.0),
        Entry("trace", "hvpopt", "b", milliseconds=10.0),
        Entry("trace", "other", "c", milliseconds=40.0),
        Entry("trace", "another", "d", failure="fails"),
    ]
    assert "net, trace: 0.25 (b / other, c)" in verdict({"net": entries})
    assert "net, trace: –" in verdict({"net": entries[:2]})


def test_only_the_figures_that_are_chosen_are_measured(capsys, tmp_path):
    path = tmp_path / "trace.json"
    arguments = ["--quick", "--repeats", "1", "--device", "cpu", "--figures", "trace"]
    curvature.main([*arguments, "--json", str(path)])
    (entries,) = json.loads(path.read_text())["devices"]["cpu"].values()
    assert {entry["figure"] for entry in entries} == {"trace"}
    assert "eigenvalue" not in capsys.readouterr().out


@pytest.mark.slow
def test_quick_prints_and_writes_all_figures(capsys, tmp_path):
    path = tmp_path / "curvature.json"
    arguments = ["--quick", "--repeats", "1", "--device", "cpu", "--json", str(path)]
    curvature.main(arguments)
    printed, written = capsys.readouterr().out, json.loads(path.read_text())
    entries = written["devices"]["cpu"]["mlp"]
    assert {entry["figure"] for entry in entries} == set(curvature.FIGURES)
    for entry in entries:
        assert (entry["milliseconds"] is None) == (entry["failure"] is not None)
        assert entry["figure"] in printed
        if entry["library"] == "hvpopt" and entry["milliseconds"] is not None:
            assert entry["error"] >= 0
    assert set(written["peers"]) == set(curvature.PEERS)
