"""A checkpoint with the module and the data that belong to it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L

from hvpopt.lightning.resume import check_network, load_checkpoint
from hvpopt.lightning.spectrum.settings import Split


@dataclass(frozen=True)
class Subject:
    """What a spectrum is measured of.

    Attributes:
        module: the module that the checkpoint's weights go into.
        data: its data.
        ckpt_path: a file that Lightning's ``ModelCheckpoint`` wrote.
        name: what it is called in reports; by default the file's path.
    """

    module: L.LightningModule
    data: L.LightningDataModule
    ckpt_path: str | Path
    name: str = ""


@dataclass(frozen=True)
class Origin:
    """What a checkpoint says of itself.

    Attributes:
        epoch: epochs behind it; 0 where it does not say.
        step: optimizer steps behind it; 0 where it does not say.
        optimizer: that trained it; empty where it does not say.
    """

    epoch: int
    step: int
    optimizer: str


def load_weights(path: str | Path, module: L.LightningModule) -> Origin:
    """Puts a checkpoint's weights into the module, and says where they come from.

    Of a trainer's file the module's ``on_load_checkpoint`` hears, as in Lightning: a module that
    trains in phases goes to the checkpoint's.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read as a checkpoint, or belongs to another network.
    """
    checkpoint = load_checkpoint(path, ("state_dict",))
    state = checkpoint["state_dict"]
    if "pytorch-lightning_version" in checkpoint:
        module.on_load_checkpoint(checkpoint)
    check_network(path, state, module.state_dict())
    module.load_state_dict(state)
    return Origin(
        epoch=int(checkpoint.get("epoch", -1)) + 1,
        step=int(checkpoint.get("global_step", 0)),
        optimizer=str(checkpoint.get("optimizer_name", "")),
    )


def loader_of(data: L.LightningDataModule, split: Split) -> Iterable[Any]:
    """The batches of one of the data's loaders.

    Raises:
        ValueError: for several loaders.
    """
    loaders = {
        "train": (data.train_dataloader, "fit"),
        "val": (data.val_dataloader, "fit"),
        "test": (data.test_dataloader, "test"),
    }
    make, stage = loaders[split]
    data.prepare_data()
    data.setup(stage)
    loader = make()
    if isinstance(loader, Mapping | list | tuple):
        raise ValueError(
            f"{type(data).__name__} has {len(loader)} {split} loaders, where one is expected: "
            "choose another split, or let the data module give one."
        )
    return loader
