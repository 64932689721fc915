"""Exact resumption: random states in checkpoints, and a look into a checkpoint before using it."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch

__all__ = ["RandomState", "check_checkpoint", "check_network", "load_checkpoint"]


class RandomState(lightning.Callback):
    """Keeps the state of the random generators in checkpoints, so that a resumed run goes on with
    the dropout masks of the uninterrupted one.

    Every rank's states of torch (the CPU's and its own device's), NumPy and Python are stored as
    tensors and plain numbers, which `torch.load(weights_only=True)` reads. They come back when
    training starts, after the sanity check and the construction of the loaders. A run resumed on
    another number of ranks starts with fresh states.
    """

    def __init__(self) -> None:
        self._loaded: list[dict[str, Any]] | None = None
        self._device = torch.device("cpu")

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Notes the rank's device."""
        self._device = trainer.strategy.root_device

    def state_dict(self) -> dict[str, Any]:
        """The random states of all ranks."""
        state = _random_state(self._device)
        if not _is_distributed():
            return {"ranks": [state]}
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, state)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the states until training starts."""
        self._loaded = state_dict["ranks"]

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Restores the rank's state, once."""
        ranks, self._loaded = self._loaded, None
        if ranks is not None and len(ranks) == trainer.world_size:
            _restore_random_state(ranks[trainer.global_rank], self._device)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _random_state(device: torch.device) -> dict[str, Any]:
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.tensor(np.asarray(keys, np.int64)), position, has_gauss, cached],
        "python": list(random.getstate()),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    # Lightning's load may have moved the tensors to the device.
    torch.set_rng_state(state["torch"].cpu())
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def check_checkpoint(
    path: str | Path, module: lightning.LightningModule, max_epochs: int | None
) -> None:
    """Checks that training can resume from a checkpoint, before any data are loaded.

    Args:
        path: a file that Lightning's `ModelCheckpoint` wrote.
        module: the module that is to continue.
        max_epochs: the trainer's limit, counted from the first run's start; -1 or None is none.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint of Lightning, belongs to another network or optimizer,
            or has all of `max_epochs` behind it.
    """
    checkpoint = load_checkpoint(path, ("state_dict", "optimizer_states", "loops"))
    check_network(path, checkpoint["state_dict"], module.state_dict())
    _check_optimizer(path, checkpoint.get("optimizer_name"), module)
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    if max_epochs is not None and max_epochs != -1 and epochs >= max_epochs:
        raise ValueError(
            f"ckpt_path={path} has {epochs} epochs behind it and trainer.max_epochs={max_epochs} "
            f"leaves none: set trainer.max_epochs to more than {epochs} to go on."
        )


def load_checkpoint(path: str | Path, needed: Collection[str]) -> dict[str, Any]:
    """What a checkpoint of Lightning holds, on the CPU.

    Args:
        path: a file that Lightning's `ModelCheckpoint` wrote.
        needed: the parts of it that it must hold.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, or lacks one of the parts.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"ckpt_path={path}: there is no such file.")
    try:
        # weights_only: wherever the file came from, loading it runs no code
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the bytes of another file can make the reader raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"ckpt_path={path} cannot be read as a checkpoint (it is damaged, or holds more than "
            f"weights): {reason}"
        ) from error
    missing = set(needed) - set(checkpoint if isinstance(checkpoint, dict) else ())
    if missing:
        raise ValueError(
            f"ckpt_path={path} is not a checkpoint of Lightning: it lacks "
            f"{', '.join(sorted(missing))}."
        )
    return checkpoint


def check_network(path: str | Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Lets a checkpoint's weights pass that fit the network.

    Args:
        path: the checkpoint, for messages.
        saved: its tensors by name.
        current: the network's.

    Raises:
        ValueError: for the first tensor that only one of them has, or whose shapes differ.
    """
    for name in [*current, *saved]:
        ours, theirs = (
            tuple(state[name].shape) if name in state else "absent" for state in (current, saved)
        )
        if ours != theirs:
            raise ValueError(
                f"ckpt_path={path} belongs to another network: {name} is {theirs} there and "
                f"{ours} here; choose the model and data it was trained with."
            )


def _check_optimizer(
    path: str | Path, saved: str | None, module: lightning.LightningModule
) -> None:
    make_optimizer = getattr(module, "make_optimizer", None)
    if saved is None or make_optimizer is None:
        return
    ours = type(make_optimizer([torch.nn.Parameter(torch.zeros(1))])).__name__
    if ours != saved:
        raise ValueError(
            f"ckpt_path={path} was written with the optimizer {saved}, this run has {ours}: choose "
            f"the one it was trained with."
        )
