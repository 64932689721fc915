"""The comparison with other libraries: its checks, its rules, its tables, and JAX's process."""

import importlib.util
import json
import os
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hvpopt.experiments.benchmarks import jax_process, models, tiny
from hvpopt.experiments.benchmarks.bounds import FlopBound, flop_bound
from hvpopt.experiments.benchmarks.hvp_cost import main, measure
from hvpopt.experiments.benchmarks.measure import KERNELS, Measurement, references
from hvpopt.experiments.benchmarks.models import QUICK
from hvpopt.experiments.benchmarks.peers import many_vector_peer_tasks, peer_tasks
from hvpopt.experiments.benchmarks.report import Report, Row, fastest, table, verdict
from hvpopt.experiments.benchmarks.tasks import (
    GGNS,
    HVPS,
    ONE_SHOT_HVP,
    REPEATED_HVP,
    Task,
    tasks,
)
from hvpopt.experiments.benchmarks.timing import Times

CPU = torch.device("cpu")
BOUND = FlopBound(10, 20)
OPERATORS = {"curvlinops": "curvlinops", "hessian-eigenthings": "hessian_eigenthings"}

# other libraries' own: torch.fx of torch.func.linearize, torch.jit
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


def installed(engine):
    return all(
        importlib.util.find_spec(module) for name, module in OPERATORS.items() if name in engine
    )


@pytest.fixture
def problem():
    return models.tiny(CPU)


def report_of(problem, *entries, **options):
    options = {"repeats": 1, **options}
    return Measurement(problem, entries, BOUND, CPU, **options).report()


def plain(product=ONE_SHOT_HVP):
    """Double backward on the module, from the peers."""
    return next(t for t in peer_tasks(BOUND) if t.product == product)


def doubled(task):
    """The same with a product that is twice as large."""

    def prepare(problem, stack):
        run = task.prepare(problem, stack)
        return lambda: [2 * x for x in run()[2]]

    return replace(task, engine="doubled", prepare=prepare)


def row(**options):
    values = {
        "what": "one-shot",
        "engine": "graph",
        "curvature": "hessian",
        "count": 1,
        "library": "hvpopt",
        "is_exact": True,
        "flop_bound": 2.0,
    }
    return Row(**{**values, **options})


def report(*rows):
    return Report("MLP", 10, 0.001, 1.0, 100, list(rows))


def test_a_wrong_product_is_named_and_not_timed(problem):
    right, wrong = report_of(problem, plain(), doubled(plain())).rows
    assert right.failure is None
    assert right.error < 1e-6
    assert wrong.failure == "wrong by 1e+00 of the product"
    assert wrong.milliseconds is None


def test_an_approximation_is_timed_and_its_error_kept(problem):
    approximate = replace(doubled(plain()), is_exact=False)
    (found,) = report_of(problem, approximate).rows
    assert found.failure is None
    assert found.error == pytest.approx(1)
    assert found.milliseconds > 0


def test_what_raises_is_named_with_its_reason(problem):
    def prepare(problem, stack):
        raise RuntimeError("no such formula\nand more")

    (found,) = report_of(problem, replace(plain(), prepare=prepare)).rows
    assert found.failure == "RuntimeError: no such formula"


def test_what_is_not_installed_says_how_to_install_it(problem):
    def prepare(problem, stack):
        import no_such_library  # noqa: F401

    (found,) = report_of(problem, replace(plain(), prepare=prepare)).rows
    assert "no_such_library" in found.failure
    assert found.failure.endswith("pip install 'hvpopt[bench]'")


def test_attention_needs_a_remedy_which_is_named():
    (found,) = report_of(QUICK["gpt"](CPU), plain()).rows
    assert found.remedy == KERNELS
    assert "flash_attention" in found.failure
    assert found.milliseconds > 0
    printed = table(report(found), peers=True)
    assert "double backward [1]" in printed
    assert f"[1] with {KERNELS}; without: " in " ".join(printed.split())


def test_fewer_rounds_are_run_where_there_is_no_time_for_more(problem):
    entries = [plain(REPEATED_HVP), plain()]
    many = report_of(problem, *entries, repeats=3).rows
    assert [r.rounds for r in many] == [3, 3]
    one = report_of(problem, *entries, repeats=3, seconds=1e-9).rows
    assert [r.rounds for r in one] == [1, 1]
    assert all(r.milliseconds > 0 for r in one)


