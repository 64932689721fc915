"""Checks of a command line before Hydra runs it.

Hydra finds most mistakes too, but late, in several lines, or once a run of a sweep. Here every
override is looked at first, with the configuration that the chosen groups give:

- a group, option or key that does not exist is answered with the nearest name;
- `optimizer.damping=1` works although the YAML file does not list `damping`: a key that the
  node's `_target_` accepts as an argument becomes Hydra's `++optimizer.damping=1`;
- of a sweep, all runs are checked before the first one starts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from hvpopt.cli.errors import UserError, nearest, one_line
from hvpopt.cli.overrides import (
    alternatives,
    config_loader,
    is_multirun,
    line,
    parse,
    search_folders,
)
from hvpopt.cli.sweep import refuse_relaunch
from hvpopt.cli.targets import argument_names, check_targets, resolve_target, unknown_argument

__all__ = ["checked_arguments"]


def checked_arguments(argv: list[str]) -> list[str]:
    """The arguments to give to Hydra: options first, then the overrides, keys completed by `++`.

    Raises:
        UserError: for the first mistake in them.
    """
    # The parser that hydra.main itself uses; "intermixed" also takes `optimizer=smd -m seed=1,2`.
    args = get_args_parser().parse_intermixed_args(argv)
    if args.hydra_help or args.shell_completion or args.experimental_rerun or args.config_path:
        return argv
    options = [text for text in argv if text not in args.overrides]
    overrides = parse(args.overrides)
    folders = search_folders(overrides)
    if args.config_dir:
        folders.append(f"file://{Path(args.config_dir).absolute()}")
    with config_loader(folders) as loader:
        check = _Check(loader, args.config_name or "config")
        multirun = args.multirun or is_multirun(overrides)
        return [*options, *check.completed(overrides, multirun)]


class _Check:
    """The checks of one command line."""

    def __init__(self, loader: ConfigLoader, config_name: str) -> None:
        self._loader = loader
        self._config_name = config_name

    def completed(self, overrides: list[Override], multirun: bool) -> list[str]:
        """The overrides as text, with `++` where a key is an unlisted argument."""
        for override in overrides:
            if override.is_sweep_override() and not multirun:
                raise UserError(
                    f"{line(override)} names several values: add -m to run one after the other, "
                    f"or write [...] if a list is meant."
                )
        groups: list[Override] = []
        values: list[Override] = []
        for override in overrides:
            (groups if self._is_group(override) else values).append(override)
        for override in groups:
            self._check_options(override)
        unlisted: set[str] = set()
        for choice in itertools.product(*map(alternatives, groups)):
            config = self._compose(list(choice))
            unlisted |= self._unlisted(config, values)
        texts = [
            f"++{line(override)}" if override.key_or_group in unlisted else line(override)
            for override in overrides
        ]
        self._check_runs(parse(texts), multirun)
        return texts

    def _is_group(self, override: Override) -> bool:
        return bool(self._loader.get_group_options(override.key_or_group))

    def _check_options(self, override: Override) -> None:
        if override.is_delete():
            return
        group = override.key_or_group
        options = self._loader.get_group_options(group)
        for text in alternatives(override):
            chosen = text.partition("=")[2].strip("[]")
            for name in filter(None, (part.strip() for part in chosen.split(","))):
                if name not in options:
                    hint = nearest(name, options)
                    raise UserError(f"{group}={name}: {group} has no such option.{hint}")

    def _compose(self, overrides: list[str]) -> DictConfig:
        try:
            return compose(self._config_name, overrides, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(_composition_sentence(error)) from error

    def _unlisted(self, config: DictConfig, values: list[Override]) -> set[str]:
        """Keys that are not in the configuration but arguments of their node's target."""
        unlisted = set()
        added = []  # keys that this command line itself adds
        for override in values:
            key = override.key_or_group
            if override.is_add() or override.is_force_add():
                added.append(key)
            elif override.is_delete() or _exists(config, key):
                continue
            elif not any(key == other or key.startswith(f"{other}.") for other in added):
                self._check_argument(config, key)
                unlisted.add(key)
        return unlisted

    def _check_argument(self, config: DictConfig, key: str) -> None:
        *path, name = key.split(".")
        node: Any = config
        for depth, part in enumerate(path):
            if not _has(node, part):
                raise UserError(self._no_such_key(node, path[:depth], part))
            if OmegaConf.is_interpolation(node, part):
                here, there = ".".join(path[: depth + 1]), OmegaConf.to_container(node)
                assert isinstance(there, dict)
                raise UserError(f"{key} cannot be set: {here} is {there[part]}, set the key there.")
            node = node[part]
        if not _has(node, "_target_"):
            raise UserError(self._no_such_key(node, path, name))
        where = ".".join(path)
        names = argument_names(resolve_target(node["_target_"], where))
        if names is not None and name not in names:
            raise UserError(unknown_argument(where, name, node["_target_"], names))

    def _no_such_key(self, node: Any, path: list[str], name: str) -> str:
        options = {str(key) for key in node} if isinstance(node, DictConfig) else set()
        options -= {"hydra", "_target_", "_partial_"}
        if not path:
            groups = set(self._loader.list_groups("")) - {"hydra"}
            return f"There is no group or key {name!r}.{nearest(name, options | groups)}"
        return f"{'.'.join(path)} has no key {name!r}.{nearest(name, options)}"

    def _check_runs(self, overrides: list[Override], multirun: bool) -> None:
        """Composes what will run; of a sweep, also checks each run's targets and types."""
        for run in self._representatives(overrides):
            config = self._compose(run)
            hooks = OmegaConf.to_container(config.hydra.callbacks)
            check_targets({"hydra": {"callbacks": hooks}}, more=("hydra",))
            if multirun:
                with open_dict(config):
                    del config["hydra"]
                check_targets(_without_interpolations(OmegaConf.to_container(config)))
                refuse_relaunch(config.trainer)

    def _representatives(self, overrides: list[Override]) -> Iterator[list[str]]:
        """Runs that show every mistake of a sweep: all combinations of groups, and with each the
        values one at a time (their combinations are many, and each is right if its parts are)."""
        options = [alternatives(override) for override in overrides]
        groups = [i for i, override in enumerate(overrides) if self._is_group(override)]
        for choice in itertools.product(*(options[i] for i in groups)):
            first = [texts[0] for texts in options]
            for i, text in zip(groups, choice, strict=True):
                first[i] = text
            yield first
            for i in set(range(len(options))) - set(groups):
                for text in options[i][1:]:
                    yield [*first[:i], text, *first[i + 1 :]]


def _has(node: Any, key: str) -> bool:
    # keys(), because `in` looks through references, and some resolve only in the running job
    return isinstance(node, DictConfig) and key in node.keys()  # noqa: SIM118


def _exists(config: DictConfig, key: str) -> bool:
    node: Any = config
    for part in key.split("."):
        if not _has(node, part):
            return False
        node = None if OmegaConf.is_interpolation(node, part) else node[part]
    return True


def _without_interpolations(node: Any) -> Any:
    """A container without its references, which repeat what is checked elsewhere, or which only
    the running job can resolve."""
    if not isinstance(node, dict):
        return node
    return {
        key: _without_interpolations(value)
        for key, value in node.items()
        if not (isinstance(value, str) and "${" in value)
    }


def _composition_sentence(error: Exception) -> str:
    lines = [text for text in str(error).splitlines() if text.strip()]
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        lines += str(cause).splitlines()[:1]
    return one_line(" ".join(lines[:2]) if isinstance(error, HydraException) else lines[0])
