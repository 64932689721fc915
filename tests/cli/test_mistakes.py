"""The answer to each mistake on the command line is one sentence."""

import re

import pytest
from hydra.errors import InstantiationException
from quick_runs import QUICK

from hvpopt.cli.errors import instantiation_sentence, is_for_the_user, nearest

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
