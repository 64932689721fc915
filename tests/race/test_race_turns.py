"""Who runs, when, and what is made of it."""

import json
import math
import threading
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hvpopt.experiments.race import FourRegions, turns
from hvpopt.experiments.race import race as race_module
from hvpopt.experiments.race.contestants import PACKAGES, Contestant
from hvpopt.experiments.race.plots import curve, picture
from hvpopt.experiments.race.problem import Evaluation, Problem, Target, Task
from hvpopt.experiments.race.race import TUNING_SEED, Race, start, tune
from hvpopt.experiments.race.report import markdown, rows, text
from hvpopt.experiments.race.results import Result, at_time, first_time, ranked, times_the_best
from hvpopt.experiments.race.rivals import MuonWithAdamW, _paused, torchmin_steps
from hvpopt.experiments.race.turns import Record, Run, run_in_turns
from torch import nn

CPU = torch.device("cpu")


class BowlProblem(Problem):
    """½ Σ (w − 1)² from w = 0; torch.nn.Linear(2, 1) holds w and a bias."""

    def __init__(self, seed=0):
        self.module = nn.utils.skip_init(nn.Linear, 2, 1).double()
        for p in self.module.parameters():
            nn.init.zeros_(p)
        self.observed = []

    def loss(self):
        return sum(0.5 * (p - 1).square().sum() for p in self.module.parameters())

    def observe(self, loss):
        self.observed.append(loss.item())

    @torch.no_grad()
    def evaluate(self):
        loss = self.loss().item()
        return Evaluation(loss, math.sqrt(2 * loss))


@dataclass(frozen=True)
class Bowl(Task):
    metric_name: ClassVar[str] = "distance"
    is_metric_logarithmic: ClassVar[bool] = True

    def build(self, seed, device):
        return BowlProblem(seed)

    def describe(self):
        return "a bowl"


class BowlWithTarget(Bowl):
    target = Target("metric", 1e-3)


def entry(**kwargs):
    return {"optimizer": "torch.optim.SGD", **kwargs}


# --- turns


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


# --- contestants


def test_the_steps_of_an_optimizer_are_those_of_a_plain_loop():
    contestant = Contestant.of("SGD", entry(options={"lr": 0.25, "momentum": 0.5}))
    problem = BowlProblem()
    steps = contestant.start(problem, contestant.options)
    for _ in range(3):
        next(steps)
    w, v, observed = 0.0, 0.0, []
    for _ in range(3):
        observed.append(1.5 * (w - 1) ** 2)
        v = 0.5 * v + (w - 1)
        w -= 0.25 * v
    assert problem.module.weight.tolist()[0] == pytest.approx([w, w])
    assert problem.observed == pytest.approx(observed)


def test_the_graph_of_the_gradient_is_kept_on_the_steps_that_ask_for_it():
    seen = []

    class Watcher(torch.optim.SGD):
        def step(self, closure):
            loss = super().step(closure)
            seen.append(all(p.grad.requires_grad for g in self.param_groups for p in g["params"]))
            return loss

    from hvpopt.experiments.race.contestants import optimizer_steps

    run = Run(
        "r",
        BowlProblem(),
        optimizer_steps(BowlProblem(), Watcher, {"lr": 0.1}, create_graph_every=3),
        seed=0,
        device=CPU,
    )
    while len(seen) < 7:
        run.turn(run.clock + 1e-9)
    assert run.note is None
    assert seen[:7] == [True, False, False, True, False, False, True]


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({}, "race.contestants.x must name one of optimizer, minimizer, solver, got none"),
        (entry(minimizer="newton-cg"), r"got \['optimizer', 'minimizer'\]"),
        (entry(lr=1), "race.contestants.x has no key 'lr': choose of optimizer, minimizer"),
        (entry(grid={"lr": 1}), "race.contestants.x.grid.lr=1: expected a list of candidates"),
        (entry(grid={"lr": []}), r"grid.lr=\[\]: expected a list of candidates"),
        ({"optimizer": "torch.optim.SDG"}, "torch.optim.SDG does not exist. Did you mean 'SGD'"),
        ({"optimizer": "os.system"}, "x.optimizer=os.system is not allowed"),
    ],
)
def test_an_entry_that_cannot_be_understood_is_refused(description, message):
    with pytest.raises(ValueError, match=message):
        Contestant.of("x", description)


