"""A checkpoint with the module and the data that belong to it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch

from hvpopt.lightning.resume import _check_network
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

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read as a checkpoint, or belongs to another network.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"ckpt_path={path}: there is no such file.")
    try:
        # weights_only: wherever the file came from, loading it runs no code
        checkpoint: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the bytes of another file can make the reader raise anything
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"ckpt_path={path} cannot be read as a checkpoint (it is damaged, or holds more than "
            f"weights): {first_line}"
        ) from error
    if not isinstance(checkpoint, Mapping) or "state_dict" not in checkpoint:
        raise ValueError(f"ckpt_path={path} is not a checkpoint of Lightning: it lacks state_dict.")
    state = checkpoint["state_dict"]
    _check_network(path, state, module.state_dict())
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
