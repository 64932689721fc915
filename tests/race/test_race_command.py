"""`hvpopt task=race race=...`: every race is composed, checked, and run for a moment."""

import json
from pathlib import Path

import hydra
import pytest
import torch
from hvpopt.experiments.classical.functions import TestFunction, saddle_quartic
from hvpopt.experiments.race import ClassicalRace
from hvpopt.experiments.race.classical import _arrival, _is_minimum
from hvpopt.experiments.race.classical_report import Count
from hydra import compose, initialize_config_module
from idx_files import write_fashion_mnist
from omegaconf import OmegaConf

import hvpopt
from hvpopt.cli.targets import check_targets

CONF = Path(hvpopt.__file__).parents[1] / "conf"
RACES = sorted(path.stem for path in (CONF / "race").glob("*.yaml"))


def compose_config(*overrides):
    with initialize_config_module("hvpopt.conf", job_name="test", version_base="1.3"):
        return compose("config", list(overrides))


def task_of(config):
    """The task as the command builds it."""
    check_targets(OmegaConf.to_container(config, resolve=True))
    return hydra.utils.instantiate(config.task, _convert_="all")


@pytest.mark.parametrize("name", RACES)
def test_a_race_opens_with_its_command(name):
    lines = (CONF / "race" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == f"# hvpopt task=race race={name}"


@pytest.mark.parametrize("name", [name for name in RACES if name != "classical"])
def test_a_race_runs_for_a_moment(name, tmp_path):
    overrides = [
        "task=race",
        f"race={name}",
        f"output_dir={tmp_path}",
        "race.seconds=0.02",
        "++race.seeds=[0]",
        "++race.num_slices=1",
        "++race.tuning_seconds=0.001",
    ]
    overrides = [f"++{o}" if o.startswith("race.") else o for o in overrides]
    if "autoencoder" in name or name == "logistic":
        write_fashion_mnist(tmp_path)
        overrides += [f"++race.task.root={tmp_path}", "++race.task.num_images=40"]
    if name == "adding":
        overrides += ["++race.task.length=8", "++race.task.batch_size=16"]
    if name == "autoencoder_batches":
        overrides.append("++race.task.batch_size=20")
    config = compose_config(*overrides)
    names = [n for n in config.race.contestants if n in ("AdamW", "NewtonCG", "SMD")]
    OmegaConf.update(config, "race.only", names, force_add=True)
    found = task_of(config)()
    assert {contestant["name"] for contestant in found["contestants"]} == set(names)
    for contestant in found["contestants"]:
        assert all(not run["failed"] for run in contestant["runs"]), contestant["notes"]
    assert json.loads((tmp_path / "race.json").read_text())["seconds"] == 0.02


def test_all_contestants_race_on_the_digits(tmp_path):
    """A smoke test: absent packages and failures would be rows of the table."""
    config = compose_config(
        "task=race",
        "race=digits",
        f"output_dir={tmp_path}",
        "race.seconds=0.3",
        "++race.seeds=[0]",
        "++race.num_slices=3",
        "++race.tuning_seconds=0.02",
    )
    found = task_of(config)()
    assert len(found["contestants"]) == len(config.race.contestants)
    for contestant in found["contestants"]:
        for run in contestant["runs"]:
            assert not run["failed"], (contestant["name"], run["note"])
            assert run["steps"] > 0
    for name in ("race.json", "race.md", "race.png"):
        assert (tmp_path / name).is_file()
    assert list((tmp_path / "tensorboard" / "NewtonCG").glob("seed0/events.*"))


def test_the_classical_functions_race_by_iteration_counts(tmp_path):
    found = task_of(
        compose_config(
            "task=race",
            "race=classical",
            f"output_dir={tmp_path}",
            "++race.only=[Himmelblau,saddle quartic]",
        )
    )()
    counts = {(c["function"], c["method"]): c for c in found["counts"]}
    for method in ("trust-ncg", "newton-cg"):
        himmelblau = counts["Himmelblau", method]
        assert himmelblau["success"]
        assert himmelblau["is_true"]
        assert 0 < himmelblau["to_accuracy"] <= himmelblau["iterations"] < 30
        assert len(himmelblau["values"]) >= himmelblau["iterations"] - 1
        assert himmelblau["excess"] < 1e-13
    for count in found["counts"]:
        if count["iterations"] is None:
            assert count["message"] == "not installed (pip install pytorch-minimize)"
    for name in ("race.json", "race.md", "race.png"):
        assert (tmp_path / name).is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": {"x": {"library": "scipy"}}}, "race.methods.x.library='scipy': choose of hvp"),
        ({"methods": {}, "only": ["Booth"]}, "race.only names 'Booth', which is in none of Rosen"),
    ],
)
def test_a_classical_race_that_cannot_be_run_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ClassicalRace(**options)


def test_a_claim_of_success_at_a_saddle_is_wrong_and_at_a_local_minimum_right():
    x = torch.zeros(2, dtype=torch.float64)
    assert not _is_minimum(saddle_quartic(), x)
    x[1] = 2**0.5
    assert _is_minimum(saddle_quartic(), x)
    assert not _is_minimum(saddle_quartic(), x + 0.1)


def test_arrival_is_counted_to_the_least_value_found_near_a_minimum_known_to_some_digits():
    assert _arrival([5.0, 3.0, 1.0 + 1e-14], [0.0, 1.0], 1e-13) == 3
    assert _arrival([5.0], [0.0], 1e-13) is None
    race = ClassicalRace(methods={})
    function = TestFunction("f", torch.sum, (0.0,), minimum=0.123456)
    ends = (0.1234564, 0.1234563, 0.5)
    counts = [Count("f", str(v), values=(9.0, v)) for v in ends]
    arrivals = [count.to_accuracy for count in race._with_arrivals(function, counts)]
    assert arrivals == [None, 2, None]


def test_a_function_is_chosen_by_its_whole_name_or_by_a_part():
    def names(*only):
        return [function.name for function in ClassicalRace(methods={}, only=only).functions]

    assert names("Rosenbrock, n = 10") == ["Rosenbrock, n = 10"]
    assert len(names("Rosenbrock")) == 5
    assert names("Wood", "Beale") == ["Beale", "Wood"]