def test_an_absent_package_is_named(monkeypatch):
    monkeypatch.setitem(PACKAGES, "no_such_package", "no-such-package")
    contestant = Contestant.of("x", {"optimizer": "no_such_package.Fast"})
    assert contestant.missing_package == "no-such-package"
    assert not contestant.is_ours
    result = Result(contestant, absent=contestant.missing_package)
    assert result.notes() == ["not installed (pip install no-such-package)"]


def test_ours_are_the_optimizers_of_hvpopt():
    assert Contestant.of("x", {"optimizer": "hvpopt.NewtonCG"}).is_ours
    muon = Contestant.of("x", {"optimizer": "hvpopt.experiments.race.rivals.MuonWithAdamW"})
    assert not muon.is_ours


def test_muon_gets_the_matrices_and_adamw_the_rest():
    torch.manual_seed(0)
    module = nn.Linear(4, 3)
    twin = nn.Linear(4, 3)
    twin.load_state_dict(module.state_dict())
    inputs = torch.randn(8, 4)
    both = MuonWithAdamW(list(module.parameters()), lr=0.01)
    muon = torch.optim.Muon(
        [twin.weight], lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW([twin.bias], lr=0.01, weight_decay=0.0)
    for _ in range(3):

        def closure():
            both.zero_grad()
            loss = module(inputs).square().mean()
            loss.backward()
            return loss

        both.step(closure)
        twin.zero_grad()
        twin(inputs).square().mean().backward()
        muon.step()
        adamw.step()
    assert torch.equal(module.weight, twin.weight)
    assert torch.equal(module.bias, twin.bias)


def test_a_call_pauses_in_its_callback_and_is_ended_by_closing():
    log = []

    def call(callback):
        for i in range(10):
            log.append(i)
            callback(torch.tensor(i))

    paused = _paused(call)
    assert log == []
    assert next(paused).item() == 0
    assert next(paused).item() == 1
    assert log == [0, 1]
    num_threads = threading.active_count()
    paused.close()
    assert threading.active_count() == num_threads - 1
    assert log == [0, 1]


def test_the_end_and_the_errors_of_a_paused_call_arrive():
    assert [x.item() for x in _paused(lambda callback: callback(torch.tensor(3)))] == [3]

    def fails(callback):
        callback(torch.tensor(3))
        raise ValueError("inside")

    paused = _paused(fails)
    next(paused)
    with pytest.raises(ValueError, match="inside"):
        next(paused)


@pytest.mark.parametrize("method", ["newton-cg", "trust-ncg"])
def test_pytorch_minimize_minimises_the_problem_step_by_step(method):
    pytest.importorskip("torchmin")
    problem = BowlProblem()
    steps = torchmin_steps(problem, method, {})
    next(steps)
    assert 0 <= problem.evaluate().loss < 1.5
    for _ in steps:
        pass
    assert problem.evaluate().loss < 1e-12


# --- tuning and results


def test_tuning_takes_the_candidate_with_the_least_loss_and_says_when_it_is_at_the_edge():
    contestant = Contestant.of("SGD", entry(grid={"lr": [1e-4, 0.5, 1e9]}))
    result = Result(contestant)
    tune(Bowl(), result, 0.05, CPU)
    assert result.options == {"lr": 0.5}
    assert result.at_edge == []
    assert [trial.options for trial in result.trials] == [{"lr": 1e-4}, {"lr": 0.5}, {"lr": 1e9}]
    assert result.trials[2].figure == math.inf
    assert all(trial.seconds > 0 for trial in result.trials)

    result = Result(Contestant.of("SGD", entry(grid={"lr": [1e-6, 1e-4]})))
    tune(Bowl(), result, 0.02, CPU)
    assert result.at_edge == ["lr"]
    assert result.notes() == ["lr at the end of its grid"]


def test_tuning_to_a_target_takes_who_is_there_first():
    contestant = Contestant.of("SGD", entry(grid={"lr": [0.9, 0.01]}))
    result = Result(contestant)
    tune(BowlWithTarget(), result, 2.0, CPU, num_slices=2_000)
    assert result.options == {"lr": 0.9}


def finished(name, *runs, optimizer="torch.optim.SGD"):
    """A result with records (seconds, loss) for each seed."""
    result = Result(Contestant.of(name, {"optimizer": optimizer}))
    for seed, points in enumerate(runs):
        run = Run(name, BowlProblem(), iter(()), seed=0, device=CPU)
        run.records = [
            Record(s, i, Evaluation(loss, 10 * loss)) for i, (s, loss) in enumerate(points)
        ]
        run.clock, run.num_steps = points[-1][0], len(points) - 1
        result.runs[seed] = run
    return result


def test_figures_are_medians_over_the_seeds():
    result = finished("a", [(0, 9.0), (1, 1.0)], [(0, 9.0), (1, 3.0)], [(0, 9.0), (1, math.nan)])
    assert result.finals("loss") == [1, 3, math.inf]
    assert result.median("loss") == 3
    assert result.seconds_to(Target("loss", 2.0)) == math.inf
    assert result.seconds_to(Target("loss", 5.0)) == 1
    records = result.runs[0].records
    assert first_time(records, Target("metric", 10.0)) == 1
    assert at_time(records, 0.5).loss == 9
    assert at_time(records, -0.5) is None


def test_the_order_is_by_the_time_to_the_target_and_else_by_the_loss():
    results = [
        Result(Contestant.of("absent", entry()), absent="x"),
        finished("slow", [(0, 9.0), (5, 1.0)]),
        finished("low", [(0, 9.0), (6, 0.5)]),
        finished("bad", [(0, 9.0), (1, math.inf)]),
    ]

    def names(target):
        return [result.contestant.name for result in ranked(results, target)]

    assert names(None) == ["low", "slow", "bad", "absent"]
    assert names(Target("loss", 1.0)) == ["slow", "low", "bad", "absent"]
    assert times_the_best(results, None) == {"slow": 2, "low": 1, "bad": math.inf}
    assert times_the_best(results, Target("loss", 1.0))["low"] == pytest.approx(1.2)
    assert times_the_best(results, Target("loss", 0.1))["slow"] == 2


def test_a_curve_shows_what_was_known_at_each_time():
    result = finished("a", [(0, 8.0), (1, 4.0), (2, 2.0)], [(0, 8.0), (1.5, 6.0)])
    times, medians, least, most = curve(result, "loss", 2.0)
    values = dict(zip(times, zip(medians, least, most, strict=True), strict=True))
    assert values[0.0] == (8, 8, 8)
    assert values[1.0] == (6, 4, 8)
    assert values[1.5] == (5, 4, 6)
    assert values[2.0] == (4, 2, 6)
    nothing = finished("b", [(0, math.nan)])
    assert curve(nothing, "loss", 2.0) == ([], [], [], [])


def test_the_table_names_figures_and_failures():
    fine, failed = finished("fine", [(0, 9.0), (2, 0.25)]), finished("failed", [(0, 9.0)])
    assert not failed.has_run  # no step
    failed.runs[0].note, failed.runs[0].has_failed = "ValueError: no", True
    table = rows(Bowl(), [failed, fine])
    assert table[0][:3] == ["contestant", "tuned to", "training loss"]
    assert table[1][0] == "fine"
    assert table[1][2:6] == ["0.25", "0.25 – 0.25", "2.5", "1"]
    assert table[2][-1] == "ValueError: no"
    assert text(table).splitlines()[1].startswith("fine ")
    assert markdown(table).splitlines()[1].startswith("| --- | --- |")


# --- the race


def contestants():
    return {
        "SGD": entry(grid={"lr": [0.1, 0.5]}),
        "LBFGS": {"optimizer": "torch.optim.LBFGS"},
        "NewtonCG": {"optimizer": "hvpopt.NewtonCG", "options": {"curvature": "hessian"}},
        "fails": entry(options={"lr": -1.0}),
    }


def test_a_race_writes_all_its_files(tmp_path):
    race = Race(task=Bowl(), contestants=contestants(), seconds=0.2, seeds=(0, 5), num_slices=5)
    found = race.run(tmp_path)
    content = json.loads((tmp_path / "race.json").read_text())
    assert content["machine"]
    assert content["threads"] == torch.get_num_threads()
    assert content["versions"]["torch"] == torch.__version__
    assert (content["seconds"], content["tuning_seconds"], content["seeds"]) == (0.2, 0.05, [0, 5])
    assert content["tuning_seed"] == TUNING_SEED
    assert not content["interrupted"]
    assert {c["name"] for c in content["contestants"]} == set(contestants())
    of = {c["name"]: c for c in content["contestants"]}
    assert of["SGD"]["grid"] == {"lr": [0.1, 0.5]}
    assert len(of["SGD"]["tuning"]) == 2
    assert of["SGD"]["options"]["lr"] in (0.1, 0.5)
    assert "Invalid learning rate: -1.0" in of["fails"]["notes"][0]
    assert [run["seed"] for run in of["NewtonCG"]["runs"]] == [0, 5]
    assert of["NewtonCG"]["runs"][0]["records"][-1][2] < 1e-10
    assert found["contestants"][0]["name"] == content["contestants"][0]["name"]
    assert "| NewtonCG |" in (tmp_path / "race.md").read_text()
    assert (tmp_path / "race.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tensorboard").glob("events.*"))
    assert list((tmp_path / "tensorboard" / "NewtonCG" / "seed5").glob("events.*"))


