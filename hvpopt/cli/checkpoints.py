"""Tasks that look at trained runs: each checkpoint with the model and data of its own run.

Such a task has a key `subjects`, which is filled in here from `ckpt_path` (one path or several).
A run keeps its resolved configuration, `config.yaml`, in the folder above its checkpoints; model
and data come from there, so that they need not be given again. What the command line says of them
goes before. They are checked like everything else that a configuration constructs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped]

from hvpopt.cli.errors import UserError
from hvpopt.cli.overrides import parse

__all__ = ["fill_subjects", "short_names"]

log = logging.getLogger(__name__)

_TARGET = "hvpopt.lightning.spectrum.Subject"
_PARTS = ("model", "data")


def fill_subjects(config: DictConfig, overrides: Sequence[str]) -> None:
    """Writes `task.subjects`, if the task has that key.

    Args:
        config: the job's configuration.
        overrides: those of the command line.

    Raises:
        UserError: if there is no checkpoint, a path does not exist, a run's configuration cannot be
            read, or `task.subjects` is set by hand.
    """
    if "subjects" not in config.task:
        return
    if config.task.subjects:
        raise UserError("task.subjects is filled in from ckpt_path: set that.")
    given = config.ckpt_path
    paths = [] if given is None else [given] if isinstance(given, str) else list(given)
    if not paths:
        raise UserError(
            "ckpt_path: this task needs a checkpoint, ckpt_path=FILE or a run's folder "
            "(several as [FILE,FILE])."
        )
    files = [_file(Path(str(path))) for path in paths]
    names = short_names(files)
    config.task.subjects = [
        str(file) if file.suffix == ".json" else _subject(config, overrides, file, name)
        for file, name in zip(files, names, strict=True)
    ]


def _file(path: Path) -> Path:
    """The checkpoint that a path means: a file, or a run's best."""
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"ckpt_path={path}: there is no such file.")
        return path
    for folder in (path / "checkpoints", path):
        for name in ("best.ckpt", "last.ckpt"):
            if (folder / name).is_file():
                return folder / name
    raise UserError(
        f"ckpt_path={path} is a folder without checkpoints/best.ckpt or checkpoints/last.ckpt: "
        f"give a run's folder, or a checkpoint."
    )


def _subject(config: DictConfig, overrides: Sequence[str], file: Path, name: str) -> dict[str, Any]:
    parts = {part: config[part] for part in _PARTS}
    run = _run_config(file)
    if run is not None:
        for part in _PARTS:
            parts[part] = _with_overrides(run[part], config[part], part, overrides)
    model, data = (OmegaConf.to_container(parts[part], resolve=True) for part in _PARTS)
    return {
        "_target_": _TARGET,
        "module": model,
        "data": data,
        "ckpt_path": str(file),
        "name": name,
    }


def _run_config(file: Path) -> DictConfig | None:
    """The configuration of the run that wrote a checkpoint; None if it is not there."""
    for folder in file.absolute().parents[:2]:
        path = folder / "config.yaml"
        if path.is_file():
            break
    else:
        return None
    try:
        run = OmegaConf.load(path)
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}, the run's configuration, cannot be read: {reason}.") from error
    if not isinstance(run, DictConfig) or any(part not in run for part in _PARTS):
        log.info("%s is no run's configuration: model and data are this command's own.", path)
        return None
    log.info("%s: model and data as in %s.", file, path)
    return run


def _with_overrides(
    run: DictConfig, config: DictConfig, part: str, overrides: Sequence[str]
) -> DictConfig:
    """A part of a run's configuration with what the command line says of it."""
    merged = OmegaConf.create(OmegaConf.to_container(run))
    assert isinstance(merged, DictConfig)
    for override in parse(list(overrides)):
        key = override.key_or_group
        if key in (part, "experiment"):  # a choice of the whole
            return config
        if key.startswith(f"{part}."):
            inner = key.removeprefix(f"{part}.")
            value = OmegaConf.select(config, inner)
            plain = (
                OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            )
            OmegaConf.update(merged, inner, plain, force_add=True)
    return merged


def short_names(files: Sequence[Path]) -> list[str]:
    """What tells the files apart: their paths without the folders that all share."""
    plain = [file.with_suffix("") for file in files]
    parts = [[p for p in path.parts if p != "checkpoints"] for path in plain]
    if len(files) == 1:
        return [os.path.join(*parts[0][-2:])]
    while all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    while all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    return [os.path.join(*p) for p in parts]
