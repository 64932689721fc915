"""The `hvpopt` command, the only entry point that reads a configuration.

The way of a call: `main` checks the command line (`preflight`), Hydra composes the
configuration and starts `_run`, which constructs the objects that the task node names and calls
the task, a plain function such as `hvpopt.lightning.train.train`. Lightning is imported only in
there, after Hydra has configured logging; `hvpopt --help` does without.
"""

from __future__ import annotations

import importlib.metadata
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hvpopt.cli.checkpoints import fill_subjects
from hvpopt.cli.errors import UserError, fail, instantiation_sentence, is_for_the_user
from hvpopt.cli.preflight import checked_arguments
from hvpopt.cli.targets import argument_names, check_targets

__all__ = ["main"]


def main() -> None:
    """Runs the command with the arguments in `sys.argv`; exits with 1 or 2 after a mistake."""
    if "--version" in sys.argv[1:]:
        sys.stdout.write(f"hvpopt {importlib.metadata.version('hvpopt')}\n")
        return
    try:
        # In place: Hydra reads sys.argv, and so do the other ranks that Lightning starts.
        sys.argv[1:] = checked_arguments(sys.argv[1:])
    except UserError as error:
        fail(error)
    _run()


@hydra.main(version_base="1.3", config_path="pkg://hvpopt.conf", config_name="config")
def _run(config: DictConfig) -> Any:
    """One job: builds what the task needs, then calls it."""
    try:
        task = _build(config)
    except InstantiationException as error:
        fail(error, instantiation_sentence(error, _plain(config.task, resolve=False)))
    except (UserError, OmegaConfBaseException) as error:
        fail(error)
    try:
        return task()
    except Exception as error:
        if not is_for_the_user(error):
            raise
        sys.stderr.write("\n")  # a progress bar may have left its line open
        fail(error)


def _build(config: DictConfig) -> Callable[[], Any]:
    """The task with its arguments, after the checks that need no data."""
    import lightning

    _leave_console_to_hydra()
    fill_subjects(config, HydraConfig.get().overrides.task)
    resolved = _plain(config, resolve=True)
    _check_seed(config.seed)
    # Nodes that refer to others come last, so that a message names the place of the mistake.
    late: dict[str, Any] = {
        name: resolved.pop(name) for name in ("model", "task") if name in resolved
    }
    check_targets({**resolved, **late})
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    _save(config)
    task = hydra.utils.instantiate(config.task, _convert_="all")
    accepted = argument_names(getattr(task, "func", task)) or set()
    return partial(task, choices=_choices(config)) if "choices" in accepted else task


def _choices(config: DictConfig) -> dict[str, Any]:
    """The option of each group, and what the command line has set, by their names."""
    job = HydraConfig.get()
    options = {k: v for k, v in job.runtime.choices.items() if not k.startswith("hydra/") and v}
    keys = [text.lstrip("+~").partition("=")[0] for text in job.overrides.task]
    values = {key: OmegaConf.select(config, key) for key in keys if key not in options}
    return {**options, **values}


def _leave_console_to_hydra() -> None:
    """Removes the handler with which Lightning prints every message a second time."""
    logger = logging.getLogger("lightning")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)


def _plain(config: DictConfig, resolve: bool) -> dict[str, Any]:
    container = OmegaConf.to_container(config, resolve=resolve)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _check_seed(seed: Any) -> None:
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise UserError(f"seed must be an integer from 0 to 2**32 - 1, got {seed!r}.")


def _save(config: DictConfig) -> None:
    from lightning.pytorch.utilities import rank_zero_only

    if getattr(rank_zero_only, "rank", 0) == 0:
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, folder / "config.yaml", resolve=True)
