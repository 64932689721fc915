"""Short runs of the task `train` on some digits."""

import functools

import lightning
import torch
from fits import quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import hvpopt
from hvpopt.lightning import nets
from hvpopt.lightning.data import Digits
from hvpopt.lightning.modules import Classifier
from hvpopt.lightning.resume import RandomState
from hvpopt.lightning.train import train

# The optimizers whose runs must resume bit for bit.
RESUMABLE = {
    "newton_cg": hvpopt.NewtonCG,
    "smd": hvpopt.SMD,
    "adamw": functools.partial(torch.optim.AdamW, lr=3e-3),
    "sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
}
ADAMW = RESUMABLE["adamw"]


def make_trainer(folder, max_epochs, **arguments):
    return functools.partial(quiet_trainer, max_epochs, default_root_dir=folder, **arguments)


def make_callbacks(folder):
    return {
        "checkpoint": ModelCheckpoint(
            folder / "checkpoints",
            filename="best",
            monitor="val/loss",
            save_last=True,
            save_on_train_epoch_end=True,
        ),
        "random_state": RandomState(),
        "absent": None,
    }


def run(folder, max_epochs, optimizer=ADAMW, ckpt_path=None, seed=0, **arguments):
    """Trains a network with dropout and BatchNorm on some digits; its parameters and results."""
    lightning.seed_everything(seed, workers=True, verbose=False)
    module = Classifier(nets.cnn(channels=(4, 8), dropout=0.3), optimizer)
    results = train(
        module,
        Digits(batch_size=64, num_train=192, seed=seed),
        make_trainer(folder, max_epochs, **arguments),
        make_callbacks(folder),
        ckpt_path=ckpt_path,
        output_dir=folder,
    )
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True), results
