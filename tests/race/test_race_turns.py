"""Who runs, when, and what ends a run."""

import pytest
import torch
from bowl import CPU, Bowl, BowlProblem, BowlWithTarget, entry
from hvpopt.experiments.race import FourRegions, turns
from hvpopt.experiments.race.contestants import Contestant
from hvpopt.experiments.race.race import start
from hvpopt.experiments.race.results import Result
from hvpopt.experiments.race.turns import Run, run_in_turns


@pytest.fixture
def fake_clock(monkeypatch):
    """A step takes the seconds that it returns."""

    def timed(task, device):
        task.__self__.seconds_before = task.__self__.clock
        return task(), task.__self__._problem.step_seconds

    monkeypatch.setattr(turns, "timed", timed)


def counted_run(name, step_seconds, log, **kwargs):
    problem = BowlProblem()
    problem.step_seconds = step_seconds

    def steps():
        while True:
            log.append(name)
            yield

    return Run(name, problem, steps(), seed=0, device=CPU, **kwargs)


def test_clocks_never_differ_by_more_than_a_slice_and_a_step(fake_clock):
    log = []
    step_seconds = {"short": 0.01, "middle": 0.3, "long": 2.5}
    runs = [counted_run(name, seconds, log) for name, seconds in step_seconds.items()]
    ends = []
    for run in runs:
        original = run.turn

        def turn(until, original=original):
            original(until)
            ends.append([r.clock for r in runs])

        run.turn = turn
    run_in_turns(runs, seconds=10.0, num_slices=10)
    for clocks in ends:
        for clock in clocks:
            for other in clocks:
                assert clock - other <= 1.9 + max(step_seconds.values()) + 1e-9
    for run, seconds in zip(runs, step_seconds.values(), strict=True):
        assert 10.0 <= run.clock + 1e-9 < 10.0 + seconds + 1e-6
        assert run.num_steps == log.count(run.name)
        assert [r.seconds for r in run.records] == sorted(r.seconds for r in run.records)


def test_evaluations_and_other_runs_do_not_count(monkeypatch):
    ticks = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: ticks[0])

    def steps(seconds):
        while True:
            ticks[0] += seconds
            yield

    problems = [BowlProblem(), BowlProblem()]
    for problem in problems:
        original = problem.evaluate

        def evaluate(original=original):
            ticks[0] += 100
            return original()

        problem.evaluate = evaluate
    runs = [
        Run(str(s), problem, steps(s), seed=0, device=CPU)
        for s, problem in zip((0.25, 0.5), problems, strict=True)
    ]
    run_in_turns(runs, seconds=2.0, num_slices=4)
    assert [(run.clock, run.num_steps) for run in runs] == [(2.0, 8), (2.0, 4)]


def test_each_run_draws_the_random_numbers_that_it_would_draw_alone():
    def drawing_run(seed, drawn):
        def steps():
            for _ in range(6):
                drawn.append(torch.rand(()).item())
                yield

        return Run("r", BowlProblem(), steps(), seed=seed, device=CPU)

    alone, first, second = [], [], []
    run_in_turns([drawing_run(1, alone)], seconds=1.0, num_slices=10_000)
    before = torch.get_rng_state()
    run_in_turns([drawing_run(1, first), drawing_run(2, second)], 1.0, num_slices=10_000)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == alone != second
    torch.manual_seed(1)
    assert alone == [torch.rand(()).item() for _ in range(6)]


def test_an_error_ends_one_run_with_its_first_line_and_no_other():
    def steps():
        yield
        raise ZeroDivisionError("a first line\nand a second")

    def endless():
        while True:
            yield

    runs = [
        Run("fails", BowlProblem(), steps(), seed=0, device=CPU),
        Run("goes on", BowlProblem(), endless(), seed=0, device=CPU),
    ]
    run_in_turns(runs, seconds=0.01, num_slices=2)
    assert runs[0].note == "ZeroDivisionError: a first line"
    assert runs[0].has_failed
    assert runs[0].num_steps == 1
    assert runs[1].note is None
    assert runs[1].clock >= 0.01


def test_a_loss_that_is_not_finite_ends_a_run():
    contestant = Contestant.of("SGD", entry(options={"lr": 1e200}))
    run = start(Bowl(), contestant, contestant.options, 0, CPU)
    run_in_turns([run], seconds=5.0, num_slices=50_000)
    assert run.note in ("the loss became inf", "the loss became nan")
    assert run.has_failed


def test_the_target_and_the_end_of_the_steps_end_a_run():
    contestant = Contestant.of("SGD", entry(options={"lr": 0.5}))
    run = start(BowlWithTarget(), contestant, contestant.options, 0, CPU)
    run_in_turns([run], seconds=5.0, num_slices=50_000)
    assert (run.note, run.has_failed) == ("reached the target", False)
    assert run.records[-1].evaluation.metric <= 1e-3 < run.records[-2].evaluation.metric

    short = Run("short", BowlProblem(), iter([None, None]), seed=0, device=CPU)
    run_in_turns([short], seconds=5.0, num_slices=5)
    assert (short.note, short.num_steps) == ("ended by itself", 2)

    problem = FourRegions(num_steps=3).build(0, CPU)
    contestant = Contestant.of("SGD", entry(options={"lr": 0.1}))
    stream = Run("s", problem, contestant.start(problem, {"lr": 0.1}), seed=0, device=CPU)
    run_in_turns([stream], seconds=5.0, num_slices=5)
    assert (stream.note, stream.num_steps, stream.has_failed) == ("saw all batches", 3, False)
    result = Result(contestant, runs={0: stream, 1: short})
    assert result.notes() == ["seed 1: ended by itself"]

    problem = FourRegions(num_steps=10**9).build(0, CPU)
    stream = Run("s", problem, contestant.start(problem, {"lr": 0.1}), seed=0, device=CPU)
    run_in_turns([stream], seconds=0.01, num_slices=1)
    assert Result(contestant, runs={0: stream}).notes() == ["saw a part of the stream"]