def test_more_vectors_are_not_run_where_fewer_took_too_long_to_build(problem):
    entries = [t for t in many_vector_peer_tasks(BOUND, 8) if "batched" in t.engine]
    entries += [t for t in many_vector_peer_tasks(BOUND, 32) if "batched" in t.engine]
    few, more = report_of(problem, *entries, seconds=1e-9).rows
    assert few.milliseconds > 0
    assert more.failure.startswith("not run: it first builds for some")
    assert more.failure in " ".join(table(report(few, more), peers=True).split())


def test_more_vectors_are_not_run_where_they_would_not_fit(problem, monkeypatch):
    monkeypatch.setattr("hvpopt.experiments.benchmarks.measure.free_bytes", lambda device: 1)
    entries = [t for t in many_vector_peer_tasks(BOUND, 8) if "batched" in t.engine]
    entries += [t for t in many_vector_peer_tasks(BOUND, 32) if "batched" in t.engine]
    few, more = report_of(problem, *entries).rows
    assert few.memory_ratio > 0
    assert "not run: it would take some 0 GiB" in more.failure


def test_one_by_one_more_vectors_take_each_what_fewer_took(problem):
    entries = [t for t in many_vector_peer_tasks(BOUND, 8) if t.engine.startswith("double")]
    entries += [t for t in many_vector_peer_tasks(BOUND, 32) if t.engine.startswith("double")]
    found = {(r.what, r.engine): r for r in report_of(problem, *entries).rows}
    loop = "double backward, one by one"
    for several in (HVPS, GGNS):
        few, more = found[several[8].what, loop], found[several[32].what, loop]
        assert (more.count, more.milliseconds) == (32, few.milliseconds)
        assert more.memory_ratio is None
    batched = [found[HVPS[k].what, "double backward, batched"] for k in (8, 32)]
    assert batched[0].milliseconds != batched[1].milliseconds


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


def test_products_are_read_from_each_layout(problem):
    v = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([5.0, 6.0])]
    make = Task(ONE_SHOT_HVP, "any", 1.0, plain().prepare)
    assert make.read((0, 0, v)).tolist() == [1, 2, 3, 4, 5, 6]
    assert replace(make, layout="list").read([None, v], 1).tolist() == [1, 2, 3, 4, 5, 6]
    assert replace(make, layout="rows").read(v, 1).tolist() == [3, 4, 6]
    assert replace(make, layout="columns").read({"a": v[0], "b": v[1]}, 1).tolist() == [2, 4, 6]


def test_every_peer_computes_every_product_of_the_perceptron(problem):
    entries = [t for t in peer_tasks(BOUND) if installed(t.engine)]
    entries += [t for t in many_vector_peer_tasks(BOUND, 8) if installed(t.engine)]
    rows = report_of(problem, *entries).rows
    assert len(rows) == len(entries)
    for found in rows:
        assert found.failure is None, found
        assert found.error < 1e-5
        assert found.milliseconds > 0
        assert (found.memory_ratio is None) == found.engine.endswith("one by one")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in QUICK if name != "mlp"])
def test_every_peer_computes_products_or_says_why_not(name):
    problem = QUICK[name](CPU)
    entries = [t for t in peer_tasks(BOUND) if installed(t.engine)]
    for found in report_of(problem, *entries).rows:
        if found.milliseconds is None:
            assert "curvlinops" in found.engine, found
            assert "wrong by" in found.failure  # torch.func's jvp of jacrev of a normalisation
        else:
            assert found.error < 1e-3


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
def test_the_comparison_contains_jax():
    pytest.importorskip("jax")
    found = measure("mlp", CPU, repeats=1, quick=True, peers=True)
    assert {r.library for r in found.rows} == {"hvpopt", "torch", "jax"}


@pytest.mark.slow
def test_compiled_products_are_measured_on_request():
    found = measure("mlp", CPU, repeats=1, quick=True, compiled=True)
    compiled = [r for r in found.rows if r.engine.endswith("compiled")]
    assert len(compiled) == 2
    assert all(r.error < 1e-3 for r in compiled)
    assert len(found.rows) == 2 + len(tasks(BOUND))
