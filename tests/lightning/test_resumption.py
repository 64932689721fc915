"""A resumed run is the uninterrupted one, and a file that cannot be resumed is named."""

import functools
import random

import numpy as np
import pytest
import torch
from digit_runs import ADAMW, RESUMABLE, make_trainer, run

from hvpopt.lightning import nets
from hvpopt.lightning.modules import Classifier
from hvpopt.lightning.resume import RandomState, check_checkpoint


@pytest.mark.parametrize("name", RESUMABLE)
def test_a_resumed_run_ends_with_the_parameters_of_the_uninterrupted_one(tmp_path, name):
    whole, _ = run(tmp_path / "whole", 3, RESUMABLE[name])
    run(tmp_path / "part", 1, RESUMABLE[name])
    # Another seed: what the resumed run draws must come from the checkpoint.
    torch.manual_seed(99)
    resumed, results = run(
        tmp_path / "rest",
        3,
        RESUMABLE[name],
        ckpt_path=tmp_path / "part" / "checkpoints" / "last.ckpt",
    )
    assert results["steps"] == 9
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][key]), key
    assert (
        whole["callbacks"]["RandomState"]["ranks"][0]["python"]
        == (resumed["callbacks"]["RandomState"]["ranks"][0]["python"])
    )


def test_without_the_random_state_the_resumed_run_differs(tmp_path, monkeypatch):
    """The test above would notice: dropout depends on the random state."""
    whole, _ = run(tmp_path / "whole", 2)
    run(tmp_path / "part", 1)
    monkeypatch.setattr(RandomState, "on_train_start", lambda *args: None)
    resumed, _ = run(
        tmp_path / "rest", 2, ckpt_path=tmp_path / "part" / "checkpoints" / "last.ckpt"
    )
    key = "net.0.weight"
    assert not torch.equal(whole["state_dict"][key], resumed["state_dict"][key])


def test_random_state_restores_torch_numpy_and_python(tmp_path):
    def draws():
        return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()

    callback = RandomState()
    torch.save(callback.state_dict(), tmp_path / "state")
    expected = draws()
    draws()
    callback.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    trainer = make_trainer(tmp_path, 1)()
    callback.on_train_start(trainer, Classifier(nets.mlp(), ADAMW))
    assert draws() == expected
    callback.on_train_start(trainer, Classifier(nets.mlp(), ADAMW))  # once only
    assert draws() != expected


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    run(folder, 1, limit_train_batches=1)
    return folder / "checkpoints" / "last.ckpt"


def digits_cnn(**arguments):
    return Classifier(nets.cnn(channels=(4, 8), **arguments), ADAMW)


def test_a_usable_checkpoint_passes(checkpoint):
    check_checkpoint(checkpoint, digits_cnn(), 2)
    check_checkpoint(checkpoint, digits_cnn(), -1)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nope.ckpt: there is no such file"):
        check_checkpoint(tmp_path / "nope.ckpt", digits_cnn(), 2)


@pytest.mark.parametrize("content", [b"", b"some text", b"PK\x03\x04 broken"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "file.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        check_checkpoint(path, digits_cnn(), 2)


def test_a_file_of_weights_alone_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="it lacks loops, optimizer_states"):
        check_checkpoint(tmp_path / "weights.pt", digits_cnn(), 2)


def test_a_run_with_no_epoch_left_is_refused(checkpoint):
    with pytest.raises(ValueError, match=r"has 1 epochs behind it and trainer.max_epochs=1"):
        check_checkpoint(checkpoint, digits_cnn(), 1)


def test_a_checkpoint_of_another_network_is_refused(checkpoint):
    module = Classifier(nets.cnn(channels=(4, 9)), ADAMW)
    with pytest.raises(ValueError, match=r"another network: net.3.weight is \(8, .* \(9, "):
        check_checkpoint(checkpoint, module, 2)


def test_a_checkpoint_of_another_optimizer_is_refused(checkpoint):
    module = Classifier(nets.cnn(channels=(4, 8)), functools.partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(ValueError, match="with the optimizer AdamW, this run has SGD"):
        check_checkpoint(checkpoint, module, 2)
