"""The command `hvpopt`: what it runs, and its answer to each mistake."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from hvpopt import cli
from hvpopt.cli.errors import instantiation_sentence, is_for_the_user, nearest
from hvpopt.cli.preflight import checked_arguments
from hvpopt.cli.targets import argument_names, check_targets, resolve_target
from hvpopt.cli.types import accepts

# Short, and independent of the second-order optimizers.
QUICK = [
    "optimizer=adamw",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "trainer.limit_train_batches=2",
    "trainer.enable_progress_bar=false",
    "callbacks.progress_bar=null",
    "callbacks.optimizer_monitor=null",
    "callbacks.curvature_monitor=null",
]


def only_output(folder: Path) -> Path:
    (path,) = folder.glob("outputs/*/*")
    return path


# --- runs


def test_a_run_leaves_its_outputs_and_ends_with_a_table(hvpopt, tmp_path):
    code, out, err = hvpopt(*QUICK)
    assert (code, err) == (0, "")
    folder = only_output(tmp_path)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {
        "config.yaml",
        ".hydra/config.yaml",
        "hvpopt.log",
        "summary.json",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
    } <= names
    assert any(name.startswith("tensorboard/events.out") for name in names)
    config = (folder / "config.yaml").read_text()
    assert "${" not in config
    assert OmegaConf.load(folder / "config.yaml").output_dir == str(folder)
    table = out.strip().splitlines()
    assert [line.split("  ")[0] for line in table] == [
        "optimizer",
        "test loss",
        "test accuracy",
        "seconds",
        "steps",
        "products",
        "outputs",
        "curves",
    ]
    assert table[4].split() == ["steps", "2"]
    assert table[-1].endswith(f"tensorboard --logdir {folder / 'tensorboard'}")
    log = (folder / "hvpopt.log").read_text()
    assert all(line in log for line in table)
    assert "`Trainer.fit` stopped" in log  # Lightning's messages are in the job log


def test_a_run_resumes_from_a_checkpoint(hvpopt, tmp_path):
    hvpopt(*QUICK, "hydra.run.dir=first", "model=cnn")
    hvpopt(*QUICK, "hydra.run.dir=whole", "model=cnn", "trainer.max_epochs=2")
    code, out, err = hvpopt(
        *QUICK,
        "hydra.run.dir=rest",
        "model=cnn",
        "trainer.max_epochs=2",
        "ckpt_path=first/checkpoints/last.ckpt",
    )
    assert (code, err) == (0, "")
    assert "Resuming from first/checkpoints/last.ckpt" in out
    whole, rest = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "rest")
    )
    assert all(torch.equal(whole[key], rest[key]) for key in whole)

    code, _, err = hvpopt(*QUICK, "model=cnn", "ckpt_path=first/checkpoints/last.ckpt")
    assert code == 1
    assert "set trainer.max_epochs to more than 1" in err


def test_a_sweep_runs_every_combination_and_ends_with_a_table(hvpopt, tmp_path):
    overrides = [text for text in QUICK if not text.startswith("optimizer=")]
    code, out, err = hvpopt(
        *overrides, "optimizer=adamw,sgd", "-m", "seed=1,2", "hydra.sweep.dir=sweep"
    )
    assert (code, err) == (0, "")
    table = out[out.rindex("\nrun ") :].strip().splitlines()
    assert len(table) == 1 + 4
    for line, (optimizer, seed) in zip(
        table[1:], [("adamw", 1), ("adamw", 2), ("sgd", 1), ("sgd", 2)], strict=True
    ):
        assert f"optimizer={optimizer}" in line
        assert f"seed={seed}" in line
    assert re.search(r"test/accuracy +seconds +outputs$", table[0])
    assert (tmp_path / "sweep" / "3" / "config.yaml").is_file()


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


def test_version(hvpopt):
    code, out, _ = hvpopt("--version")
    assert code == 0
    assert re.fullmatch(r"hvpopt \d+\.\d+.*\n", out)


def test_info_works_as_in_hydra(hvpopt):
    code, out, _ = hvpopt("--info", "defaults", "experiment=digits_adamw")
    assert code == 0
    assert "optimizer/adamw" in out


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "hvpopt.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )


def test_help_is_our_own():
    result = command("--help")
    assert result.returncode == 0
    for part in (
        "usage: hvpopt",
        "optimizer: adahessian, adamw, handover, lbfgs, newton_cg, nys_newton_cg, sgd, smd",
        "experiment: autoencoder_adamw",
        "hvpopt -m optimizer=newton_cg,smd,adamw,lbfgs seed=1,2,3",
        "max_epochs: ",
    ):
        assert part in result.stdout


def test_a_mistake_in_a_process_of_its_own_and_its_trace(tmp_path):
    arguments = (
        "optimizer=adamw",
        "optimizer.lr=-1",
        "callbacks=none",
        f"hydra.run.dir={tmp_path}",
    )
    result = command(*arguments)
    assert result.returncode == 1
    assert result.stderr.strip() == "hvpopt: optimizer (AdamW): Invalid learning rate: -1"
    result = command(*arguments, HYDRA_FULL_ERROR="1")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


# --- mistakes

MISTAKES = {
    # groups, options, keys
    "optimizer=newton": "optimizer has no such option. Did you mean 'newton_cg'?",
    "experiment=digit": "experiment has no such option. Did you mean 'digits'?",
    "logger=null": "logger has no such option. Possible: none, tensorboard.",
    "optimzer=adamw": "There is no group or key 'optimzer'. Did you mean 'optimizer'?",
    "sed=1": "There is no group or key 'sed'. Did you mean 'seed'?",
    "callbacks.checkpont.verbose=1": "callbacks has no key 'checkpont'. Did you mean 'checkpoint'?",
    "optimizer=adamw,sgd": "names several values: add -m",
    "seed=[1": "'seed=[1' is not an override; write KEY=VALUE",
    "model.optimizer.lr=1": "model.optimizer is ${optimizer}, set the key there",
    "+seed=1": "Could not append to config. An item is already at 'seed'",
    "++trainer.max_epoch=1": "lightning.Trainer (trainer) has no argument 'max_epoch'. Did you",
    # arguments
    "optimizer.weight_decai=1": "torch.optim.AdamW (optimizer) has no argument 'weight_decai'. "
    "Did you mean 'weight_decay'?",
    "trainer.max_epoch=1": "lightning.Trainer (trainer) has no argument 'max_epoch'",
    "model.net.channel=[1]": "has no argument 'channel'. Did you mean 'channels'?",
    # types
    "optimizer.lr=abc": "optimizer.lr='abc' is not accepted: torch.optim.AdamW expects float or",
    "data.batch_size=1.5": "data.batch_size=1.5 is not accepted: hvpopt.lightning.data.Digits",
    "trainer.max_epochs=abc": "trainer.max_epochs='abc' is not accepted",
    "model.net.channels=5": "is not accepted: hvpopt.lightning.nets.cnn expects Sequence[int]",
    "seed=abc": "seed must be an integer from 0 to 2**32 - 1, got 'abc'",
    # ranges
    "seed=-1": "seed must be an integer from 0 to 2**32 - 1, got -1",
    "optimizer.lr=-1": "optimizer (AdamW): Invalid learning rate: -1",
    "data.batch_size=0": "data: batch_size must be at least 1, got 0",
    "model.net.activation=gely": "model.net: activation must be one of",
    "trainer.accelerator=gppu": "trainer: You selected an invalid accelerator name",
    "trainer.limit_train_batches=-1": "trainer: You have passed invalid value -1",
    # files
    "ckpt_path=nope.ckpt": "ckpt_path=nope.ckpt: there is no such file",
    "data=fashion_mnist data.root=nope": "data.root=nope holds no train-images-idx3-ubyte",
    "data=fashion_mnist data.root=. model=autoencoder": "data.root=. holds no train-images",
    # combinations
    "model=autoencoder": "The network does not accept Digits's images of shape [1, 8, 8]",
    "callbacks.checkpoint.monitor=val/nothing": "could not find the monitored key",
    # targets
    "optimizer._target_=os.system": "optimizer._target_=os.system is not allowed: .* set the "
    "environment variable HVPOPT_ALLOWED_TARGETS=PACKAGE",
    "optimizer._target_=torch.optim.AdmW": "does not exist. Did you mean 'AdamW'?",
    "+callbacks.x._target_=os.getcwd": "callbacks.x._target_=os.getcwd is not allowed",
    "+hydra.callbacks.x._target_=os.getcwd": "hydra.callbacks.x._target_=os.getcwd is not allowed",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_gets_one_sentence(hvpopt, arguments):
    code, out, err = hvpopt(*QUICK, *arguments.split())
    sentence = re.escape(MISTAKES[arguments]).replace(r"\.\*", ".*")
    assert re.search(sentence, err), err
    assert err.startswith(("hvpopt: ", "\nhvpopt: "))
    assert err.strip().count("\n") == 0
    assert "steps" not in out
    assert code == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("optimizer=adamw,lbfs", "optimizer=lbfs: optimizer has no such option"),
        ("optimizer=adamw,lbfgs optimizer.weight_decay=1", "torch.optim.LBFGS (optimizer) has no"),
        ("optimizer.lr=0.1,abc", "optimizer.lr='abc' is not accepted"),
        ("seed=1,2 trainer.devices=2", "would start the sweep again: set trainer.devices=1"),
        ("seed=1,2 trainer.devices=[0,1] trainer.strategy=ddp", "would start the sweep again"),
    ],
)
def test_a_mistake_in_a_sweep_is_found_before_its_first_run(hvpopt, tmp_path, arguments, sentence):
    code, out, err = hvpopt("-m", *QUICK, *arguments.split())
    assert sentence in err
    assert (code, out) == (1, "")
    assert not (tmp_path / "multirun").exists()


def test_a_sweep_over_spawned_processes_is_not_refused():
    arguments = ["-m", "callbacks=none", "optimizer=sgd", "seed=1,2", "trainer.max_epochs=1"]
    devices = ["++trainer.devices=2", "++trainer.strategy=ddp_spawn"]
    assert checked_arguments([*arguments, *devices]) == [*arguments, *devices]


def test_the_whole_trace_is_shown_on_demand(hvpopt, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="Invalid learning rate"):
        hvpopt(*QUICK, "optimizer.lr=-1")


def test_a_bug_keeps_its_trace(hvpopt, monkeypatch):
    def broken(*args, **kwargs):
        return {}["a key that a bug looks up"]

    monkeypatch.setattr("hvpopt.lightning.train._test", broken)
    code, _, err = hvpopt(*QUICK)
    assert code == 1
    assert "Traceback" in err
    assert "a key that a bug looks up" in err


# --- the parts


def test_only_raise_statements_of_hvpopt_speak_to_the_user():
    def caught(function):
        try:
            function()
        except Exception as error:
            return error

    from hvpopt.lightning.nets import mlp

    assert is_for_the_user(caught(lambda: mlp(dropout=2.0)))
    assert not is_for_the_user(caught(lambda: mlp(dropout=None)))  # a comparison, not a sentence
    assert not is_for_the_user(caught(lambda: int("x")))
    assert not is_for_the_user(KeyError("x"))
    assert not is_for_the_user(ValueError("never raised"))


def test_a_failed_construction_is_named_as_the_user_knows_it():
    error = InstantiationException("Error in call to target 'x':\nfull_key: task.module.net")
    error.__cause__ = ValueError("too wide")
    assert instantiation_sentence(error, {"module": "${model}"}) == "model.net: too wide"
    assert instantiation_sentence(InstantiationException("odd"), {}) == "odd"


def test_nearest_names():
    assert nearest("lrr", ["lr", "momentum"]) == " Did you mean 'lr'?"
    assert nearest("zzz", ["b", "a"]) == " Possible: a, b."
    assert nearest("zzz", []) == ""


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("os.system", "is not allowed"),
        ("hvpopt_evil.run", "is not allowed"),
        ("torch.optimism.Adam", "is not allowed"),
        ("torch.load", "is not allowed"),
        ("lightning.pytorch.trainer.trainer.os.system", r"not allowed \(it belongs to posix\)"),
        ("hvpopt.cli.sys.exit", r"not allowed \(it belongs to sys\)"),
        ("torch.optim", "is not allowed"),  # a module, not a callable
        (None, "is not allowed"),
        ("torch.optim.", "does not exist"),
        ("torch.optim.nothing.Adam", "does not exist"),
        ("hvpopt.no_such_module.x", "does not exist"),
    ],
)
def test_targets_that_are_refused(target, match):
    with pytest.raises(cli.UserError, match=match):
        resolve_target(target, "optimizer")


def test_targets_that_are_resolved(monkeypatch):
    assert resolve_target("torch.optim.AdamW", "optimizer") is torch.optim.AdamW
    with pytest.raises(cli.UserError, match="HVPOPT_ALLOWED_TARGETS=PACKAGE"):
        resolve_target("collections.OrderedDict", "x")
    monkeypatch.setenv("HVPOPT_ALLOWED_TARGETS", "fractions, collections")
    from collections import OrderedDict

    assert resolve_target("collections.OrderedDict", "x") is OrderedDict


def test_targets_inside_lists_are_checked():
    with pytest.raises(cli.UserError, match=r"a.b\[1\]._target_=os.getcwd is not allowed"):
        check_targets({"a": {"b": [1, {"_target_": "os.getcwd"}]}})


def test_argument_names():
    def named(a, *, b):
        pass

    def open_ended(a, **rest):
        pass

    assert argument_names(named) == {"a", "b"}
    assert argument_names(open_ended) is None


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (float, [1, 1.5], ["a", True, None]),
        (int, [1], [1.0, True, "1"]),
        (bool, [True], [1, "true"]),
        (str, ["a"], [1]),
        (float | None, [None, 2], ["a"]),
        (Path | str, ["a"], [1]),
        (torch.Tensor | float, [1.0, {"_target_": "x"}], ["a"]),
        (list[int], [[1, 2]], [["a"], 1]),
        (tuple[float, float], [[1, 2]], [[1], "ab"]),
        (tuple[int, ...], [[1, 2, 3]], [["a"]]),
        (object, ["anything", [1]], []),
    ],
)
def test_accepts(hint, good, bad):
    assert all(accepts(hint, value) for value in good)
    assert not any(accepts(hint, value) for value in bad)


def test_accepts_the_options_of_a_literal():
    from typing import Any, Literal

    assert accepts(Literal["a", "b"], "a")
    assert not accepts(Literal["a", "b"], "c")
    assert accepts(Any, [1])


def test_importing_the_command_imports_no_lightning():
    code = "import hvpopt.cli, sys; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_default_run_prints_no_warning(hvpopt):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code, _, err = hvpopt(*QUICK)
    assert (code, err) == (0, "")
