"""A small multi-label task and an energy network for it, for the tests of SPENModule."""

import functools

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from hvpopt.lightning.phases import Phase
from hvpopt.lightning.scores import MultiLabelF1
from hvpopt.lightning.spen import SPENModule
from hvpopt.lightning.synthetic_blocks import SyntheticBlocks
from hvpopt.nested import Box, MirrorDescent
from hvpopt.nested.energies import spen
from hvpopt.nested.losses import LabelByLabel, Minimizer, StructuredHinge

ADAM = functools.partial(torch.optim.Adam, lr=1e-2)


def minimizer(adjoint="back_optimization", num_steps=5):
    return Minimizer(method=MirrorDescent(0.3, num_steps), domain=Box(entropy=1.0), adjoint=adjoint)


def staged(**lrs):
    """Classifier, head, joint: one epoch, two epochs, and the rest."""
    lrs = {"classifier": 1e-2, "head": 2e-2, "joint": 1e-3} | lrs
    return {
        "classifier": Phase(LabelByLabel(), 1, "encoder", lr=lrs["classifier"]),
        "head": Phase(StructuredHinge(), 2, "head", lr=lrs["head"], weight_decay=0.01),
        "joint": Phase(StructuredHinge(), lr=lrs["joint"]),
    }


def network(phases=None, optimizer=ADAM, adjoint="back_optimization", seed=0, **arguments):
    torch.manual_seed(seed)
    energy = spen(8, 6, widths=[5], num_units=4)
    return network_of(energy, phases, optimizer, adjoint, **arguments)


def network_of(energy, phases=None, optimizer=ADAM, adjoint="back_optimization", **arguments):
    phases = staged() if phases is None else phases
    arguments = {"minimizer": minimizer(adjoint), "scores": MultiLabelF1()} | arguments
    return SPENModule(energy, optimizer, phases=phases, **arguments)


def blocks(**arguments):
    sizes = {"num_train": 48, "num_val": 20, "num_test": 30}
    return SyntheticBlocks(16, num_features=8, num_blocks=2, block_size=3, **sizes | arguments)


def trainer(folder, max_epochs, **arguments):
    arguments = {"logger": False, "callbacks": []} | arguments
    return lightning.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **arguments,
    )


def checkpoint(folder):
    return ModelCheckpoint(
        folder, filename="best", monitor="val/candidate", mode="max", save_last=True
    )
