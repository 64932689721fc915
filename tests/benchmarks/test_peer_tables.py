"""What is printed and written of the comparison with other libraries."""

import importlib.util
import json

import pytest
from hvpopt.experiments.benchmarks import jax_process, tiny
from hvpopt.experiments.benchmarks.hvp_cost import main, measure
from hvpopt.experiments.benchmarks.report import fastest, verdict
from hvpopt.experiments.benchmarks.tasks import tasks
from hvpopt.experiments.benchmarks.timing import Times
from peer_cases import BOUND, CPU, installed, report, row

# other libraries' own: torch.fx of torch.func.linearize, torch.jit
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


def test_ratios_of_several_vectors_are_those_of_each():
    found = row(count=8).timed(Times((16.0, 8.0)), Times((1.0, 1.0)))
    assert (found.time_ratio, found.time_ratio_min, found.time_ratio_max) == (1.5, 1.0, 2.0)
    assert found.rounds == 2
    assert found.milliseconds == 1500


def test_the_fastest_is_exact_and_measured():
    rows = [
        row(engine="slow", milliseconds=3.0),
        row(engine="fails", failure="because"),
        row(engine="rough", milliseconds=1.0, is_exact=False),
        row(engine="fast", milliseconds=2.0),
        row(engine="other", milliseconds=0.5, library="torch"),
    ]
    assert fastest(rows, "hvpopt").engine == "fast"
    assert fastest(rows, "torch").engine == "other"
    assert fastest(rows, "jax") is None


def test_the_verdict_divides_hvpopts_time_by_the_others():
    printed = verdict(
        [
            report(
                row(engine="ours", milliseconds=3.0),
                row(engine="theirs", library="torch", milliseconds=2.0),
                row(engine="JAX", library="jax", milliseconds=6.0),
            )
        ]
    )
    assert printed.splitlines()[-1].split() == (
        ["one-shot", "3.00", "2.00", "1.50", "6.00", "0.50", "ours", "/", "theirs"]
    )


def test_the_verdict_has_a_dash_for_what_nobody_could_compute():
    printed = verdict([report(row(failure="because"))])
    assert printed.splitlines()[-1].split() == ["one-shot", "–", "–", "–", "–", "–"]


def test_overheads_are_measured_for_products_iterations_and_steps(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    overheads = tiny.measure(CPU, quick=True)
    printed = tiny.table(overheads)
    whats = list(dict.fromkeys(o.what for o in overheads))
    assert whats[0] == "gradient"
    assert whats[-2:] == ["CG iteration", "optimizer step"]
    for o in overheads:
        assert o.what in printed
        assert o.engine in printed
        assert (o.microseconds is None) == (o.failure is not None)
        if installed(o.engine) and o.engine != "JAX":
            assert o.microseconds > 0, o
    steps = [o.engine for o in overheads if o.what == "optimizer step"]
    assert steps[0] == "SGD"
    assert [s.partition(",")[0] for s in steps] == ["SGD", "SMD", "NewtonCG"]


def test_the_command_compares_and_writes_its_comparison(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(jax_process, "measure", lambda *args, **kw: jax_process.JaxReport())
    path = tmp_path / "peers.json"
    main(["--quick", "--peers", "--repeats", "1", "--models", "mlp", "--json", str(path)])
    printed = capsys.readouterr().out
    for part in ("double backward", "8 HVPs at one point", "MLP 4-8-2", "Verdict", "error"):
        assert part in printed
    written = json.loads(path.read_text())
    assert "jax" in written["versions"]
    assert {r["library"] for r in written["models"][0]["rows"]} == {"hvpopt", "torch"}
    assert written["tiny"]


@pytest.mark.slow
def test_compiled_products_are_measured_on_request():
    found = measure("mlp", CPU, repeats=1, quick=True, compiled=True)
    compiled = [r for r in found.rows if r.engine.endswith("compiled")]
    assert len(compiled) == 2
    assert all(r.error < 1e-3 for r in compiled)
    assert len(found.rows) == 2 + len(tasks(BOUND))
