"""Hydra's overrides and configuration loader, wrapped for the checks in `preflight`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import hydra.version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from hvpopt.cli.errors import UserError

__all__ = ["alternatives", "config_loader", "is_multirun", "line", "parse", "search_folders"]


def parse(overrides: list[str]) -> list[Override]:
    """The overrides as Hydra understands them.

    Raises:
        UserError: for the first that is none.
    """
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        text = getattr(error, "override", None) or " ".join(overrides)
        raise UserError(
            f"{text!r} is not an override; write KEY=VALUE or GROUP=OPTION, and quote a value "
            f"with special characters ('KEY=\"VALUE\"')."
        ) from error


def line(override: Override) -> str:
    """The override as it was written."""
    assert override.input_line is not None
    return override.input_line


def alternatives(override: Override) -> list[str]:
    """The override once for each value of a sweep."""
    if not override.is_sweep_override():
        return [line(override)]
    key = override.get_key_element()
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def is_multirun(overrides: list[Override]) -> bool:
    """Whether an override asks for a sweep, as the option -m does."""
    values = [o.value() for o in overrides if o.key_or_group == "hydra.mode"]
    return any(str(value).endswith("MULTIRUN") for value in values)


def search_folders(overrides: list[Override]) -> list[str]:
    """Further folders of configuration files that the overrides name."""
    values = [o.value() for o in overrides if o.key_or_group == "hydra.searchpath"]
    return [str(folder) for value in values if isinstance(value, list) for folder in value]


@contextmanager
def config_loader(folders: list[str]) -> Iterator[ConfigLoader]:
    """Hydra's loader of our configuration and those in further folders, as `hydra.main` makes it.

    `hydra.initialize_config_module` does the same, but knows no further folders.
    """
    search_path = create_config_search_path("pkg://hvpopt.conf")
    for folder in folders:
        search_path.prepend("command-line", folder, anchor=SearchPathQuery(provider="schema"))
    hydra.version.setbase("1.3")
    GlobalHydra.instance().clear()
    Hydra.create_main_hydra2("hvpopt", search_path)
    try:
        yield GlobalHydra.instance().config_loader()
    finally:
        GlobalHydra.instance().clear()
