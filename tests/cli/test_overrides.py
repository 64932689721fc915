"""Arguments that are passed on to Hydra, with a plus where it wants one."""

from omegaconf import OmegaConf

from hvpopt.cli.preflight import checked_arguments


def test_unlisted_arguments_are_set_without_a_plus(hvpopt):
    code, out, _ = hvpopt(
        "optimizer=adamw",
        "optimizer.weight_decay=0.5",
        "model.net.dropout=0.25",
        "data.batch_size=7",
        "callbacks.checkpoint.verbose=true",
        "trainer.gradient_clip_val=3",
        "logger.prefix=x",
        "--cfg",
        "job",
    )
    config = OmegaConf.create(out)
    assert code == 0
    assert config.optimizer.weight_decay == 0.5
    assert config.model.net.dropout == 0.25
    assert config.data.batch_size == 7
    assert config.callbacks.checkpoint.verbose is True
    assert config.trainer.gradient_clip_val == 3
    assert config.logger.prefix == "x"


def test_listed_keys_and_hydra_syntax_are_left_as_they_are():
    arguments = [
        "optimizer=lbfgs",
        "+a=1",
        "a=2",
        "++b.c=3",
        "seed=4",
        "~logger",
        "hydra.verbose=x",
    ]
    assert checked_arguments(arguments) == arguments
    sweep = ["-m", "optimizer=adamw,sgd", "optimizer.weight_decay=0.1,0.2"]
    off = ["callbacks=none"]
    assert checked_arguments([*sweep, *off]) == [*sweep[:2], f"++{sweep[2]}", *off]


def test_options_may_stand_between_overrides():
    assert checked_arguments(["seed=1", "--cfg", "job", "optimizer=sgd"]) == (
        ["--cfg", "job", "seed=1", "optimizer=sgd"]
    )


def test_own_options_are_found_in_a_config_dir(hvpopt, tmp_path):
    (tmp_path / "mine" / "optimizer").mkdir(parents=True)
    text = "_target_: torch.optim.Adagrad\n_partial_: true\n"
    (tmp_path / "mine" / "optimizer" / "adagrad.yaml").write_text(text)
    code, out, err = hvpopt(
        "--config-dir",
        str(tmp_path / "mine"),
        "optimizer=adagrad",
        "optimizer.lr=1",
        "--cfg",
        "job",
    )
    assert (code, err) == (0, "")
    assert OmegaConf.create(out).optimizer == {
        "_target_": "torch.optim.Adagrad",
        "_partial_": True,
        "lr": 1,
    }


def test_a_sweep_over_spawned_processes_is_not_refused():
    arguments = ["-m", "callbacks=none", "optimizer=sgd", "seed=1,2", "trainer.max_epochs=1"]
    devices = ["++trainer.devices=2", "++trainer.strategy=ddp_spawn"]
    assert checked_arguments([*arguments, *devices]) == [*arguments, *devices]
