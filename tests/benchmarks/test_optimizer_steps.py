"""Where the table of optimizers' steps puts the time, by a clock that only counts."""

import json
from itertools import count

import pytest
import torch
from hvpopt.experiments.benchmarks import optimizer_steps
from hvpopt.experiments.benchmarks.models import QUICK
from hvpopt.experiments.benchmarks.optimizer_steps import OPTIMIZERS, PARTS, main, measure

from hvpopt.closure import ClosureOracle
from hvpopt.preconditioners.base import Preconditioner

CPU = torch.device("cpu")


@pytest.fixture
def ticks(monkeypatch):
    """A clock on which all that is timed takes one second more than what is timed inside of it."""
    clock = count()

    def timed(task, device):
        start = next(clock)
        result = task()
        return result, next(clock) - start

    monkeypatch.setattr(optimizer_steps, "timed", timed)


def test_every_part_counts_once_and_refreshes_by_how_often_they_are(ticks):
    problem = QUICK["mlp"](CPU)
    before = {key: value.clone() for key, value in problem.module.state_dict().items()}
    row = measure(problem, "NewtonCG", repeats=6, device=CPU)
    assert sum(row.shares.values()) == pytest.approx(100)
    # a step is a trace, products, evaluations, a share of a refresh, and gaps between as ticks
    per_step = 100 * row.shares["trace"] ** -1
    assert row.shares["products"] / row.shares["trace"] == pytest.approx(row.products)
    assert row.shares["refresh"] / row.shares["trace"] == pytest.approx(1)  # every step asks
    assert row.gradients == pytest.approx(per_step)  # a gradient takes one tick, as a trace does
    assert row.own_range[0] <= row.shares["own"] <= row.own_range[1]
    after = problem.module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_stopwatches_are_taken_off_again():
    originals = (ClosureOracle.trace, ClosureOracle.evaluate, Preconditioner.prepare)
    with optimizer_steps._stopwatches(CPU):
        assert ClosureOracle.trace is not originals[0]
    assert originals == (ClosureOracle.trace, ClosureOracle.evaluate, Preconditioner.prepare)


def test_quick_prints_and_writes_a_row_for_every_optimizer(capsys, tmp_path):
    path = tmp_path / "steps.json"
    main(["--quick", "--repeats", "3", "--json", str(path)])
    written, printed = json.loads(path.read_text()), capsys.readouterr().out
    rows = [r for r in written["rows"] if r["model"].startswith("GPT")]
    assert [r["optimizer"] for r in rows] == list(OPTIMIZERS)
    for row in rows:
        assert set(row["shares"]) == {*PARTS, "own"}
        assert sum(row["shares"].values()) == pytest.approx(100)
        assert row["optimizer"] in printed
        assert (row["shares"]["refresh"] > 0) == (row["optimizer"] == "NewtonCG")
