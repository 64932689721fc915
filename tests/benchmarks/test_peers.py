"""The comparison with other libraries: what is checked, timed and refused."""

from dataclasses import replace

import pytest
import torch
from hvpopt.experiments.benchmarks import models
from hvpopt.experiments.benchmarks.measure import KERNELS
from hvpopt.experiments.benchmarks.models import QUICK
from hvpopt.experiments.benchmarks.peers import many_vector_peer_tasks, peer_tasks
from hvpopt.experiments.benchmarks.report import table
from hvpopt.experiments.benchmarks.tasks import GGNS, HVPS, ONE_SHOT_HVP, REPEATED_HVP, Task
from peer_cases import BOUND, CPU, doubled, installed, plain, report, report_of

# other libraries' own: torch.fx of torch.func.linearize, torch.jit
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture
def problem():
    return models.tiny(CPU)


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
