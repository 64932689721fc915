"""The benchmark of adjoints: its ways agree where they must, its figures, its output."""

import json

import pytest
import torch
from hvpopt.experiments.benchmarks import adjoint_ways, adjoints
from hvpopt.experiments.benchmarks.adjoint_ways import BACK, BACK_8, EXACT, PLAIN, Problem
from hvpopt.experiments.benchmarks.adjoints import Row, main, measure, table, verdict
from hvpopt.experiments.benchmarks.command import parse
from hvpopt.experiments.benchmarks.timing import Times

from hvpopt.nested import BackOptimization, Implicit

CPU = torch.device("cpu")


def tiny():
    return Problem.drawn(6, CPU, batch=3, labels=5)


def test_quick_prints_and_writes_every_way(capsys, tmp_path):
    path = tmp_path / "adjoints.json"
    main(["--quick", "--device", "cpu", "--json", str(path)])
    written, printed = json.loads(path.read_text()), capsys.readouterr().out
    names = [PLAIN, *adjoint_ways.ADJOINTS]
    assert [r["way"] for r in written["rows"]] == names * 2  # T = 2 and T = 4
    assert {r["num_steps"] for r in written["rows"]} == {2, 4}
    for row in written["rows"]:
        assert row["failure"] is None
        assert row["milliseconds"] > 0
        assert row["peak_mib"] > 0
        assert row["error"] < (1e-5 if row["way"] in EXACT else 10)
    assert all(name in printed for name in names)
    assert "hvpopt BackOptimization / hvpopt Unrolled, time:" in printed
    assert written["inference"]["cpu"]["rows"] == 20
    assert written["inference"]["cpu"]["seconds"] > 0


def test_the_plain_unroll_is_the_gradient_of_the_composed_steps():
    """By torch.func on the whole path as one function."""
    problem = tiny()
    names = [name for name, _ in problem.energy.named_parameters()]

    def loss(*theta):
        weights = dict(zip(names, theta, strict=True))
        y = problem.start
        for _ in range(3):
            y = y - adjoint_ways.STEP_SIZE * torch.func.grad(
                lambda y: torch.func.functional_call(problem.energy, weights, (problem.x, y)).sum()
            )(y)
        return problem.loss(y)

    theta = tuple(p.detach() for p in problem.energy.parameters())
    expected = torch.func.grad(loss, argnums=tuple(range(len(theta))))(*theta)
    found = adjoint_ways.plain(problem, 3)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_the_implicit_way_reaches_the_plain_one_after_many_steps():
    problem = tiny()
    expected = adjoint_ways.plain(problem, 400)
    found = adjoint_ways.ours(problem, 400, Implicit())
    assert adjoints._relative(found, expected) < 1e-3


def test_forward_mode_is_by_the_scales_and_leaves_the_others_as_they_were():
    problem = tiny()
    found = adjoint_ways.ours(problem, 4, adjoint_ways.ADJOINTS[adjoint_ways.FORWARD])
    assert [g.shape for g in found] == [(2,)]
    torch.testing.assert_close(found[0], adjoint_ways.plain(problem, 4)[0])
    assert all(p.requires_grad for p in problem.energy.parameters())


def test_a_way_that_should_be_exact_and_is_not_stops_the_benchmark(monkeypatch):
    def wrong(problem, num_steps):
        return [torch.ones_like(p) for p in problem.energy.parameters()]

    monkeypatch.setattr(adjoints, "ways", lambda *a, **k: {BACK: lambda: wrong(tiny(), 1)})
    options = parse("adjoints", "", ["--quick", "--device", "cpu"])
    with pytest.raises(RuntimeError, match=r"hvpopt BackOptimization, 3 steps, is off by"):
        measure(tiny(), 3, options, peers=False)


def test_a_peer_that_fails_is_reported_and_does_not_stop_the_others(monkeypatch):
    def broken(problem, num_steps):
        raise ValueError("no such function\nmore")

    monkeypatch.setattr(adjoint_ways, "PEERS", {"torchopt unroll": broken})
    monkeypatch.setattr(adjoint_ways, "ADJOINTS", {BACK: BackOptimization()})
    options = parse("adjoints", "", ["--quick", "--device", "cpu"])
    rows = measure(tiny(), 2, options, peers=True)
    assert [r.way for r in rows] == [PLAIN, BACK, "torchopt unroll"]
    assert rows[-1].failure == "no such function"
    assert table(rows, "time / plain unroll").splitlines()[-1].endswith("fails")


def test_forward_mode_is_left_out_of_long_inferences(monkeypatch):
    forward = adjoint_ways.FORWARD
    monkeypatch.setattr(adjoint_ways, "ADJOINTS", {forward: adjoint_ways.ADJOINTS[forward]})
    options = parse("adjoints", "", ["--quick", "--device", "cpu"])
    rows = measure(tiny(), 51, options, peers=False)
    assert rows[-1].failure == "not run beyond 50 steps: slow"
    assert table(rows, "time / plain unroll").splitlines()[-1].endswith("–")


def row(way, num_steps, ratio, peak):
    return Row("cpu", 8, num_steps, way, unrolled_ratio=ratio, peak_mib=peak)


def test_the_verdict_names_times_and_takes_the_slope_of_memory():
    rows = [row(PLAIN, 5, None, 1.0), row(BACK, 5, 1.25, 0.5), row(BACK_8, 5, 1.3, 0.4)]
    rows += [row(PLAIN, 15, 0.9, 3.0), row(BACK, 15, 1.2, 0.6), row(BACK_8, 15, None, None)]
    lines = verdict(rows).splitlines()
    assert [line.split("time: ")[1] for line in lines[:2]] == ["1.25, 1.20", "1.30, –"]
    assert lines[2].endswith("204.8 KiB of memory a step, at the last two T")  # 2 MiB in ten steps
    assert lines[3].endswith("10.2 KiB of memory a step, at the last two T")
    assert len(lines) == 4


def test_ratios_are_medians_over_rounds():
    ours, other = Times((2.0, 3.0, 9.0)), Times((2.0, 2.0, 3.0))
    found = Row("cpu", 8, 5, BACK).timed(ours, Times((1.0, 1.0, 1.0)), other)
    assert (found.milliseconds, found.time_ratio, found.unrolled_ratio) == (3000.0, 3.0, 1.5)
    assert Row("cpu", 8, 5, BACK).timed(ours, ours, None).unrolled_ratio is None


def test_torchopts_ways_are_those_of_the_plain_unroll_where_it_is_installed():
    pytest.importorskip("torchopt")
    problem = tiny()
    expected = adjoint_ways.plain(problem, 400)
    for name, peer in adjoint_ways.PEERS.items():
        assert adjoints._relative(peer(problem, 400), expected) < 1e-3, name


def test_bad_options_are_one_clear_sentence(capsys):
    with pytest.raises(SystemExit):
        main(["--quick", "--json", "/no/such/folder/x.json"])
    assert "there is no folder /no/such/folder" in capsys.readouterr().err
