"""Whole races: tuning, the files that they write, interruption, and options that cannot work."""

import json
import math

import pytest
import torch
from bowl import CPU, Bowl, BowlWithTarget, contestants, entry
from hvpopt.experiments.race import race as race_module
from hvpopt.experiments.race.contestants import Contestant
from hvpopt.experiments.race.race import TUNING_SEED, Race, tune
from hvpopt.experiments.race.results import Result


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
