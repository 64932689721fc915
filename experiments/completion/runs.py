"""Training by the `hvpopt` command, and what its runs leave."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from hvpopt.cli.targets import check_targets
from hvpopt.lightning.spen import SPENModule

from .questions import QUESTIONS

CONTESTANTS = {
    "energy": ["experiment=completion_energy"],
    "feedforward": ["experiment=completion_feedforward"],
}
"""The command's arguments for each."""
SPECIALISTS = {
    name: ["experiment=completion_feedforward", f"data.question={name}"]
    for name, question in QUESTIONS.items()
    if question.matrix is not None
}
"""Those of networks that are trained on the very measurements that they are asked about."""


ARGUMENTS = CONTESTANTS | {f"specialist_{name}": words for name, words in SPECIALISTS.items()}


def trained(folder: Path, name: str, seed: int, overrides: Sequence[str] = ()) -> SPENModule:
    """A contestant, trained in a folder of its own unless it has been.

    Raises:
        subprocess.CalledProcessError: If the training fails.
    """
    run = folder / name / str(seed)
    if not (run / "summary.json").is_file():
        where = f"hydra.run.dir={run}"
        command = [sys.executable, "-m", "hvpopt.cli", where, *ARGUMENTS[name], f"seed={seed}"]
        subprocess.run([*command, *overrides], check=True)
    return loaded(run)


def loaded(run: Path) -> SPENModule:
    """The module of a run at its best checkpoint."""
    config = OmegaConf.load(run / "config.yaml")
    assert isinstance(config, DictConfig)
    model = OmegaConf.to_container(config.model, resolve=True)
    assert isinstance(model, dict)
    check_targets({"model": model})
    module = hydra.utils.instantiate(model, _convert_="all")
    module.load_state_dict(torch.load(checkpoint(run), weights_only=True)["state_dict"])
    return module


def checkpoint(run: Path) -> Path:
    """A run's best checkpoint."""
    return run / "checkpoints" / "best.ckpt"
