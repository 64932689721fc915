"""Every experiment is composed, checked, constructed and run for two steps."""

import inspect
from pathlib import Path

import hydra
import lightning
import pytest
from arff_files import NUM_FEATURES, NUM_LABELS, write_bibtex
from hydra import compose, initialize_config_module
from idx_files import write_fashion_mnist
from omegaconf import OmegaConf

import hvpopt
from hvpopt.cli.targets import check_targets

CONF = Path(hvpopt.__file__).parents[1] / "conf"


EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name[0] not in "._")


def compose_config(*overrides):
    with initialize_config_module("hvpopt.conf", job_name="test", version_base="1.3"):
        return compose("config", list(overrides))


def task_of(config):
    """The task as the command builds it."""
    resolved = OmegaConf.to_container(config, resolve=True)
    check_targets(resolved)
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    return hydra.utils.instantiate(config.task, _convert_="all")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_runs_for_two_steps(name, tmp_path):
    overrides = [
        f"experiment={name}",
        f"output_dir={tmp_path}",
        "trainer.max_epochs=1",
        "++trainer.limit_train_batches=2",
        "++trainer.accelerator=cpu",
        "callbacks.progress_bar=null",
        "++trainer.enable_progress_bar=false",
        "trainer.log_every_n_steps=1",
    ]
    if name.startswith("denoising"):
        overrides.append("++data.num_test=20")
    if name.startswith(("autoencoder", "denoising")):
        write_fashion_mnist(tmp_path)
        overrides += [f"data.root={tmp_path}", "++data.num_val=10", "++data.batch_size=20"]
    if name.startswith("bibtex"):
        write_bibtex(tmp_path)
        overrides += [f"data.folder={tmp_path}", "++data.num_val=10", "++data.batch_size=10"]
        overrides += [
            f"model.energy.num_inputs={NUM_FEATURES}",
            f"model.energy.num_labels={NUM_LABELS}",
        ]
    results = task_of(compose_config(*overrides))()
    assert results["steps"] == 2
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file()
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
    assert list((tmp_path / "tensorboard").glob("events.*"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_opens_with_its_command(name):
    lines = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert lines[1].startswith(f"# hvpopt experiment={name}")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_leaves_nothing_of_its_optimizer_with_another(name):
    config = compose_config(f"experiment={name}", "optimizer=adamw")
    alone = compose_config("optimizer=adamw")
    assert config.optimizer == alone.optimizer


def test_the_default_is_the_digits_experiment():
    assert compose_config() == compose_config("experiment=digits")


@pytest.mark.parametrize(
    "choice",
    [
        f"{group}={path.stem}"
        for group in GROUPS
        if group not in ("hydra", "experiment")
        for path in sorted((CONF / group).glob("*.yaml"))
    ],
)
def test_every_option_of_every_group_names_what_exists(choice):
    task = ["task=race"] if choice.startswith("race=") else []  # the group is that task's own
    config = compose_config(*task, choice, "output_dir=.")
    check_targets(OmegaConf.to_container(config, resolve=True))


@pytest.mark.parametrize("path", sorted(CONF.glob("optimizer/*.yaml")), ids=lambda p: p.stem)
def test_an_optimizer_file_names_its_class_first_and_repeats_no_default(path):
    config = OmegaConf.load(path)
    assert list(config)[:2] == ["_target_", "_partial_"]
    parameters = inspect.signature(hydra.utils.get_class(config._target_)).parameters
    for name in list(config)[2:]:
        assert config[name] != parameters[name].default