def test_tensorboard_has_the_seconds_as_its_wall_time(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Race(
        task=Bowl(),
        contestants=contestants(),
        seconds=0.1,
        seeds=(0,),
        num_slices=4,
        only=["LBFGS"],
    ).run(tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "LBFGS" / "seed0")).Reload()
    scalars = events.Scalars("training_loss")
    (run,) = json.loads((tmp_path / "race.json").read_text())["contestants"][0]["runs"]
    assert [s.wall_time for s in scalars] == pytest.approx([r[0] for r in run["records"]])
    assert [s.step for s in scalars] == [round(1e3 * r[0]) for r in run["records"]]
    assert [s.value for s in scalars] == pytest.approx([r[2] for r in run["records"]])


def test_an_interrupted_race_writes_what_there_is(tmp_path, monkeypatch):
    count = iter(range(100))
    original = race_module.run_in_turns

    def interrupted(runs, seconds, num_slices):
        original(runs, seconds, num_slices)
        if next(count) == 2:  # after tuning and the first seed, in the second
            raise KeyboardInterrupt

    monkeypatch.setattr(race_module, "run_in_turns", interrupted)
    race = Race(task=Bowl(), contestants=contestants(), seconds=0.05, seeds=(0, 1, 2), num_slices=2)
    with pytest.raises(SystemExit) as error:
        race.run(tmp_path)
    assert error.value.code == 130
    content = json.loads((tmp_path / "race.json").read_text())
    assert content["interrupted"]
    assert len(content["contestants"][0]["runs"]) == 2
    assert "Interrupted before its end." in (tmp_path / "race.md").read_text()
    assert (tmp_path / "race.png").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0}, "race.seconds=0 is out of range: expected more than 0"),
        ({"num_slices": -1}, "race.num_slices=-1 is out of range"),
        ({"tuning_seconds": -1.0}, "race.tuning_seconds=-1.0 is out of range"),
        ({"seeds": []}, r"race.seeds=\[\]: expected at least one seed"),
        ({"seeds": [TUNING_SEED]}, "on which options are tuned"),
        ({"only": ["Adam"]}, "race.only names 'Adam', who does not run here: choose of SGD, LBFGS"),
    ],
)
def test_a_race_that_cannot_be_run_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Race(task=Bowl(), contestants=contestants(), **options)


def test_who_saw_a_part_of_a_stream_is_behind_who_saw_it_all():
    part, whole = finished("part", [(0, 9.0), (1, 0.1)]), finished("whole", [(0, 9.0), (1, 0.5)])
    part.runs[0]._problem.has_end = True
    assert [r.contestant.name for r in ranked([part, whole], None)] == ["whole", "part"]
    assert times_the_best([part, whole], None)["whole"] == 1


def test_a_picture_of_an_interrupted_race_leaves_runs_without_records_out():
    result = finished("a", [(0, 2.0), (1, 1.0)])
    result.runs[1] = Run("a", BowlProblem(), iter(()), seed=0, device=CPU)
    drawn = picture(Bowl(), [result], 1.0)
    assert all(len(axes.lines) >= 1 for axes in drawn.axes[:1])
